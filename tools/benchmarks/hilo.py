"""HiLo attention on one core at the paper's setting, against spatial-reduction and window attention of the same width.

A 14 x 14 map of width 384, 12 heads, window 2, alpha 0.9: 77.6M multiply-adds; spatial-reduction attention with sr 2
(strided convolution, LayerNorm) has 108.6M, window attention with window 7 123.0M. float32, evaluation mode. With
`authors`, a folder that holds the authors' hilo.py (https://github.com/ziplab/LITv2), their module with our weights.
"""

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from densezoo.backbones.layers import build_mixer
from densezoo.kernels import window_attention

from .timing import Comparison, compare

SIDE, DIM, HEADS, WINDOW, ALPHA = 14, 384, 12, 2, 0.9


class WindowAttention(nn.Module):
    """Our window attention as a layer, without position bias."""

    def __init__(self, window: int = 7):
        super().__init__()
        self.window = window
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(window_attention(self.qkv(x), self.window, heads=HEADS))


class Tokens(nn.Module):
    """The authors' module, which takes (B, N, C), on the map."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.flatten(1, 2), SIDE, SIDE).view_as(x)


def authors_module(folder: str) -> nn.Module:
    """HiLo from the authors' file.

    Raises:
        FileNotFoundError: the folder holds no hilo.py.
    """
    file = Path(folder) / 'hilo.py'
    if not file.is_file():
        raise FileNotFoundError(f'no such file: {file}; --authors needs a checkout of https://github.com/ziplab/LITv2')
    spec: Any = importlib.util.spec_from_file_location('authors_hilo', file)
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.HiLo(DIM, num_heads=HEADS, qkv_bias=True, window_size=WINDOW, alpha=ALPHA)


def run(*, repeats: int = 200, authors: str | None = None) -> list[Comparison]:
    """Forward passes of one and of 16 maps on one thread; ratio > 1 means that HiLo is faster."""
    torch.manual_seed(0)
    ours = build_mixer(dict(name='hilo', num_heads=HEADS, window_size=WINDOW, alpha=ALPHA), dim=DIM)
    peers: dict[str, nn.Module] = {
        'spatial reduction': build_mixer(dict(name='sra', num_heads=HEADS, sr_ratio=2), dim=DIM),
        'window 7': WindowAttention(),
    }
    if authors is not None:
        theirs = authors_module(authors)
        theirs.load_state_dict(ours.state_dict())
        peers["authors' HiLo"] = Tokens(theirs)
    for module in (ours, *peers.values()):
        module.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    try:
        with torch.inference_mode():
            for batch in (1, 16):
                x = torch.randn(batch, SIDE, SIDE, DIM)
                for name, peer in peers.items():
                    rows.append(
                        compare(
                            f'HiLo {batch}x{SIDE}x{SIDE}x{DIM}',
                            partial(ours, x),
                            partial(peer, x),
                            peer_name=name,
                            repeats=max(repeats // batch, 10),
                        )
                    )
    finally:
        torch.set_num_threads(threads)
    return rows
