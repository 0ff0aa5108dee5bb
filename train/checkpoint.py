"""Checkpoints that survive kill -9 and cannot execute code.

Writing: to a temporary file in the same folder, fsync, rename. The old file is intact until the new one is complete.
Reading: `torch.load(weights_only=True)`, always; what is saved therefore holds tensors, plain numbers, text and
containers, nothing else.
"""

import numbers
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

_DROP = object()


def plain(value: Any) -> Any:
    """A copy of nested containers with tensors on the CPU and numpy numbers as Python numbers; the rest is dropped."""
    if value is None or isinstance(value, bool | str | bytes):
        return value
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Mapping):
        pairs = ((plain(key), plain(item)) for key, item in value.items())
        return {key: item for key, item in pairs if key is not _DROP and item is not _DROP}
    if isinstance(value, list | tuple):
        items = [plain(item) for item in value]
        return type(value)(items) if type(value) in (list, tuple) else tuple(items)
    return _DROP


def atomic_write(path: str | Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old content or the new, never a mixture."""
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.tmp')
    with open(temporary, 'wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Save `plain(checkpoint)` atomically."""
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.tmp')
    with open(temporary, 'wb') as file:
        torch.save(plain(checkpoint), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def load_checkpoint(path: str | Path, map_location: Any = 'cpu') -> dict[str, Any]:
    """Load a checkpoint file without executing any code in it.

    Returns: a dict with at least 'state_dict' (a bare state dict is wrapped into one).
    Raises: FileNotFoundError; ValueError naming the file and the reason (not a checkpoint, foreign classes).
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'checkpoint not found: {path}')
    try:
        loaded = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        lines = str(error).splitlines()
        reason = next((line.strip() for line in lines if 'GLOBAL' in line), lines[0] if lines else 'no reason given')
        raise ValueError(
            f'{path} is refused: it holds more than tensors and plain values, loading it could execute code ({reason})'
        ) from None
    except Exception as error:  # whatever the unpickler trips over in a file that is none
        reason = (str(error).splitlines() or ['the file is empty or cut off'])[0]
        raise ValueError(f'{path} is not a readable checkpoint: {reason}') from None
    if not isinstance(loaded, dict):
        raise ValueError(f'{path} is not a checkpoint: it holds a {type(loaded).__name__}, not a dict')
    if 'state_dict' not in loaded:
        loaded = {'state_dict': loaded, 'meta': {}}
    return loaded


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable (POSIX; other systems have no folder descriptors)."""
    if os.name == 'posix':
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
