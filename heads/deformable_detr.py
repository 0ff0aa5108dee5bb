"""Deformable DETR (Zhu et al. 2020, arXiv:2010.04159): attention to a few points of several maps; with box refinement
and two stages.

Written from the paper; parameters are called as in the authors' code (fundamentalvision/Deformable-DETR, Apache-2.0)
without its prefix `transformer.`; `convert` takes the authors' names and MMDetection's. Loss: focal, L1 and GIoU of
matched pairs, of every layer; with two stages also of the encoder's proposals, as one class. Targets: see detr.py.
"""

import copy
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import detection as det
from .detr import Stack, check_width
from .pyramid import FeatureInfo, Size, norm_layer, positive
from .renaming import rename
from .set_prediction import SetDetector, by_layer, inverse_sigmoid
from .transformer import (
    MLP,
    DeformableDecoderLayer,
    DeformableEncoderLayer,
    padding_of,
    sine_positions,
    valid_cells,
    waves,
)

# B batch, N cells of all levels, Q queries, C width, L levels


class Memory(NamedTuple):
    """cells (B, N, C), shapes of the levels, padding (B, N) or None, ratios (B, L, 2): valid width and height."""

    cells: Tensor
    shapes: list[Size]
    padding: Tensor | None
    ratios: Tensor


