"""The operations of densezoo.kernels against what one would write without them: `densezoo benchmark kernels`.

Made for a GPU (`--device cuda`), where ours are the Triton kernels; on a CPU the references run, against the same
peers. Each peer's result is compared with ours before anything is timed. With every row goes the floor of its
forward pass, counted and not measured: bytes, each tensor read or written once, and operations (two for a multiply and
an add); and
the share of the measured copy bandwidth that the bytes in our time amount to.

Peers: roll + partition + scaled_dot_product_attention with bias and mask; the same windows through compiled
FlexAttention (on a GPU); the public Triton kernels of Flash Window Attention, for windows that are not shifted, out of
a checkout of https://github.com/zzd1992/FlashWindowAttention; HiLo's branches as two calls of attention; dense windows
and dense attention for the sparse operations; NATTEN where it is installed; timm-like modules for pooling; the matrix
of similarities for matching; gather and scatter_add for merging; torch.nn.functional for linear layers and
convolutions.
"""

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from densezoo.kernels import (
    Matching,
    block_sparse_attention,
    build_windows,
    conv2d,
    hilo_attention,
    linear,
    match_tokens,
    neighborhood_attention,
    pool_mixer,
    sparse_window_attention,
    token_merge,
    window_attention,
)
from densezoo.kernels.token_merge import best_partners

from .timing import Comparison, compare

