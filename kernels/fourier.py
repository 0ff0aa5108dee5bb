"""What the operations on frequencies share: the tables of a discrete Fourier transform."""

import math

import torch
from torch import Tensor


def cos_sin(frequencies: int, positions: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi k n / size, (frequencies, positions); k n is reduced in integers, so large ones are exact."""
    k, n = torch.arange(frequencies, device=device), torch.arange(positions, device=device)
    whole = torch.full((), size, device=device)  # ONNX has no remainder by a symbolic number
    angle = (k[:, None] * n % whole).float() * (2 * math.pi) / size
    return angle.cos(), angle.sin()
