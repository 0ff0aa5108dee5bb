"""Long convolution: a filter per channel as large as the map and beyond, zeros outside the map.

    out[h, w, c] = sum over i, j of x[i, j, c] * filters[h - i + H - 1, w - j + W - 1, c]

for 0 <= i < H, 0 <= j < W: filters holds one value for each offset, from 1 - H to H - 1 and from 1 - W to W - 1.
Layout: x (B, H, W, C), filters (2H - 1, 2W - 1, C); any H, W >= 1. All sums are in float32.
Computed as a circular convolution on (2H, 2W), where nothing that is kept wraps around.
Source: Hyena Hierarchy, arXiv 2302.10866; in two dimensions: arXiv 2309.13600.
"""

import torch
from torch import Tensor

from .dispatch import NOT_WRITTEN, select
from .fourier import cos_sin
from .precision import full_precision


def long_convolution(x: Tensor, filters: Tensor, *, backend: str | None = None) -> Tensor:
    """Convolves each channel of a map with its own filter, which covers every offset between two positions.

    The reference is two matrix products each way, whose matrices depend on H and W alone: exported programs take it,
    so neither ONNX nor TensorRT needs an FFT.

    Args:
        x: (B, H, W, C) floating point.
        filters: (2H - 1, 2W - 1, C), in the middle the factor of the position itself.
        backend: None chooses; 'torch' insists on the reference.

    Returns:
        (B, H, W, C) of the type of x.

    Raises:
        ValueError: a shape does not fit, or the backend asked for cannot take the call.
    """
    if x.ndim != 4:
        raise ValueError(f'x must be (B, H, W, C), got {tuple(x.shape)=}')
    _, H, W, C = x.shape
    expected = (2 * H - 1, 2 * W - 1, C)
    if tuple(filters.shape) != expected:
        raise ValueError(f'filters must be (2H - 1, 2W - 1, C) = {expected}, got {tuple(filters.shape)=}')
    chosen = select('long_convolution', backend, {'triton': NOT_WRITTEN, 'fft': can_run_fft(x), 'torch': None})
    return (long_convolution_fft if chosen == 'fft' else long_convolution_reference)(x, filters)


def long_convolution_reference(x: Tensor, filters: Tensor) -> Tensor:
    """The definition as matrix products: x and filters into 2H x (W + 1) frequencies, their product, and back."""
    B, H, W, C = x.shape
    P, L = 2 * H, W + 1  # frequencies
    cos_h, sin_h = cos_sin(P, P, P, x.device)
    cos_w, sin_w = cos_sin(L, 2 * W, 2 * W, x.device)
    # (2P, 2P): from (h, real or imaginary) to (k, real or imaginary); (2L, 2W): from w to (real or imaginary, l)
    turn = torch.stack((torch.stack((cos_h, sin_h), 2), torch.stack((-sin_h, cos_h), 2)), 1).reshape(2 * P, 2 * P)
    along_w = torch.cat((cos_w, -sin_w))
    frequency = torch.arange(L, device=x.device)
    multiplicity = 2.0 - ((frequency == 0) | (frequency == W)).float()  # those above W are conjugates
    with full_precision(x):
        real, imaginary = _spectrum(x.float(), turn, along_w)
        filter_real, filter_imaginary = _spectrum(filters.float()[None], turn, along_w)
        product = (
            real * filter_real - imaginary * filter_imaginary,
            real * filter_imaginary + imaginary * filter_real,
        )
        # rows H - 1 to 2H - 2 of the convolution are the map's
        back_h = turn.T.narrow(0, 2 * (H - 1), 2 * H) / P
        back_w = (along_w * multiplicity.repeat(2)[:, None]).T.narrow(0, W - 1, W) / (2 * W)
        out = torch.matmul(back_h, torch.stack(product, 2).reshape(B, 2 * P, L * C)).reshape(B * H, 2 * L, C)
        return torch.matmul(back_w, out).reshape(B, H, W, C).to(x.dtype)


def long_convolution_fft(x: Tensor, filters: Tensor) -> Tensor:
    """The same by fast Fourier transforms."""
    _, H, W, _ = x.shape
    size = (2 * H, 2 * W)
    spectrum = torch.fft.rfft2(x.float(), s=size, dim=(1, 2)) * torch.fft.rfft2(filters.float(), s=size, dim=(0, 1))
    out = torch.fft.irfft2(spectrum, s=size, dim=(1, 2))
    return out[:, H - 1 : 2 * H - 1, W - 1 : 2 * W - 1].to(x.dtype, memory_format=torch.contiguous_format, copy=True)


def can_run_fft(x: Tensor) -> str | None:
    """Why fast Fourier transforms do not take this call."""
    return 'exported programs hold no FFT, which ONNX and TensorRT lack' if torch.compiler.is_exporting() else None


def _spectrum(x: Tensor, turn: Tensor, along_w: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part, (B, P, L, C) each, of (B, rows, columns, C), as many of them as there are."""
    B, rows, columns, C = x.shape
    P, L = turn.shape[0] // 2, along_w.shape[0] // 2
    x = torch.matmul(along_w.narrow(1, 0, columns), x.reshape(B * rows, columns, C)).reshape(B, 2 * rows, L * C)
    real, imaginary = torch.matmul(turn.narrow(1, 0, 2 * rows), x).reshape(B, P, 2, L, C).unbind(2)
    return real, imaginary
