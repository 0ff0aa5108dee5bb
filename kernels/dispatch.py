"""Which implementation of a tensor operation runs: the caller's wish, a `use(...)` block, DENSEZOO_KERNELS, or the
first one that can.

Every operation has a PyTorch reference called 'torch', which takes every call. Faster implementations come before it
and say, call by call, why they cannot run; that sentence is what a caller who insists on one gets to read. Exported
programs always take the reference: it is plain PyTorch, so neither ONNX nor TensorRT needs a plugin.

Triton's interpreter (TRITON_INTERPRET=1, set before Triton is imported) executes the kernels on a CPU: a proof that
they are right, far too slow to be chosen by 'auto'.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BACKENDS = ('auto', 'triton', 'torch')
NOT_WRITTEN = 'no Triton kernel is written for it'  # the refusal of operations without one
VARIABLE = 'DENSEZOO_KERNELS'

_HAS_TRITON = importlib.util.find_spec('triton') is not None  # found, not imported
_forced: str | None = None
_from_environment = os.environ.get(VARIABLE, 'auto')


@dataclass(frozen=True)
class Choice:
    """The path of one call.

    Args:
        operation: its name.
        backend: what it takes.
        refusals: the implementations that cannot take it, and why.
    """

    operation: str
    backend: str
    refusals: dict[str, str]

    def __str__(self) -> str:
        reasons = '; '.join(f'not {name}: {reason}' for name, reason in self.refusals.items())
        return f'{self.operation}: {self.backend}' + (f' ({reasons})' if reasons else '')


class _Chosen(Exception):
    """Ends a call of which only the path is asked for."""


_observers: list[Callable[[Choice], None]] = []


@contextmanager
def use(backend: str | None) -> Iterator[None]:
    """Within the block operations run on `backend`: 'triton' or 'torch' insist, 'auto' (or None) is a free choice.

    Outside of all blocks the environment variable DENSEZOO_KERNELS decides, 'auto' by default.

    Raises:
        ValueError: `backend` is not a known one.
    """
    global _forced
    backend = 'auto' if backend is None else backend
    _check_name(backend)
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


@contextmanager
def record_choices() -> Iterator[list[Choice]]:
    """Collects the path of every call within the block, each distinct one once, in order: for a model's summary."""
    choices: list[Choice] = []

    def note(choice: Choice) -> None:
        if choice not in choices:
            choices.append(choice)

    _observers.append(note)
    try:
        yield choices
    finally:
        _observers.remove(note)


def explain(operation: Callable[..., Any], *arguments: Any, **options: Any) -> Choice:
    """The path that `operation(*arguments, **options)` would take; the arguments are checked, nothing is computed.

    Raises:
        ValueError: as the operation itself.
        TypeError: `operation` is not one of `densezoo.kernels`' dispatched ones.
    """
    found: list[Choice] = []

    def stop(choice: Choice) -> None:
        found.append(choice)
        raise _Chosen

    _observers.append(stop)
    try:
        operation(*arguments, **options)
    except _Chosen:
        return found[0]
    finally:
        _observers.remove(stop)
    raise TypeError(f'{operation} is not dispatched; pass an operation of densezoo.kernels, as window_attention')


def select(operation: str, backend: str | None, refusals: dict[str, str | None]) -> str:
    """The backend to run a call on.

    Args:
        operation: name for messages.
        backend: what the caller asked for, or None.
        refusals: for each backend, best first, why it cannot take this call (None: it can).

    Raises:
        ValueError: the backend asked for is unknown or cannot take this call.
    """
    wanted = _wanted(backend)
    if wanted == 'auto':
        chosen = _choose(refusals)
    elif exporting():
        chosen = 'torch'
    else:
        chosen = wanted
        reason = refusals.get(wanted, 'it has no such implementation')
        if reason is not None:
            raise ValueError(f"{operation} cannot run with backend='{wanted}': {reason}; use backend='torch'")
    if _observers:
        given = {name: reason for name, reason in refusals.items() if reason is not None}
        for observe in _observers:
            observe(Choice(operation, chosen, given))
    return chosen


def refuse_triton(tensors: dict[str, Tensor | None], width: int | None = None) -> str | None:
    """Why no Triton kernel can take these tensors, or None; says nothing about one operation's own limits.

    Args:
        tensors: by the name that messages call them.
        width: channels of a head, for attention.
    """
    if exporting():
        return 'exported programs hold no Triton kernels'
    if not _HAS_TRITON:
        return 'Triton is not installed (pip install triton)'
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f'{name} is {tensor.dtype}, and the kernels take float32, float16 and bfloat16'
        if interpreting():
            if tensor.device.type != 'cpu':
                return f"{name} is on {tensor.device}, and Triton's interpreter takes CPU tensors"
        elif tensor.device.type != 'cuda':
            return f'{name} is on {tensor.device}, and Triton needs a CUDA device (or TRITON_INTERPRET=1 on a CPU)'
    if width is not None and width > 128:
        return f'heads are {width} channels wide, and the kernels take up to 128'
    if interpreting() and torch.compiler.is_compiling():
        return "Triton's interpreter runs kernels one by one, not in a compiled graph"
    return None


def inferring() -> bool:
    """Whether this is eager inference, where what nobody reads again may be overwritten. Ask it before sizes, as those
    of a program under construction must not be looked at."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def exporting() -> bool:
    """Whether a program is being exported."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter."""
    return os.environ.get('TRITON_INTERPRET', '').lower() in ('1', 'true', 'yes', 'on', 'y')


def _choose(refusals: dict[str, str | None]) -> str:
    slow = ('triton',) if interpreting() else ()
    return next(name for name, reason in refusals.items() if reason is None and name not in slow)


def _wanted(backend: str | None) -> str:
    if backend is not None:
        _check_name(backend)
        return backend
    if _forced is not None:
        return _forced
    if _from_environment not in BACKENDS:
        raise ValueError(f'{VARIABLE} must be one of {", ".join(BACKENDS)}, got {_from_environment!r}')
    return _from_environment


def _check_name(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f'backend must be one of {", ".join(BACKENDS)}, got {backend=}')