class DeformableDETR(SetDetector):
    """Deformable transformer on several maps.

    Args:
        feature_info: channels and strides of the maps; all are read.
        num_classes: K; labels are 0..K-1.
        num_queries: Q, boxes that a picture can have.
        num_levels: levels of attention; those beyond the maps come from the last map by convolutions of stride 2.
        channels: C, a multiple of 4 and of num_heads.
        num_heads, num_points: of attention.
        encoder_layers, decoder_layers: how many.
        hidden: width between the two linear layers of a layer.
        dropout: in the transformer.
        refine: each layer of the decoder moves the boxes of the one before (iterative refinement).
        two_stages: the encoder's best cells become the queries, and boxes are relative to theirs; published with
            `refine`, without it one head serves all layers and the encoder.
        class_weight, box_weight, giou_weight: of the losses, and of the terms of matching.
        prior: initial probability of every class.
        detections, score_threshold, min_size: decoding, see SetDetector.
    """

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        num_classes: int,
        num_queries: int = 300,
        num_levels: int = 4,
        channels: int = 256,
        num_heads: int = 8,
        num_points: int = 4,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        hidden: int = 1024,
        dropout: float = 0.1,
        refine: bool = False,
        two_stages: bool = False,
        class_weight: float = 2.0,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
        prior: float = 0.01,
        detections: int = 100,
        score_threshold: float = 0.0,
        min_size: float = 0.0,
    ):
        super().__init__(
            feature_info=feature_info,
            num_classes=num_classes,
            class_loss='focal',
            class_weight=class_weight,
            box_weight=box_weight,
            giou_weight=giou_weight,
            class_cost=class_weight,
            box_cost=box_weight,
            giou_cost=giou_weight,
            no_object=1.0,
            detections=detections,
            score_threshold=score_threshold,
            min_size=min_size,
        )
        check_width(channels, num_heads)
        maps = self.inputs.channels()
        if num_levels < len(maps):
            raise ValueError(f'num_levels must be at least the {len(maps)} maps of the pyramid, got {num_levels}')
        self.channels, self.num_queries = channels, positive('num_queries', num_queries)
        self.refine, self.two_stages = refine, two_stages
        self.input_proj = nn.ModuleList(_projection(width, channels, 1) for width in maps)
        for width in [maps[-1], *[channels] * num_levels][: num_levels - len(maps)]:
            self.input_proj.append(_projection(width, channels, 3))
        self.level_embed = nn.Parameter(torch.randn(num_levels, channels))
        options: dict[str, Any] = {
            'channels': channels,
            'num_levels': num_levels,
            'num_points': num_points,
            'num_heads': num_heads,
            'hidden': hidden,
            'dropout': dropout,
        }
        self.encoder = Stack([DeformableEncoderLayer(**options) for _ in range(encoder_layers)], None)
        self.decoder = Stack(
            [DeformableDecoderLayer(**options) for _ in range(positive('decoder_layers', decoder_layers))], None
        )
        if two_stages:
            self.enc_output = nn.Linear(channels, channels)
            self.enc_output_norm = nn.LayerNorm(channels)
            self.pos_trans = nn.Linear(channels * 2, channels * 2)
            self.pos_trans_norm = nn.LayerNorm(channels * 2)
        else:
            self.query_embed = nn.Embedding(num_queries, channels * 2)
            self.reference_points = nn.Linear(channels, 2)
        class_embed = nn.Linear(channels, num_classes)
        nn.init.constant_(class_embed.bias, -math.log((1 - prior) / prior))
        bbox_embed = MLP(in_channels=channels, channels=channels, out_channels=4, depth=3)
        # One head for each layer that moves boxes and one for the encoder, or the same for all.
        count = decoder_layers + two_stages if refine else 1
        self.class_embed = nn.ModuleList(copy.deepcopy(class_embed) for _ in range(count))
        self.bbox_embed = nn.ModuleList(copy.deepcopy(bbox_embed) for _ in range(count))
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for part in (self.encoder, self.decoder):
            for layer in part.layers:
                for name, parameter in layer.named_parameters():
                    if parameter.ndim > 1 and 'sampling_offsets' not in name and 'attention_weights' not in name:
                        nn.init.xavier_uniform_(parameter)
        if not self.two_stages:
            nn.init.xavier_uniform_(self.reference_points.weight)
            nn.init.zeros_(self.reference_points.bias)
        head: Any
        for i, head in enumerate(self.bbox_embed):
            nn.init.zeros_(head.layers[-1].weight)
            nn.init.zeros_(head.layers[-1].bias)
            if i == 0 and not self.two_stages:  # a box starts at sigmoid(-2) = 0.12 of the picture
                nn.init.constant_(head.layers[-1].bias[2:], -2.0)

    def encode(self, features: Sequence[Tensor], sizes: Sequence[Size] | None) -> Memory:
        """List of maps -> the encoder's memory."""
        self.inputs.check(features)
        maps = [project(x) for project, x in zip(self.input_proj, features)]
        strides = self.inputs.reduction()
        for i, project in enumerate(self.input_proj[len(maps) :]):
            maps.append(project(maps[-1] if i else features[-1]))
            strides.append(strides[-1] * 2)
        shapes = [(x.shape[-2], x.shape[-1]) for x in maps]
        device = maps[0].device
        counts = [valid_cells(sizes, stride, shape, device) for stride, shape in zip(strides, shapes)]
        if any(count is not None for count in counts):  # then all levels of all pictures are counted
            batch = maps[0].shape[0]
            counts = [
                torch.tensor([shape] * batch, device=device) if count is None else count
                for count, shape in zip(counts, shapes)
            ]
        cells = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        places = [
            sine_positions(*shape, self.channels, count, device, -0.5).to(cells.dtype) + level
            for shape, count, level in zip(shapes, counts, self.level_embed)
        ]
        position = torch.cat(places, 1)
        padding, ratios = None, cells.new_ones(1, len(maps), 2, dtype=torch.float32)
        if counts[0] is not None:
            padding = torch.cat([padding_of(n, *shape) for n, shape in zip(counts, shapes)], 1)  # type: ignore[misc]
            ratios = torch.stack(
                [n.flip(1) / torch.tensor([w, h], device=device) for n, (h, w) in zip(counts, shapes)],  # type: ignore
                1,
            )
        reference = _centres(shapes, ratios)[:, :, None] * ratios[:, None]
        for layer in self.encoder.layers:
            cells = layer(cells, position, reference, shapes, padding)
        return Memory(cells, shapes, padding, ratios)

    def proposals(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """Of every cell of the memory: logits (B, N, K), and boxes (B, N, 4) before the sigmoid."""
        sides = [torch.full((h * w, 2), 0.05 * 2.0**i, device=memory.ratios.device)
                 for i, (h, w) in enumerate(memory.shapes)]  # fmt: skip
        centre = _centres(memory.shapes, memory.ratios)
        boxes = torch.cat([centre, torch.cat(sides).expand(centre.shape[0], -1, -1)], -1)
        usable = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True)
        if memory.padding is not None:
            usable = usable & ~memory.padding[..., None]
        boxes = torch.where(usable, (boxes / (1 - boxes)).log(), math.inf)
        cells = self.enc_output_norm(self.enc_output(memory.cells * usable))
        return self.class_embed[-1](cells), self.bbox_embed[-1](cells).float() + boxes

    def _start(self, memory: Memory) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Queries (B, Q, C), their places (B or 1, Q, C), references (B, Q, 2 or 4), and proposals of two stages."""
        batch = memory.cells.shape[0]
        if not self.two_stages:
            place, query = self.query_embed.weight.chunk(2, 1)
            reference = self.reference_points(place).sigmoid()
            return query.expand(batch, -1, -1), place[None], reference.expand(batch, -1, -1), None
        logits, boxes = self.proposals(memory)
        count = min(self.num_queries, boxes.shape[1])
        chosen = det.pick(boxes, logits[..., 0].topk(count, 1).indices).detach().sigmoid()
        place = waves(chosen * (2 * math.pi), self.channels // 2).flatten(2).to(memory.cells.dtype)
        place, query = self.pos_trans_norm(self.pos_trans(place)).chunk(2, 2)
        return query, place, chosen, (logits, boxes.sigmoid())

    def _run(
        self, features: Sequence[Tensor], sizes: Sequence[Size] | None, every: bool
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        memory = self.encode(features, sizes)
        query, place, reference, proposals = self._start(memory)
        logits, boxes = [], []
        last = len(self.decoder.layers) - 1
        for i, layer in enumerate(self.decoder.layers):
            ratios = torch.cat([memory.ratios] * (reference.shape[-1] // 2), -1)
            query = layer(
                query, place, reference[:, :, None] * ratios[:, None], memory.cells, memory.shapes, memory.padding
            )
            if not (every or self.refine or i == last):
                continue
            head = i if self.refine else 0
            moved = self.bbox_embed[head](query).float()
            start = inverse_sigmoid(reference)
            if start.shape[-1] == 2:
                start = torch.cat([start, torch.zeros_like(start)], -1)
            box = (moved + start).sigmoid()
            if every or i == last:
                logits.append(self.class_embed[head](query))
                boxes.append(box)
            if self.refine:
                reference = box.detach()
        return torch.stack(logits), torch.stack(boxes), proposals

    def layers(self, features: Sequence[Tensor], sizes: Sequence[Size] | None) -> tuple[Tensor, Tensor]:
        """Logits (L, B, Q, K) and boxes (L, B, Q, 4)."""
        return self._run(features, sizes, True)[:2]

    def last_layer(self, features: Sequence[Tensor], sizes: Sequence[Size] | None) -> tuple[Tensor, Tensor]:
        logits, boxes, _ = self._run(features, sizes, False)
        return logits[-1], boxes[-1]

    def loss(self, features: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """As SetDetector's; with two stages also 'loss_cls_encoder', 'loss_box_encoder', 'loss_giou_encoder'."""
        truth, sizes = self.objects(features, targets)
        logits, boxes, proposals = self._run(features, sizes, True)
        logits, boxes = logits.float(), boxes.float()
        losses = by_layer(self.losses(logits, boxes, truth, self.match(logits, boxes, truth)))
        if proposals is not None:
            scores, coarse = (x[None].float() for x in proposals)
            objects = truth._replace(labels=torch.zeros_like(truth.labels))  # objects of whatever class
            terms = self.losses(scores, coarse, objects, self.match(scores, coarse, objects))
            losses.update(by_layer(terms, '_encoder'))
        return losses


