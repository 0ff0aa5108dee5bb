"""Contrastive denoising queries (DN-DETR, Li et al. 2022, arXiv:2203.01305; DINO, Zhang et al. 2022, arXiv:2203.03605).

While training, groups of queries start from the objects with noise, half of each group as objects to be restored, half
as near misses to be rejected; they are matched by construction. Written from the papers; the noise is that of RT-DETR's
authors' code (lyuwenyu/RT-DETR, Apache-2.0).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_convert

from .set_prediction import Objects

# B batch, M objects of the fullest picture, G groups, D = 2 M G queries


class Denoising(NamedTuple):
    """labels (B, D), K where a query stands for nothing; boxes (B, D, 4); matched (B, D), the object or -1; groups."""

    labels: Tensor
    boxes: Tensor
    matched: Tensor
    groups: int

    def apart(self, queries: int) -> Tensor:
        """(D + Q, D + Q) bool, True where one query (row) must not see another: groups see themselves and the Q
        ordinary queries, which see no group."""
        count = self.labels.shape[1]
        group = torch.arange(count + queries, device=self.labels.device) // (count // self.groups)
        group = group.clamp(max=self.groups)  # ordinary queries are the last
        return (group[:, None] != group) & (group < self.groups)


def denoising_queries(
    truth: Objects, num_classes: int, *, queries: int, label_noise: float, box_noise: float
) -> Denoising | None:
    """Queries made from the objects of a batch, None where there is no object.

    Args:
        truth: the objects.
        num_classes: K.
        queries: about so many objects to be restored in each picture: M times the number of groups, at least one group.
        label_noise: probability, halved, that a label is drawn anew.
        box_noise: corners move by up to this many half sides, near misses by once to twice as much.
    """
    most = max(truth.counts, default=0)
    if not most:
        return None
    groups = max(queries // most, 1)
    batch, device = len(truth.counts), truth.labels.device
    column = torch.arange(2 * most * groups, device=device)
    near_miss, index = column // most % 2 == 1, column % most
    real = index < torch.tensor(truth.counts, device=device)[:, None]  # (B, D)

    labels = truth.labels[:, index]
    drawn = torch.rand(labels.shape, device=device) < label_noise * 0.5
    labels = torch.where(drawn, torch.randint(0, num_classes, labels.shape, device=device), labels)

    boxes = truth.boxes[:, index]
    half = boxes[..., 2:].repeat(1, 1, 2) * 0.5
    sign = torch.randint(0, 2, boxes.shape, device=device) * 2 - 1
    part = torch.rand(boxes.shape, device=device) + near_miss[:, None]
    corners = (box_convert(boxes, 'cxcywh', 'xyxy') + sign * part * half * box_noise).clamp(0, 1)
    boxes = box_convert(corners, 'xyxy', 'cxcywh')
    return Denoising(
        torch.where(real, labels, num_classes),
        torch.where(real[..., None], boxes, 0.0),
        torch.where(real & ~near_miss, index.expand(batch, -1), -1),
        groups,
    )
