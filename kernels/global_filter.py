"""Global filter: out = inverse DFT of (weight * DFT of x) over H and W of each channel; a circular convolution as large
as the map.

With X[k, l, c] = sum over h, w of x[h, w, c] * exp(-2 pi i (k h / H + l w / W)) for 0 <= k < H, 0 <= l <= W // 2:

    Y[k, l, c] = X[k, l, c] * (weight[k, l, c, 0] + i weight[k, l, c, 1])
    out[h, w, c] = 1 / (H W) * sum over k, l of m[l] * Re(Y[k, l, c] * exp(2 pi i (k h / H + l w / W)))

where m[l] is 1 for l = 0 and 2 l = W, else 2: the frequencies above W // 2 are conjugates. Layout (B, H, W, C); any H,
W >= 1, odd ones too. All sums are in float32.
Source: Global Filter Networks for Image Classification, arXiv 2107.00645.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import NOT_WRITTEN, select
from .fourier import cos_sin
from .precision import full_precision

# largest map, in positions, for which matrix products are faster than the FFT (measured on a CPU, 14x14)
_SMALL = 196


def global_filter(x: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """Filters each channel of a map by its own complex weights.

    The reference is two matrix products each way, whose matrices depend on H and W alone: exported programs take it,
    so neither ONNX nor TensorRT needs an FFT.

    Args:
        x: (B, H, W, C) floating point.
        weight: (H, W // 2 + 1, C, 2), real and imaginary parts; see `resample_filter`.
        backend: None chooses; 'torch' insists on the reference.

    Returns:
        (B, H, W, C) of the type of x.

    Raises:
        ValueError: a shape does not fit, or the backend asked for cannot take the call.
    """
    if x.ndim != 4:
        raise ValueError(f'x must be (B, H, W, C), got {tuple(x.shape)=}')
    _, H, W, C = x.shape
    expected = (H, W // 2 + 1, C, 2)
    if tuple(weight.shape) != expected:
        raise ValueError(f'weight must be (H, W // 2 + 1, C, 2) = {expected}, got {tuple(weight.shape)=}')
    chosen = select('global_filter', backend, {'triton': NOT_WRITTEN, 'fft': can_run_fft(x), 'torch': None})
    return (global_filter_fft if chosen == 'fft' else global_filter_reference)(x, weight)


def global_filter_reference(x: Tensor, weight: Tensor) -> Tensor:
    """The definition as matrix products: along W into frequencies, along H, the weights, and back."""
    B, H, W, C = x.shape
    L = W // 2 + 1  # frequencies along W
    cos_h, sin_h = cos_sin(H, H, H, x.device)
    cos_w, sin_w = cos_sin(L, W, W, x.device)
    # (2H, 2H): from (h, real or imaginary) to (k, real or imaginary)
    turn = torch.stack((torch.stack((cos_h, sin_h), 2), torch.stack((-sin_h, cos_h), 2)), 1).reshape(2 * H, 2 * H)
    along_w = torch.cat((cos_w, -sin_w))  # (2L, W)
    frequency = torch.arange(L, device=x.device)
    multiplicity = 2.0 - ((frequency == 0) | (2 * frequency == W)).float()
    with full_precision(x):
        spectrum = _times(along_w, x.float().reshape(B * H, W, C)).reshape(B, 2 * H, L * C)
        spectrum = _times(turn, spectrum).reshape(B, H, 2, L, C)
        (real, imaginary), (weight_real, weight_imaginary) = spectrum.unbind(2), weight.float().unbind(3)
        product = (
            real * weight_real - imaginary * weight_imaginary,
            real * weight_imaginary + imaginary * weight_real,
        )
        spectrum = torch.stack(product, 2).reshape(B, 2 * H, L * C)
        spectrum = _times(turn.T / H, spectrum).reshape(B * H, 2 * L, C)
        back = (along_w * multiplicity.repeat(2)[:, None]).T / W
        return _times(back, spectrum).reshape(B, H, W, C).to(x.dtype)


def resample_filter(weight: Tensor, height: int, width: int, mode: str = 'bicubic') -> Tensor:
    """Weights (h, l, C, 2) made for one size of map as weights (height, width // 2 + 1, C, 2) for another.

    Real and imaginary parts are interpolated between frequencies, the first and last ones kept.

    Args:
        mode: 'bilinear' or 'bicubic'.
    """
    size = (height, width // 2 + 1)
    if isinstance(height, int) and isinstance(width, int) and tuple(weight.shape[:2]) == size:
        return weight  # symbolic sizes are always interpolated: one graph for every size
    planes = weight.float().permute(3, 2, 0, 1)
    return F.interpolate(planes, size=size, mode=mode, align_corners=True).permute(2, 3, 1, 0)


def global_filter_fft(x: Tensor, weight: Tensor) -> Tensor:
    """The same by fast Fourier transforms."""
    spectrum = torch.fft.rfft2(x.float(), dim=(1, 2)) * torch.view_as_complex(weight.float().contiguous())
    return torch.fft.irfft2(spectrum, s=(x.shape[1], x.shape[2]), dim=(1, 2)).to(x.dtype)


def can_run_fft(x: Tensor) -> str | None:
    """Why fast Fourier transforms do not take this call."""
    if torch.compiler.is_exporting():
        return 'exported programs hold no FFT, which ONNX and TensorRT lack'
    height, width = x.shape[1:3]
    if isinstance(height, int) and isinstance(width, int) and height * width <= _SMALL:
        return 'on small maps matrix products are faster'
    return None


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix @ x[n] for each n; torch.matmul would ask whether to fold n away, which depends on sizes."""
    return torch.bmm(matrix.expand(x.shape[0], -1, -1), x)
