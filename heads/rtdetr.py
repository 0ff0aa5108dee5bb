"""RT-DETR: DETRs Beat YOLOs on Real-time Object Detection (Zhao et al. 2023, arXiv:2304.08069), the decoder.

A HybridEncoder is its neck. The best cells of all maps become queries, chosen by scores that were trained to rank boxes
by their IoU (varifocal loss: the paper's uncertainty-minimal selection); a deformable decoder refines them. There is no
suppression: what is exported gives results. Loss: varifocal, L1 and GIoU of matched pairs, of the chosen cells and of
every layer, and of denoising queries. Boxes are fractions of the padded batch.

Written from the paper; parameters are called as in the authors' PyTorch code (lyuwenyu/RT-DETR, Apache-2.0, decoder).
Differs: boxes without area are left out; where maps have fewer cells than queries, all cells are queries.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import detection as det
from .denoising import denoising_queries
from .detr import Stack, check_width
from .hybrid_encoder import ConvNorm
from .pyramid import FeatureInfo, Size, positive
from .set_prediction import SetDetector, by_layer, inverse_sigmoid
from .transformer import MLP, DeformableDecoderLayer

# B batch, N cells of all levels, Q queries, C width, L layers

LARGEST_SELECTION = 3840  # TensorRT's TopK takes no more


class RTDETR(SetDetector):
    """Real-time DETR on several maps, a HybridEncoder's.

    Args:
        feature_info: channels and strides of the maps; all are read.
        num_classes: K; labels are 0..K-1.
        num_queries: Q, boxes that a picture can have; at most 3840.
        channels: C, a multiple of 4 and of num_heads.
        num_heads, num_points: of attention.
        decoder_layers: how many.
        eval_layers: of them in inference; fewer are faster, without training again. None: all.
        hidden: width between the two linear layers of a layer.
        dropout: in the decoder.
        anchor_size: side of the boxes that cells of the finest map start from, as a fraction of the picture; it doubles
            from level to level.
        encoder_matches: chosen cells that each object is matched with in the encoder's loss; 1 is published, more is
            hybrid matching (Jia et al. 2022, arXiv:2207.13080): short trainings learn classes sooner.
        num_denoising: objects with noise for each picture, about; 0 trains without.
        label_noise, box_noise: see denoising_queries.
        class_weight, box_weight, giou_weight: of the losses.
        class_cost, box_cost, giou_cost: of the terms of matching.
        prior: initial probability of every class.
        detections, score_threshold, min_size: decoding, see SetDetector.
    """

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        num_classes: int,
        num_queries: int = 300,
        channels: int = 256,
        num_heads: int = 8,
        num_points: int = 4,
        decoder_layers: int = 6,
        eval_layers: int | None = None,
        hidden: int = 1024,
        dropout: float = 0.0,
        anchor_size: float = 0.05,
        encoder_matches: int = 1,
        num_denoising: int = 100,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
        class_weight: float = 1.0,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
        class_cost: float = 2.0,
        box_cost: float = 5.0,
        giou_cost: float = 2.0,
        prior: float = 0.01,
        detections: int = 100,
        score_threshold: float = 0.0,
        min_size: float = 0.0,
    ):
        super().__init__(
            feature_info=feature_info,
            num_classes=num_classes,
            class_loss='varifocal',
            class_weight=class_weight,
            box_weight=box_weight,
            giou_weight=giou_weight,
            class_cost=class_cost,
            box_cost=box_cost,
            giou_cost=giou_cost,
            no_object=1.0,
            detections=detections,
            score_threshold=score_threshold,
            min_size=min_size,
        )
        check_width(channels, num_heads)
        if not 0 < num_queries <= LARGEST_SELECTION:
            raise ValueError(f'num_queries must be in 1..{LARGEST_SELECTION}, got {num_queries}')
        det.check_thresholds(label_noise=label_noise, anchor_size=anchor_size)
        self.num_queries, self.anchor_size = num_queries, anchor_size
        self.encoder_matches = positive('encoder_matches', encoder_matches)
        self.num_denoising, self.label_noise, self.box_noise = num_denoising, label_noise, box_noise
        self.eval_layers = positive('decoder_layers', decoder_layers) if eval_layers is None else eval_layers
        if not 0 < self.eval_layers <= decoder_layers:
            raise ValueError(f'eval_layers must be in 1..{decoder_layers} or None, got {eval_layers}')
        maps = self.inputs.channels()
        self.input_proj = nn.ModuleList(ConvNorm(width, channels, 1, act=False) for width in maps)
        self.decoder = Stack(
            [
                DeformableDecoderLayer(
                    channels=channels,
                    num_levels=len(maps),
                    num_points=num_points,
                    num_heads=num_heads,
                    hidden=hidden,
                    dropout=dropout,
                )
                for _ in range(decoder_layers)
            ],
            None,
        )
        if num_denoising:
            self.denoising_class_embed = nn.Embedding(num_classes + 1, channels, padding_idx=num_classes)
        self.query_pos_head = MLP(in_channels=4, channels=2 * channels, out_channels=channels, depth=2)
        self.enc_output = nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels))
        self.enc_score_head = nn.Linear(channels, num_classes)
        self.enc_bbox_head = MLP(in_channels=channels, channels=channels, out_channels=4, depth=3)
        self.dec_score_head = nn.ModuleList(nn.Linear(channels, num_classes) for _ in range(decoder_layers))
        self.dec_bbox_head = nn.ModuleList(
            MLP(in_channels=channels, channels=channels, out_channels=4, depth=3) for _ in range(decoder_layers)
        )
        self._reset_parameters(prior)

    def _reset_parameters(self, prior: float) -> None:
        head: Any
        for head in (self.enc_score_head, *self.dec_score_head):
            nn.init.constant_(head.bias, -math.log((1 - prior) / prior))
        for head in (self.enc_bbox_head, *self.dec_bbox_head):
            nn.init.zeros_(head.layers[-1].weight)
            nn.init.zeros_(head.layers[-1].bias)
        for head in (self.enc_output[0], *self.query_pos_head.layers):
            nn.init.xavier_uniform_(head.weight)

    def frames(self, sizes: Sequence[Size], padded: Size) -> Sequence[Size]:
        return [padded] * len(sizes)

    def encode(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Size]]:
        """List of maps -> cells (B, N, C) of all levels, and the levels' shapes."""
        self.inputs.check(features)
        maps = [project(x) for project, x in zip(self.input_proj, features)]
        return torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1), [(x.shape[-2], x.shape[-1]) for x in maps]

    def select(self, cells: Tensor, shapes: Sequence[Size]) -> tuple[Tensor, Tensor, Tensor]:
        """The cells that become queries: (B, Q, C), their logits (B, Q, K), and boxes (B, Q, 4) before the sigmoid."""
        anchors, usable = self._anchors(shapes, cells.device)
        candidates = self.enc_output(cells * usable)
        logits = self.enc_score_head(candidates)
        count = min(self.num_queries, candidates.shape[1])
        index = logits.amax(-1).topk(count, 1).indices
        chosen = det.pick(candidates, index)
        boxes = self.enc_bbox_head(chosen).float() + det.pick(anchors.expand(cells.shape[0], -1, -1), index)
        return chosen, det.pick(logits, index), boxes

    def decode_queries(
        self,
        query: Tensor,
        start: Tensor,
        cells: Tensor,
        shapes: Sequence[Size],
        *,
        every: bool,
        apart: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Queries (B, Q, C) and their boxes before the sigmoid -> logits (L, B, Q, K), boxes (L, B, Q, 4).

        L is 1 unless `every`. A layer's loss reaches the layer before through the box that it moves.
        """
        logits, boxes = [], []
        reference, previous = start.detach().sigmoid(), None
        layers = self.decoder.layers if every else self.decoder.layers[: self.eval_layers]
        for i, layer in enumerate(layers):
            place = self.query_pos_head(reference.to(query.dtype))
            query = layer(query, place, reference[:, :, None], cells, shapes, apart=apart)
            moved = self.dec_bbox_head[i](query).float()
            box = (moved + inverse_sigmoid(reference)).sigmoid()
            if every or i == len(layers) - 1:
                logits.append(self.dec_score_head[i](query))
                boxes.append(box if previous is None else (moved + inverse_sigmoid(previous)).sigmoid())
            reference, previous = box.detach(), box if every else None
        return torch.stack(logits), torch.stack(boxes)

    def layers(self, features: Sequence[Tensor], sizes: Sequence[Size] | None) -> tuple[Tensor, Tensor]:
        """Logits (L, B, Q, K) and boxes (L, B, Q, 4)."""
        cells, shapes = self.encode(features)
        query, _, start = self.select(cells, shapes)
        return self.decode_queries(query, start, cells, shapes, every=True)

    def last_layer(self, features: Sequence[Tensor], sizes: Sequence[Size] | None) -> tuple[Tensor, Tensor]:
        cells, shapes = self.encode(features)
        query, _, start = self.select(cells, shapes)
        logits, boxes = self.decode_queries(query, start, cells, shapes, every=False)
        return logits[0], boxes[0]

    def loss(self, features: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """As SetDetector's; '_encoder' of the chosen cells, '_denoising' of the denoising queries (summed over layers).

        The latter are missing where num_denoising=0, and 0 where the batch has no object.
        """
        truth, _ = self.objects(features, targets)
        cells, shapes = self.encode(features)
        query, chosen_logits, start = self.select(cells, shapes)
        query, count = query.detach(), query.shape[1]
        noisy, first, apart = None, start, None
        if self.num_denoising:
            noisy = denoising_queries(
                truth,
                self.num_classes,
                queries=self.num_denoising,
                label_noise=self.label_noise,
                box_noise=self.box_noise,
            )
        if noisy is not None:
            query = torch.cat([self.denoising_class_embed(noisy.labels).to(query.dtype), query], 1)
            first = torch.cat([inverse_sigmoid(noisy.boxes), start], 1)
            apart = noisy.apart(count)
        logits, boxes = (x.float() for x in self.decode_queries(query, first, cells, shapes, every=True, apart=apart))
        # Chosen cells are matched together with the layers: one copy to the host.
        ordinary_logits = torch.cat([chosen_logits.float()[None], logits[:, :, -count:]])
        ordinary_boxes = torch.cat([start.sigmoid()[None], boxes[:, :, -count:]])
        matched = self.match(ordinary_logits, ordinary_boxes, truth)
        if self.encoder_matches > 1:
            matched[0] = self.match(ordinary_logits[0], ordinary_boxes[0], truth, self.encoder_matches)
        terms = self.losses(ordinary_logits, ordinary_boxes, truth, matched)
        losses = by_layer({name: values[1:] for name, values in terms.items()})
        losses.update((f'{name}_encoder', values[0] / self.encoder_matches) for name, values in terms.items())
        if noisy is not None:
            restored = noisy.matched.expand(len(logits), -1, -1)
            shared = truth._replace(total=truth.total * noisy.groups)
            terms = self.losses(logits[:, :, :-count], boxes[:, :, :-count], shared, restored)
            losses.update((f'{name}_denoising', values.sum()) for name, values in terms.items())
        elif self.num_denoising:  # every parameter gets a gradient: DDP would wait for it
            nothing = self.denoising_class_embed.weight.sum() * 0
            losses.update((f'{name}_denoising', nothing) for name in terms)
        return losses

    def _anchors(self, shapes: Sequence[Size], device: torch.device) -> tuple[Tensor, Tensor]:
        """Boxes (1, N, 4) that cells start from, before the sigmoid, and (1, N, 1) bool: are they well inside."""
        levels = []
        for i, (height, width) in enumerate(shapes):
            y, x = torch.meshgrid(
                (torch.arange(height, device=device) + 0.5) / height,
                (torch.arange(width, device=device) + 0.5) / width,
                indexing='ij',
            )
            side = torch.full_like(x, self.anchor_size * 2.0**i)
            levels.append(torch.stack([x, y, side, side], -1).flatten(0, 1))
        anchors = torch.cat(levels)[None]
        usable = ((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True)
        # A finite stand-in for infinity, which engines in half precision cannot hold: its sigmoid is 1 as well.
        return torch.where(usable, (anchors / (1 - anchors)).log(), 1e4), usable
