"""Queries that start from cells of a map: where the picture seems to hold an object, there is a query that knows it.

Learnt queries come to stand for classes, and two objects of one class side by side become one segment. Seeds are cells
of high class probability, local maxima first (instance activation-guided queries, He et al. 2023, FastInst,
arXiv:2303.08594); they carry their cell's position, and their masks fade with the distance from it, at a rate that each
query says (the spatial prior of Gao et al. 2021, SMCA, arXiv:2101.07448): a rate of 0 covers the whole picture.
Differs from FastInst: seeds come beside learnt queries, and learn by the set's losses alone, as the first prediction.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .detection import pick

# B batch, G seeds, C width, K classes, h w cells of the map, H W those of masks


class Seeds(NamedTuple):
    """query: (B, G, C).  place: (B, G, C), their positions.  away: squared distances of mask rows (B, G, H) and mask
    columns (B, G, W), in cells of the map that the seeds are from."""

    query: Tensor
    place: Tensor
    away: tuple[Tensor, Tensor]


class SeedQueries(nn.Module):
    """Chooses cells of a map as queries, and keeps their masks near them.

    Args:
        channels: C.
        number: G; a map with fewer cells gives as many as it has.
        classes: whose probability makes a cell a seed.
    """

    def __init__(self, *, channels: int, number: int, classes: Sequence[int]):
        super().__init__()
        self.number, self.classes = number, list(classes)
        self.proj = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.rate = nn.Linear(channels, 1)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.rate.weight)
        nn.init.constant_(self.rate.bias, -0.4)  # a rate of 0.5: the odds fall to 0.6 one cell away, to 0.1 two

    def forward(
        self,
        cells: Tensor,
        position: Tensor,
        size: Sequence[int],
        classify: Callable[[Tensor], Tensor],
        told: Tensor | None = None,
    ) -> Seeds:
        """The seeds of a map.

        Args:
            cells: (B, C, h, w).
            position: (1, h w, C), of the cells.
            size: of the masks.
            classify: queries (B, N, C) -> logits (B, N, K + 1), no object last.
            told: (B, 1, C), added to every seed: the task.
        """
        B, _, h, w = cells.shape
        query = self.norm(self.proj(cells.flatten(2).transpose(1, 2)))
        if told is not None:
            query = query + told
        with torch.no_grad():
            score = classify(query).softmax(-1)[..., self.classes].amax(-1).view(B, 1, h, w)
            peak = score >= F.max_pool2d(score, 3, stride=1, padding=1)
            index = (score + peak.to(score.dtype)).flatten(1).topk(min(self.number, h * w), 1).indices
        centre = torch.stack([index // w, index % w], -1).to(query.dtype)
        away = []
        for axis, (length, count) in enumerate(zip(size, (h, w))):
            line = (torch.arange(length, device=cells.device) + 0.5) * (count / length) - 0.5
            away.append((line.to(query.dtype) - centre[..., axis, None]).square())
        place = pick(position.to(query.dtype).expand(B, -1, -1), index)
        return Seeds(pick(query, index), place, (away[0], away[1]))

    def keep_near(self, masks: Tensor, query: Tensor, seeds: Seeds) -> Tensor:
        """Logits of masks (B, Q + G, H, W), those of seeds less their rate times the squared distance.

        query: (B, Q + G, C), all of them now; the seeds are the last G.
        """
        count = seeds.query.shape[1]
        rate = F.softplus(self.rate(query[:, -count:]))
        rows, columns = (rate * away for away in seeds.away)
        near = masks[:, -count:] - rows[..., None] - columns[:, :, None]
        return torch.cat([masks[:, :-count], near], 1)
