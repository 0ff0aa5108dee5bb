"""Average pooling to a fixed number of bins that exports with any size, as products with a matrix per axis.

Bin i of n averages the rows floor(i H / n) to ceil((i + 1) H / n) - 1, and columns alike, as in
torch.nn.functional.adaptive_avg_pool2d. What torch decomposes that into indexes by the sizes that were traced: at other
sizes the graph has other values, or none.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def average_pool(x: Tensor, bins: int) -> Tensor:
    """Averages of a map (B, C, H, W) in `bins` x `bins` parts that may overlap, (B, C, bins, bins)."""
    if bins == 1:
        return x.mean((2, 3), keepdim=True)
    # a file of one size that the bins divide holds a plain AveragePool
    even = all(isinstance(side, int) and side % bins == 0 for side in x.shape[2:])
    if even or not torch.compiler.is_exporting():
        return F.adaptive_avg_pool2d(x, bins)
    return average_pool_matrices(x, bins)


def average_pool_matrices(x: Tensor, bins: int) -> Tensor:
    """The same as two products."""
    rows, columns = (_shares(side, bins, x) for side in x.shape[2:])
    return rows @ x @ columns.t()


def _shares(size: int, bins: int, x: Tensor) -> Tensor:
    """(bins, size): 1 / count at the positions of a bin, else 0."""
    edges = torch.arange(bins + 1, device=x.device) * size
    position = torch.arange(size, device=x.device)
    start, stop = edges[:-1, None] // bins, (edges[1:, None] + bins - 1) // bins
    inside = ((position >= start) & (position < stop)).to(x.dtype)
    return inside / inside.sum(1, keepdim=True)
