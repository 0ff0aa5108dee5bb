"""Shifted-window attention with its linear layers against timm's, at the shapes of Swin-T: eval, float32.

Both sides start from the same normed map and end after the output projection, with the same weights. timm's rolls the
map, pads it, cuts it into windows, attends under masks made beforehand, and goes back the same way. The linear layers
alone, on the unpadded map, are measured too: no kernel for windows can make those faster.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn

from densezoo.backbones.swin import WindowAttention

from .timing import Comparison, compare

SIZES = ((224, 224), (800, 1333))
STAGES = ((4, 96), (8, 192), (16, 384), (32, 768))  # stride, channels
WINDOW, SHIFT, HEAD_DIM = 7, 3, 32


def run(
    *,
    batch: int = 8,
    sizes: Sequence[tuple[int, int]] = SIZES,
    stages: Sequence[int] = (1, 2, 3, 4),
    repeats: int = 8,
    device: str = 'cpu',
) -> list[Comparison]:
    """A row for each size of image, stage and kind of block: unshifted and shifted."""
    synchronize = torch.cuda.synchronize if device.startswith('cuda') else lambda: None
    rows = []
    for height, width in sizes:
        for stage in stages:
            stride, dim = STAGES[stage - 1]
            grid = -(-height // stride), -(-width // stride)
            for shift in (0, SHIFT):
                ours, peer = pair(dim, grid, shift)
                ours, peer = ours.to(device), peer.to(device)
                x = torch.randn(batch, *grid, dim, device=device)

                def call(attend: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor = x) -> None:
                    with torch.inference_mode():
                        attend(x)
                    synchronize()

                def call_ours(ours: nn.Module = ours) -> None:
                    call(ours)

                def call_peer(peer: SwinTransformerBlock = peer) -> None:
                    call(peer._attn)

                def call_linear(ours: WindowAttention = ours, dim: int = dim, x: torch.Tensor = x) -> None:
                    call(lambda x: ours.proj(ours.qkv(x)[..., :dim]), x)

                name = f'{"shifted" if shift else "windows"} {batch}x{grid[0]}x{grid[1]}x{dim}'
                row = compare(name, call_ours, call_peer, peer_name='timm', repeats=repeats)
                shared = compare(name, call_linear, call_linear, peer_name='', repeats=repeats, warmup=1).ours
                row = replace(row, shared=shared)
                if device == 'cpu':
                    row = replace(row, ours_bytes=peak(call_ours), peer_bytes=peak(call_peer))
                rows.append(row)
    return rows


def pair(dim: int, grid: tuple[int, int], shift: int) -> tuple[WindowAttention, SwinTransformerBlock]:
    """Our mixer and timm's block with the same weights."""
    heads = dim // HEAD_DIM
    ours = WindowAttention(dim=dim, num_heads=heads, window_size=WINDOW, shift=shift).eval()
    block = SwinTransformerBlock(
        dim, grid, num_heads=heads, window_size=WINDOW, shift_size=shift, always_partition=True
    ).eval()
    theirs = block.attn.state_dict()
    theirs['position_bias.table'] = theirs.pop('relative_position_bias_table')
    ours.load_state_dict(theirs)
    return ours, block


def peak(call: Callable[[], None]) -> int:
    """Bytes of tensors that a call holds at most, beyond those that exist before it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        call()
    held = most = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == '[memory]']  # type: ignore[union-attr]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