STAGES = ((4, 1), (8, 2), (16, 4), (32, 8))  # stride, channels over those of stage 1
WIDTHS = {'tiny': 96, 'base': 128}
WINDOW, SHIFT, HEAD = 7, 3, 32
OPERATIONS = ('window', 'hilo', 'sparse', 'blocks', 'neighborhood', 'pool', 'match', 'merge', 'linear')
Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One row: what is called, with which tensors, against whom, and the floor of the forward pass."""

    name: str
    ours: Call
    peers: dict[str, Call]
    tensors: tuple[Tensor, ...]
    bytes: int
    operations: int
    same: bool = True  # whether the peers compute the same values
    trained: bool = True  # whether there is a gradient


def run(
    *,
    device: str = 'cpu',
    dtype: str = 'float32',
    batch: int = 8,
    sizes: Sequence[int] = (224, 512, 1024),
    model: str = 'tiny',
    operations: Sequence[str] = OPERATIONS,
    repeats: int = 10,
    train: bool = False,
    flash_window: str | None = None,
) -> list[Comparison]:
    """A row for each case and peer, forward, and with `train` forward and backward too.

    Raises:
        FileNotFoundError: `flash_window` holds no checkout of Flash Window Attention.
    """
    torch.manual_seed(0)
    cases = dict(CASES)
    if flash_window is not None:
        cases['window'] = partial(window_cases, flash=flash_windows(flash_window))
    cuda = device.startswith('cuda')
    bandwidth = copy_bandwidth(device)
    card = torch.cuda.get_device_name(device) if cuda else 'CPU'
    rows = []
    for operation in operations:
        for case in cases[operation](device, getattr(torch, dtype), batch, sizes, WIDTHS[model]):
            for name, peer in case.peers.items():
                if case.same:
                    check(case, name, peer)
                for backward in (False, True) if train and case.trained else (False,):
                    rows.append(measure(case, name, peer, backward, repeats, cuda, bandwidth, card))
    return rows


def measure(
    case: Case, name: str, peer: Call, backward: bool, repeats: int, cuda: bool, bandwidth: float, card: str
) -> Comparison:
    sides = [timed(side, case.tensors, backward, cuda) for side in (case.ours, peer)]
    label = f'{case.name} {"forward and backward" if backward else "forward"}'
    row = compare(label, *sides, peer_name=name, repeats=repeats)
    row = replace(row, device=card, floor_bytes=case.bytes, floor_operations=case.operations)
    return row if backward else replace(row, bandwidth_share=case.bytes / row.ours / bandwidth)


def timed(call: Call, tensors: tuple[Tensor, ...], backward: bool, cuda: bool) -> Callable[[], None]:
    def forward() -> None:
        with torch.inference_mode():
            call(*tensors)
        if cuda:
            torch.cuda.synchronize()

    def both() -> None:
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
        out = call(*leaves)
        out.backward(torch.ones_like(out))
        if cuda:
            torch.cuda.synchronize()

    return both if backward else forward


def check(case: Case, name: str, peer: Call) -> None:
    """Raises RuntimeError if a peer computes something else."""
    with torch.inference_mode():
        ours, theirs = case.ours(*case.tensors).float(), peer(*case.tensors).float()
    deviation = (ours - theirs).abs().max().item() / max(theirs.abs().max().item(), 1e-6)
    if not deviation < 0.05:
        raise RuntimeError(f'{case.name}: {name} computes something else, relative deviation {deviation:.2g}')


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a copy of 256 MB."""
    source = torch.empty(2**26, device=device)
    target = torch.empty_like(source)
    best = float('inf')
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        if device.startswith('cuda'):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def maps(batch: int, sizes: Sequence[int], width: int) -> Iterator[tuple[int, int, int]]:
    """(batch, side, channels) of Swin's stages."""
    for size in sizes:
        for stride, times in STAGES:
            yield batch, -(-size // stride), width * times


def partitioned(qkv: Tensor, heads: int, window: int, shift: int) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Rolled, padded and cut: (3, B * windows, heads, N, d), and which pairs see each other, (windows, 1, N, N)."""
    B, H, W, _ = qkv.shape
    rows, cols = -(-H // window), -(-W // window)
    Hp, Wp = rows * window, cols * window
    x = F.pad(qkv, (0, 0, 0, Wp - W, 0, Hp - H)).roll((-shift, -shift), (1, 2))
    x = x.view(B, rows, window, cols, window, 3, heads, -1).permute(5, 0, 1, 3, 6, 2, 4, 7)
    x = x.reshape(3, B * rows * cols, heads, window * window, -1)
    label = torch.zeros(Hp, Wp, device=qkv.device, dtype=torch.int32)
    label[H:], label[:, W:] = -1, -1
    label = label.roll((-shift, -shift), (0, 1))
    if shift:
        label[Hp - shift :] += 2 * (label[Hp - shift :] >= 0)
        label[:, Wp - shift :] += label[:, Wp - shift :] >= 0
    label = label.view(rows, window, cols, window).transpose(1, 2).reshape(rows * cols, -1)
    return x, (label[:, :, None] == label[:, None, :])[:, None], (B, rows, cols, H, W)


def merged(x: Tensor, window: int, shift: int, sizes: tuple[int, ...]) -> Tensor:
    B, rows, cols, H, W = sizes
    x = x.view(B, rows, cols, x.shape[1], window, window, -1).permute(0, 1, 4, 2, 5, 3, 6)
    x = x.reshape(B, rows * window, cols * window, -1).roll((shift, shift), (1, 2))
    return x[:, :H, :W].contiguous()


def rolled(qkv: Tensor, bias: Tensor, shift: int = SHIFT) -> Tensor:
    """Shifted windows as libraries compute them."""
    heads = bias.shape[0]
    (q, k, v), seen, sizes = partitioned(qkv, heads, WINDOW, shift)
    mask = bias.to(qkv.dtype).masked_fill(~seen, float('-inf')).repeat(sizes[0], 1, 1, 1)
    return merged(F.scaled_dot_product_attention(q, k, v, mask), WINDOW, shift, sizes)


def flash_windows(folder: str) -> Call:
    """Windows without shift, cut out and put back around the public kernel."""
    if not (Path(folder) / 'flash_swin_attn').is_dir():
        raise FileNotFoundError(f'flash_window must be a checkout that holds flash_swin_attn, got {folder}')
    sys.path.insert(0, str(folder))
    try:
        attention = importlib.import_module('flash_swin_attn').flash_swin_attn_func
    finally:
        sys.path.remove(str(folder))

    def call(qkv: Tensor, bias: Tensor) -> Tensor:
        (q, k, v), _, sizes = partitioned(qkv, bias.shape[0], WINDOW, 0)
        out = attention(q.contiguous(), k.contiguous(), v.contiguous(), bias.to(qkv.dtype), q.shape[-1] ** -0.5)
        return merged(out, WINDOW, 0, sizes)

    return call


def flex() -> Call:
    """The same windows through compiled FlexAttention."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def call(qkv: Tensor, bias: Tensor) -> Tensor:
        (q, k, v), seen, sizes = partitioned(qkv, bias.shape[0], WINDOW, SHIFT)
        table = bias.to(qkv.dtype)

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.where(seen[b % seen.shape[0], 0, i, j], s + table[h, i, j], float('-inf'))

        return merged(compiled(q, k, v, score_mod=score), WINDOW, SHIFT, sizes)

    return call


def window_cases(
    device: str, dtype: Any, batch: int, sizes: Sequence[int], width: int, flash: Call | None = None
) -> Iterator[Case]:
    peers: dict[str, Call] = {'roll, partition, SDPA': rolled}
    if device.startswith('cuda'):
        peers['compiled FlexAttention'] = flex()
    for B, side, C in maps(batch, sizes, width):
        heads, N = C // HEAD, WINDOW * WINDOW
        qkv = torch.randn(B, side, side, 3 * C, device=device, dtype=dtype)
        bias = torch.randn(heads, N, N, device=device)

        def ours(qkv: Tensor, bias: Tensor, shift: int = SHIFT) -> Tensor:
            return window_attention(qkv, WINDOW, shift, heads=bias.shape[0], bias=bias)

        floor = qkv.nbytes * 4 // 3 + bias.nbytes
        case = Case(f'window {B}x{side}x{side}x{C}', ours, peers, (qkv, bias), floor, 4 * B * side * side * N * C)
        yield case
        if flash is not None and side % WINDOW == 0:  # it masks neither shifted windows nor padded positions
            unshifted = f'window, no shift, {B}x{side}x{side}x{C}'
            yield replace(case, name=unshifted, ours=partial(ours, shift=0), peers={'Flash Window Attention': flash})


def hilo_cases(device: str, dtype: Any, batch: int, sizes: Sequence[int], width: int) -> Iterator[Case]:
    window = 2
    for B, side, C in maps(batch, sizes, width):
        heads = C // HEAD
        high = max(heads // 10, 1)
        counts, P = (high, heads - high), (side + 1) // 2
        qkv = torch.randn(B, side, side, 3 * high * HEAD, device=device, dtype=dtype)
        query = torch.randn(B, side, side, counts[1] * HEAD, device=device, dtype=dtype)
        pooled = torch.randn(B, P, P, 2 * counts[1] * HEAD, device=device, dtype=dtype)

        def ours(qkv: Tensor, query: Tensor, pooled: Tensor, counts: tuple[int, int] = counts) -> Tensor:
            return torch.cat(hilo_attention(qkv, query, pooled, window, heads=counts), -1)

        def calls(qkv: Tensor, query: Tensor, pooled: Tensor, counts: tuple[int, int] = counts) -> Tensor:
            (q, k, v), seen, cut = partitioned(qkv, counts[0], window, 0)
            out = F.scaled_dot_product_attention(q, k, v, seen.repeat(cut[0], 1, 1, 1))
            key, value = pooled.flatten(1, 2).unflatten(2, (2, counts[1], -1)).permute(2, 0, 3, 1, 4).unbind(0)
            low = query.flatten(1, 2).unflatten(2, (counts[1], -1)).transpose(1, 2)
            low = F.scaled_dot_product_attention(low, key, value).transpose(1, 2).reshape(query.shape)
            return torch.cat((merged(out, window, 0, cut), low), -1)

        operations = 4 * B * side * side * (window**2 * qkv.shape[3] // 3 + P * P * query.shape[3])
        floor = qkv.nbytes * 4 // 3 + 2 * query.nbytes + pooled.nbytes
        tensors, peers = (qkv, query, pooled), {'partition, two SDPA': calls}
        yield Case(f'hilo {B}x{side}x{side}x{C}', ours, peers, tensors, floor, operations)


def sparse_cases(device: str, dtype: Any, batch: int, sizes: Sequence[int], width: int) -> Iterator[Case]:
    for B, side, C in maps(batch, sizes, width):
        heads = C // HEAD
        # whole windows are occupied, a quarter of them
        cells = torch.rand(B, -(-side // WINDOW), -(-side // WINDOW), device=device) < 0.25
        cells[:, 0, 0] = True
        mask = cells.repeat_interleave(WINDOW, 1).repeat_interleave(WINDOW, 2)[:, :side, :side].contiguous()
        windows = build_windows(mask, WINDOW)
        whole = torch.randn(B, side, side, 3 * C, device=device, dtype=dtype)
        tokens = whole[mask]

        def ours(whole: Tensor, tokens: Tensor, windows: Any = windows, heads: int = heads) -> Tensor:
            q, k, v = tokens.unflatten(1, (3, heads, -1)).unbind(1)
            return sparse_window_attention(q, k, v, windows).flatten(1)

        def dense(whole: Tensor, tokens: Tensor, mask: Tensor = mask, heads: int = heads) -> Tensor:
            return window_attention(whole, WINDOW, heads=heads)[mask]

        pairs = int((windows.offsets.diff() ** 2).sum())
        name = f'sparse windows, 25%, {B}x{side}x{side}x{C}'
        peers: dict[str, Call] = {'dense windows': dense}
        yield Case(name, ours, peers, (whole, tokens), tokens.nbytes * 4 // 3, 4 * pairs * C, trained=False)


def block_cases(device: str, dtype: Any, batch: int, sizes: Sequence[int], width: int) -> Iterator[Case]:
    for size in sizes:
        N, heads = (size // 16) ** 2, width // HEAD
        q, k, v = (torch.randn(batch, heads, N, HEAD, device=device, dtype=dtype) for _ in range(3))
        n = -(-N // 64)
        for share in (0.125, 0.25, 0.5, 0.75):
            count = max(round(share * n), 1)
            mask = torch.rand(batch, heads, n, n, device=device).argsort(3) < count

            def ours(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
                return block_sparse_attention(q, k, v, mask)

            def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
                return F.scaled_dot_product_attention(q, k, v)

            name = f'blocks of 64, {share:.0%} seen, {batch}x{heads}x{N}x{HEAD}'
            operations = 4 * batch * heads * N * min(count * 64, N) * HEAD
            peers: dict[str, Call] = {'dense SDPA': dense}
            yield Case(name, ours, peers, (q, k, v, mask), 4 * q.nbytes, operations, same=False)


def neighborhood_cases(device: str, dtype: Any, batch: int, sizes: Sequence[int], width: int) -> Iterator[Case]:
    for B, side, C in maps(batch, sizes, width):
        heads = C // HEAD
        qkv = torch.randn(B, side, side, 3 * C, device=device, dtype=dtype)

        def ours(qkv: Tensor, heads: int = heads) -> Tensor:
            return neighborhood_attention(qkv, WINDOW, heads=heads)

        peers: dict[str, Call] = {}
        if importlib.util.find_spec('natten') is not None and side >= WINDOW:
            na2d = importlib.import_module('natten.functional').na2d

            def natten(qkv: Tensor, heads: int = heads, na2d: Any = na2d) -> Tensor:
                return na2d(*qkv.unflatten(3, (3, heads, -1)).unbind(3), kernel_size=WINDOW).flatten(3)

            peers['NATTEN'] = natten

        def windows(qkv: Tensor, heads: int = heads) -> Tensor:
            return window_attention(qkv, WINDOW, heads=heads)

        operations = 4 * B * side * side * WINDOW * WINDOW * C
        case = Case(f'neighborhood {B}x{side}x{side}x{C}', ours, peers, (qkv,), qkv.nbytes * 4 // 3, operations)
        yield case
        yield replace(case, peers={'our windows of that size': windows}, same=False)


def pool_cases(device: str, dtype: Any, batch: int, sizes: Sequence[int], width: int) -> Iterator[Case]:
    for B, side, C in maps(batch, sizes, width):
        x = torch.randn(B, side, side, C, device=device, dtype=dtype)
        weight, bias = torch.rand(C, device=device, dtype=dtype), torch.randn(C, device=device, dtype=dtype)

        def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return pool_mixer(x, norm=(weight, bias, 1e-5))

        def modules(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            normed = F.group_norm(x.permute(0, 3, 1, 2), 1, weight, bias, 1e-5)
            return (F.avg_pool2d(normed, 3, 1, 1, count_include_pad=False) - normed).permute(0, 2, 3, 1)

        # the norm needs a reading of its own
        yield Case(
            f'pool {B}x{side}x{side}x{C}', ours, {'modules': modules}, (x, weight, bias), 3 * x.nbytes, 14 * x.numel()
        )


def match_cases(device: str, dtype: Any, batch: int, sizes: Sequence[int], width: int) -> Iterator[Case]:
    for size in sizes:
        N = (size // 16) ** 2
        metric = torch.randn(batch, N, 64, device=device, dtype=dtype)

        def ours(metric: Tensor) -> Tensor:
            return match_tokens(metric, metric.shape[1] // 8).source

        def matrix(metric: Tensor) -> Tensor:
            return best_partners(metric, False, False)[0].argsort(-1, descending=True)[:, : metric.shape[1] // 8]

        peers: dict[str, Call] = {'matrix of similarities': matrix}
        name, operations = f'match {batch}x{N}x64', batch * N * N // 2 * 64
        yield Case(name, ours, peers, (metric,), metric.nbytes, operations, same=False, trained=False)


def merge_cases(device: str, dtype: Any, batch: int, sizes: Sequence[int], width: int) -> Iterator[Case]:
    for size in sizes:
        N, C = (size // 16) ** 2, 4 * width
        matching = match_tokens(torch.randn(batch, N, 64, device=device, dtype=dtype), N // 8)
        x = torch.randn(batch, N, C, device=device, dtype=dtype)
        sizes_of_tokens = torch.randint(1, 5, (batch, N, 1), device=device).to(dtype)

        def ours(x: Tensor, matching: Matching = matching, size: Tensor = sizes_of_tokens) -> Tensor:
            return token_merge(x, matching, size)[0]

        def scattered(x: Tensor, matching: Matching = matching, size: Tensor = sizes_of_tokens) -> Tensor:
            kept, moved = matching.kept()[..., None], matching.a[matching.source][..., None]
            target = matching.places().gather(1, moved[..., 0])[..., None]
            total = size.gather(1, kept).scatter_add(1, target, size.gather(1, moved))
            weighted, C = x * size, x.shape[2]
            added = weighted.gather(1, moved.expand(-1, -1, C))
            return weighted.gather(1, kept.expand(-1, -1, C)).scatter_add(1, target.expand(-1, -1, C), added) / total

        floor, operations = x.nbytes + x.nbytes * 7 // 8, 3 * batch * (N // 8) * C
        yield Case(f'merge {batch}x{N}x{C}', ours, {'gather, scatter_add': scattered}, (x,), floor, operations)


def linear_cases(device: str, dtype: Any, batch: int, sizes: Sequence[int], width: int) -> Iterator[Case]:
    """The widening layer of an MLP, and the depthwise convolution of one with its GELU."""
    for B, side, C in maps(batch, sizes, width):
        x, tokens = torch.randn(B, side, side, C, device=device, dtype=dtype), B * side * side
        weight = torch.randn(4 * C, C, device=device, dtype=dtype) / C**0.5
        bias = torch.zeros(4 * C, device=device, dtype=dtype)
        floor = x.nbytes * 5 + weight.nbytes
        name, operations = f'{B}x{side}x{side}x{C}', 8 * tokens * C * C
        yield Case(f'linear {name}', linear, {"PyTorch's": F.linear}, (x, weight, bias), floor, operations)
        taps = torch.randn(C, 1, 3, 3, device=device, dtype=dtype) / 3

        def convolved(x: Tensor, taps: Tensor) -> Tensor:
            return F.gelu(F.conv2d(x, taps, None, 1, 1, 1, len(taps)))

        ours, peers = partial(conv2d, padding=(1, 1), groups=C, act='gelu'), {'one by one': convolved}
        yield Case(f'conv, GELU {name}', ours, peers, (x.permute(0, 3, 1, 2), taps), 2 * x.nbytes, 18 * tokens * C)


CASES: dict[str, Callable[..., Iterator[Case]]] = {
    'window': window_cases,
    'hilo': hilo_cases,
    'sparse': sparse_cases,
    'blocks': block_cases,
    'neighborhood': neighborhood_cases,
    'pool': pool_cases,
    'match': match_cases,
    'merge': merge_cases,
    'linear': linear_cases,
}
