"""RoIAlign on a pyramid (He et al. 2017; sampling ratio 2, no half-pixel shift, as torchvision's detectors have it).

Each value of a region's P x P cut is the mean of 2 x 2 bilinear samples, so the cut is linear in the map and separable:
    out[r, c, p, q] = sum_yx Y[r, p, y] X[r, q, x] map[c, y, x].
torchvision's CPU kernel scatters its gradient value by value, which took half of Mask R-CNN's training time; on small
maps two matrix products are several times faster and give the same numbers. Elsewhere torchvision's kernel is used.

R regions, C channels, P side of the cut, h w size of a map.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from ..kernels.precision import full_precision
from .pyramid import Size

SMALL_MAP = 48 * 48  # pixels of a map up to which matrix products beat torchvision's CPU kernel


class RoIAlign(nn.Module):
    """Cuts boxes out of the map whose stride suits their size; called by torchvision's RoIHeads.

    Args:
        strides: of the maps, finest first.
        side: P.
        canonical_scale: a box of so many pixels is cut from stride 16, see `levels_of`.
    """

    def __init__(self, *, strides: Sequence[int], side: int, canonical_scale: float):
        super().__init__()
        self.strides, self.side, self.canonical_scale = list(strides), side, canonical_scale

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], image_shapes: Sequence[Size]) -> Tensor:
        """Maps (B, C, h, w), boxes (n, 4) of each picture in pixels -> (R, C, P, P); image_shapes plays no part."""
        merged = torch.cat(boxes)
        picture = torch.arange(len(boxes), device=merged.device).repeat_interleave(
            torch.tensor([len(b) for b in boxes], device=merged.device)
        )
        levels = levels_of(merged, self.strides, self.canonical_scale)
        order, parts = [], []
        for level, (stride, x) in enumerate(zip(self.strides, maps.values())):
            index = (levels == level).nonzero()[:, 0]
            if len(index):
                small = x.device.type == 'cpu' and x.shape[-2] * x.shape[-1] <= SMALL_MAP
                cut = cut_by_matrices if small else cut_by_kernel
                order.append(index)
                parts.append(cut(x, merged[index] / stride, picture[index], self.side))
        if not parts:
            x = next(iter(maps.values()))
            return x.new_zeros(0, x.shape[1], self.side, self.side)
        return torch.cat(parts)[torch.cat(order).argsort()]

    def cut_equal(self, maps: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """The same for equally many boxes of each picture, in operations whose shapes are known beforehand.

        Maps (B, C, h, w), boxes (B, R, 4) in pixels -> (B * R, C, P, P). The maps become one canvas, one below the
        other, so that a single grid sample reads each box from its own.
        """
        widest = maps[0].shape[-1]
        canvas = torch.cat([F.pad(x, (0, widest - x.shape[-1])) for x in maps], 2)
        level = levels_of(boxes, self.strides, self.canonical_scale)  # (B, R)
        stride = boxes.new_tensor(self.strides)[level]
        height, width, top = (torch.zeros_like(stride) for _ in range(3))
        above = 0
        for i, x in enumerate(maps):
            here = (level == i).to(boxes.dtype)
            height, width, top = height + here * x.shape[-2], width + here * x.shape[-1], top + here * above
            above = above + x.shape[-2]
        cells = boxes / stride[..., None]
        y, row_inside = sampled_positions(cells[..., 1], cells[..., 3], self.side, height)  # (B, R, 2 P)
        x, column_inside = sampled_positions(cells[..., 0], cells[..., 2], self.side, width)
        y = (y + top[..., None]) * (2 / (canvas.shape[-2] - 1)) - 1
        x = x * (2 / max(canvas.shape[-1] - 1, 1)) - 1
        batch, count, samples = y.shape
        grid = torch.stack(
            [x[:, :, None, :].expand(-1, -1, samples, -1), y[:, :, :, None].expand(-1, -1, -1, samples)], -1
        )
        cut = F.grid_sample(canvas, grid.flatten(1, 2), padding_mode='border', align_corners=True)
        cut = cut.view(batch, -1, count, samples, samples)
        cut = cut * (row_inside[:, :, :, None] * column_inside[:, :, None, :])[:, None]
        cut = cut.view(batch, -1, count, self.side, 2, self.side, 2).mean((4, 6))  # (B, C, R, P, P)
        return cut.transpose(1, 2).flatten(0, 1)


def levels_of(boxes: Tensor, strides: Sequence[int], canonical_scale: float = 224.0) -> Tensor:
    """(...) index of each box (..., 4)'s map, of stride 2^floor(4 + log2(sqrt(area) / canonical_scale)), eq. 1 of FPN.

    Where there is no such stride, the next finer one, or else the finest.
    """
    sides = (boxes[..., 2:] - boxes[..., :2]).prod(-1).clamp(min=1e-12).sqrt()
    wanted = torch.floor(4 + torch.log2(sides / canonical_scale) + 1e-6)
    borders = torch.log2(torch.tensor(strides[1:], device=boxes.device, dtype=torch.float32))
    return (wanted[..., None] >= borders).sum(-1)


def cut_by_kernel(x: Tensor, boxes: Tensor, picture: Tensor, side: int) -> Tensor:
    """torchvision's kernel. x (B, C, h, w); boxes (R, 4) in cells of x; picture (R,) -> (R, C, P, P)."""
    return roi_align(x, torch.cat([picture[:, None].to(boxes), boxes], 1), side, sampling_ratio=2)


