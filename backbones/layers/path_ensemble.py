"""A plain backbone as an ensemble of its residual paths, weighed or pruned. Revisiting Vision Transformer from the View
of Path Ensemble, arXiv 2308.06548.

With X_0 the embedded tokens and f_1, f_2, ... the branches (attention and MLP in turn), X_k = X_(k-1) + f_k(X_(k-1)),
so that the last X is the sum of X_0 and of what every branch adds. Here the classifier and the pyramid read

    sum over the kept paths k of scale_k * path_k,    path_0 = X_0,  path_k = X_k - X_(k-1),

while branches go on reading X: a pruned path still feeds the longer ones. This is our reading of the abstract; the full
text and code of the authors were not at hand, and nothing is compared with their figures.
"""

# B batch, N tokens, C channels
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PathEnsemble(nn.Module):
    """The weighted sum above, with a learnable scale per path and channel (EnsembleScale).

    Args:
        depth: blocks. Path 0 is the embedding, 2 b + 1 the attention and 2 b + 2 the MLP of block b.
        dim: channels.
        pruned: paths that are left out (path pruning).
        init: start value of the scales; None has none, which is pruning alone.

    Raises:
        ValueError: a path does not exist, or the last one, without which its branch would compute nothing, is pruned.
    """

    def __init__(self, *, depth: int, dim: int, pruned: Sequence[int] = (), init: float | None = 1.0):
        super().__init__()
        last = 2 * depth
        if any(not 0 <= path < last for path in pruned):
            raise ValueError(f'pruned paths must be numbers from 0 to {last - 1}, got {tuple(pruned)}')
        self.kept = tuple(path for path in range(last + 1) if path not in pruned)
        self.scale = nn.Parameter(torch.full((len(self.kept), dim), float(init))) if init is not None else None

    def add(self, total: Tensor | None, path: int, value: Tensor) -> Tensor | None:
        """The sum so far (None before the first kept path) with the path's value (B, N, C) added, if it is kept."""
        if path not in self.kept:
            return total
        if self.scale is None:
            return value if total is None else total + value
        scale = self.scale[self.kept.index(path)]
        return value * scale if total is None else torch.addcmul(total, value, scale)

    def extra_repr(self) -> str:
        return f'kept={self.kept}'