def _projection(in_channels: int, channels: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, kernel, 2 if kernel > 1 else 1, kernel // 2)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.get_parameter('bias'))
    norm = norm_layer('group')
    assert norm is not None
    return nn.Sequential(conv, norm(channels))


def _centres(shapes: Sequence[Size], ratios: Tensor) -> Tensor:
    """(B, N, 2) x and y of every cell's centre, as fractions of the valid part of its level."""
    levels = []
    for i, (height, width) in enumerate(shapes):
        y, x = torch.meshgrid(
            torch.arange(height, device=ratios.device) + 0.5,
            torch.arange(width, device=ratios.device) + 0.5,
            indexing='ij',
        )
        grid = torch.stack([x / width, y / height], -1).flatten(0, 1)
        levels.append(grid / ratios[:, i, None])
    return torch.cat(levels, 1)


_RENAMES = (
    (r'^(transformer|bbox_head)\.', ''),
    (r'^neck\.convs\.(\d+)\.conv\.', r'input_proj.\1.0.'),
    (r'^neck\.convs\.(\d+)\.gn\.', r'input_proj.\1.1.'),
    (r'\.self_attn\.attn\.', '.self_attn.'),
    (r'\.ffn\.layers\.0\.0\.', '.linear1.'),
    (r'\.ffn\.layers\.1\.', '.linear2.'),
    (r'\.norms\.0\.', '.norm1.'),
    (r'\.norms\.1\.', '.norm2.'),
    (r'\.norms\.2\.', '.norm3.'),
    (r'^query_embedding\.', 'query_embed.'),
    (r'^reference_points_fc\.', 'reference_points.'),
    (r'^memory_trans_fc\.', 'enc_output.'),
    (r'^memory_trans_norm\.', 'enc_output_norm.'),
    (r'^pos_trans_fc\.', 'pos_trans.'),
    (r'^cls_branches\.', 'class_embed.'),
    (r'^reg_branches\.(\d+)\.0\.', r'bbox_embed.\1.layers.0.'),
    (r'^reg_branches\.(\d+)\.2\.', r'bbox_embed.\1.layers.1.'),
    (r'^reg_branches\.(\d+)\.4\.', r'bbox_embed.\1.layers.2.'),
)
# The authors number norms by parts: 1 follows attention to the maps, 2 the queries' own, which comes first.
_SWAPPED = {'norm1': 'norm2', 'norm2': 'norm1'}


def convert(state: dict[str, Any], maps: int, refine: bool) -> dict[str, Any]:
    """The head's entries of a state dict under the authors' or MMDetection's names, renamed to ours.

    Args:
        state: entries of the head (and MMDetection's neck).
        maps: levels that come from the backbone; MMDetection numbers the others from 0 again, and its projections have
            no bias.
        refine: without it, all layers share one head, which both list once for each.
    """
    authors = any(key.startswith('transformer.') for key in state)
    renamed = {}
    for key, value in state.items():
        key = re.sub(r'^neck\.extra_convs\.(\d+)\.', lambda match: f'neck.convs.{int(match[1]) + maps}.', key)
        key = re.sub(r'^transformer\.decoder\.(bbox|class)_embed\.', r'\1_embed.', key)  # the same tensors again
        key = rename(key, _RENAMES)
        if authors and key.startswith('decoder.'):
            key = re.sub('norm[12]', lambda match: _SWAPPED[match[0]], key)
        shared = re.match(r'(class|bbox)_embed\.(\d+)\.', key)
        if shared and not refine:
            key = re.sub(r'_embed\.\d+\.', '_embed.0.', key)
        renamed[key] = value
    for key in [key for key in renamed if re.fullmatch(r'input_proj\.\d+\.0\.weight', key)]:
        renamed.setdefault(key.replace('weight', 'bias'), renamed[key].new_zeros(len(renamed[key])))
    return renamed