def cut_by_matrices(x: Tensor, boxes: Tensor, picture: Tensor, side: int) -> Tensor:
    """The same by two matrix products per picture; gradients flow to x alone."""
    with full_precision(x):
        rows = sampling_matrix(boxes[:, 1], boxes[:, 3], side, x.shape[-2])  # (R, P, h)
        columns = sampling_matrix(boxes[:, 0], boxes[:, 2], side, x.shape[-1])  # (R, P, w)
        cuts = []
        for i, count in enumerate(torch.bincount(picture, minlength=len(x)).tolist()):  # `picture` rises
            if not count:
                continue
            (row, rows), (column, columns) = rows.tensor_split([count]), columns.tensor_split([count])
            pixels = x[i].permute(1, 2, 0)  # (h, w, C)
            lines = row.reshape(-1, row.shape[2]) @ pixels.reshape(len(pixels), -1)  # (R_i * P, w * C)
            cuts.append(column[:, None] @ lines.view(count, side, x.shape[-1], -1))  # (R_i, P, P, C)
        return torch.cat(cuts).permute(0, 3, 1, 2)


def sampling_matrix(start: Tensor, stop: Tensor, side: int, length: int) -> Tensor:
    """(R, P, length) weights of a map's rows (or columns) in the P bins from start to stop (at least 1 cell)."""
    position, inside = sampled_positions(start, stop, side, start.new_full(start.shape, length))
    cells = torch.arange(length, device=start.device)
    weights = (1 - (position[..., None] - cells).abs()).clamp(min=0) * inside[..., None]
    return weights.view(len(start), side, 2, length).mean(2)


def sampled_positions(start: Tensor, stop: Tensor, side: int, length: Tensor) -> tuple[Tensor, Tensor]:
    """Two positions in each of P bins from start to stop (at least 1 cell) along a map of `length` cells.

    start, stop, length (...) -> positions (..., 2 P) moved into the map, and 1 where they count: no more than one cell
    outside the map.
    """
    samples = (torch.arange(2 * side, device=start.device) + 0.5) / (2 * side)
    position = start[..., None] + (stop - start).clamp(min=1)[..., None] * samples
    length = length[..., None]
    inside = (position >= -1) & (position <= length)
    return torch.minimum(position.clamp(min=0), length - 1), inside.to(start.dtype)
