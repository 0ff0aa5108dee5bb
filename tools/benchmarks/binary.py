"""Packed binary and shift layers against torch's float32 linear, one core: 768 inputs, 3072 outputs.

Per row: the times of a call, the bytes of the weights, and where our time goes: unpacking the weights, the matrix
product with them unpacked before, and the rest (signs of the input, scales, biases).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from densezoo.kernels import binary_linear, pack_bits, pack_shifts, shift_linear, unpack_shifts, unpack_signs

from .timing import compare

INPUTS, OUTPUTS = 768, 3072


@dataclass(frozen=True)
class Line:
    """Seconds of a call of both sides and of the parts of ours, bytes of the weights; ratio > 1: ours is faster."""

    name: str
    ours: float
    peer: float
    unpacking: float
    product: float
    ours_bytes: int
    peer_bytes: int
    peer_name: str = 'float32'

    def row(self) -> dict[str, Any]:
        return {**asdict(self), 'ratio': self.peer / self.ours, 'memory': self.peer_bytes / self.ours_bytes}


def run(*, tokens: Sequence[int] = (1, 196), repeats: int = 50) -> list[Line]:
    """A line for each layer and number of rows of the input."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            return [line for count in tokens for line in _lines(count, repeats)]
    finally:
        torch.set_num_threads(threads)


def _lines(tokens: int, repeats: int) -> list[Line]:
    weight, bias = torch.randn(OUTPUTS, INPUTS), torch.randn(OUTPUTS)
    scale, x = weight.abs().mean(1), torch.randn(tokens, INPUTS)
    bits = pack_bits(weight > 0)
    depth, sign = (torch.randint(low, high, weight.shape) for low, high in ((0, 15), (-1, 2)))
    codes = pack_shifts(depth, sign)
    signs, rows = unpack_signs(bits, INPUTS, torch.int8), x.sign().to(torch.int8)
    powers, floats = unpack_shifts(codes, INPUTS, torch.float32), signs.float()
    # name -> our layer, its unpacking, its product, the packed weights
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any], torch.Tensor]] = {
        'binary': (
            partial(binary_linear, x, bits, scale, bias),
            partial(unpack_signs, bits, INPUTS, torch.int8),
            partial(torch._int_mm, rows, signs.t()),
            bits,
        ),
        'binary, float inputs': (
            partial(binary_linear, x, bits, scale, bias, input_signs=False),
            partial(unpack_signs, bits, INPUTS, torch.float32),
            partial(F.linear, x, floats),
            bits,
        ),
        'shift': (
            partial(shift_linear, x, codes, bias),
            partial(unpack_shifts, codes, INPUTS, torch.float32),
            partial(F.linear, x, powers),
            codes,
        ),
    }
    lines = []
    for name, (ours, unpacking, product, packed) in calls.items():
        whole = compare(name, ours, partial(F.linear, x, weight, bias), peer_name='float32', repeats=repeats)
        parts = compare(name, unpacking, product, peer_name='', repeats=repeats)
        label = f'{name} {tokens}x{INPUTS}x{OUTPUTS}'
        lines.append(
            Line(label, whole.ours, whole.peer, parts.ours, parts.peer, 4 * packed.numel(), 4 * weight.numel())
        )
    return lines


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table; times in milliseconds, of weights the share of float32's bytes."""
    lines = ['| what | ours, ms | float32, ms | ratio | unpacking | product | rest | weights |']
    lines.append('|---|---:|---:|---:|---:|---:|---:|---:|')
    for row in rows:
        rest = row['ours'] - row['unpacking'] - row['product']
        times = [row['ours'], row['peer']], [row['unpacking'], row['product'], rest]
        first, parts = (' | '.join(f'{1e3 * t:.2f}' for t in group) for group in times)
        lines.append(f'| {row["name"]} | {first} | {row["ratio"]:.2f} | {parts} | 1/{row["memory"]:.1f} |')
    return '\n'.join(lines)
