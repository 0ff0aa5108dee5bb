"""Mask2Former (Cheng et al. 2022, Masked-attention Mask Transformer, arXiv:2112.01527).

Written from the paper and from facts of facebookresearch/Mask2Former (MIT; published weights there: COCO panoptic
PQ 51.9, AP 41.7, mIoU 61.7 with R50). Targets and results: see `segments`.
Differs: no operator is compiled; the batch and all layers are matched at once, at points that the layers share.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.precision import full_precision
from . import mask_loss
from .mask2former_decoder import MaskedDecoder
from .mask2former_pixel_decoder import DeformablePixelDecoder
from .mask_loss import Points, Weights
from .pyramid import FeatureInfo, choose
from .renaming import rename
from .segments import KINDS
from .universal import Segments, UniversalHead, at_least_float32

# B batch, Q queries, K classes, L predictions of the decoder, H W pixels, h w those of the finest map


class MaskHead(UniversalHead):
    """What Mask2Former and OneFormer share: masks by sigmoids, losses at points, decoding by the largest probability.

    Args: see Mask2Former.
    """

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        num_classes: int,
        things: int | Sequence[int],
        weights: Weights,
        costs: Weights,
        points: Points,
        tasks: Sequence[str],
        score_threshold: float,
        overlap_threshold: float,
        detections: int,
        sub_pixel: int,
        lr_scale: float,
    ):
        super().__init__(
            feature_info=feature_info,
            num_classes=num_classes,
            things=things,
            tasks=tasks,
            rule='argmax',
            mask_threshold=0.5,
            score_threshold=score_threshold,
            stuff_threshold=score_threshold,
            overlap_threshold=overlap_threshold,
            detections=detections,
            sub_pixel=sub_pixel,
        )
        if points.number < 1 or points.oversample < 1 or not 0 <= points.important <= 1:
            raise ValueError(
                f'loss_points and oversample must be at least 1 and important in [0, 1], got '
                f'loss_points={points.number}, oversample={points.oversample}, important={points.important}'
            )
        if lr_scale <= 0:
            raise ValueError(f'lr_scale must be positive, got {lr_scale}')
        self.weights, self.costs = weights, costs
        self.points = points
        self.lr_scale = lr_scale

    def lr_scales(self) -> dict[str, float]:
        """The head's factor of the learning rate."""
        return {} if self.lr_scale == 1 else {'*': self.lr_scale}

    def no_weight_decay(self) -> set[str]:
        """Tables of queries, levels and tokens, as published."""
        return {'*query_feat*', '*query_embed*', '*level_embed*', '*token_embedding*', '*prompt_ctx*', '*logit_scale'}

    def set_losses(self, classes: Sequence[Tensor], masks: Sequence[Tensor], segments: Segments) -> dict[str, Tensor]:
        """'loss_class', 'loss_mask', 'loss_dice' of the last prediction, and '_aux' summed over those before.

        Args:
            classes: L times (B, Q, K + 1) logits.
            masks: L times (B, Q, h, w) logits.
        """
        with full_precision(masks[-1]):
            return self._set_losses(
                at_least_float32(torch.stack(list(classes))), at_least_float32(torch.stack(list(masks))), segments
            )

    def _set_losses(self, classes: Tensor, masks: Tensor, segments: Segments) -> dict[str, Tensor]:
        weights = self.weights
        # More points than cells would tell nothing more.
        how = self.points._replace(number=min(self.points.number, masks.shape[-2] * masks.shape[-1]))
        points = torch.rand(len(segments.counts), how.number, 2, device=masks.device, dtype=masks.dtype)
        matched = mask_loss.match(classes, masks, segments, points, self.costs)
        total = mask_loss.average_total(sum(segments.counts), masks.device)
        if any(segments.counts):
            entropy, dice = mask_loss.mask_losses(masks, matched, segments, total, how)
        else:
            entropy = dice = masks.flatten(1).sum(1) * 0  # every parameter keeps a gradient
        terms = {
            'loss_class': weights.classes * mask_loss.class_losses(classes, matched, segments, weights.no_object),
            'loss_mask': weights.mask * entropy,
            'loss_dice': weights.dice * dice,
        }
        return {
            **{name: value[-1] for name, value in terms.items()},
            **{f'{name}_aux': value[:-1].sum() for name, value in terms.items()},
        }


class Mask2Former(MaskHead):
    """Universal head on a backbone's maps: trained on one kind of segments, read as any task.

    Args:
        feature_info: channels and strides of the maps, finest first; at least three.
        num_classes, things, tasks: as UniversalHead.
        kind: segments that it learns: 'panoptic' (every task can be read), 'instance' or 'semantic'.
        num_queries: Q; of more segments than there are queries in a picture the rest has none.
        num_seeds: queries beside them that start from cells that look like things, see `seeds`; 0 as published.
        channels, mask_channels: width, and that of the map for masks.
        encoder_layers, encoder_hidden: of the pixel decoder, on num_levels maps.
        decoder_layers, hidden: of the transformer decoder.
        num_heads, num_points: of attention, and of deformable attention.
        dropout, sub_pixel: of the pixel decoder; masks are sub_pixel times finer than the first map.
        pre_norm, project: see MaskedDecoder.
        class_weight, mask_weight, dice_weight: of the losses; no_object: of the classes of queries without a segment.
        class_cost, mask_cost, dice_cost: of the three terms that matching weighs (published: those weights).
        loss_points, oversample, important: points per mask, see mask_loss.Points; at most as many as a mask has cells.
        lr_scale: factor of the head's learning rate: attention bears less than a backbone of batch norms.
        score_threshold, overlap_threshold, detections: decoding.
    """

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        num_classes: int,
        things: int | Sequence[int],
        kind: str = 'panoptic',
        num_queries: int = 100,
        num_seeds: int = 0,
        channels: int = 256,
        mask_channels: int = 256,
        num_levels: int = 3,
        encoder_layers: int = 6,
        encoder_hidden: int = 1024,
        decoder_layers: int = 9,
        hidden: int = 2048,
        num_heads: int = 8,
        num_points: int = 4,
        dropout: float = 0.0,
        sub_pixel: int = 1,
        pre_norm: bool = False,
        project: bool = False,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        class_cost: float = 2.0,
        mask_cost: float = 5.0,
        dice_cost: float = 5.0,
        no_object: float = 0.1,
        loss_points: int = 12544,
        oversample: float = 3.0,
        important: float = 0.75,
        lr_scale: float = 1.0,
        tasks: Sequence[str] = ('panoptic', 'instance', 'semantic'),
        score_threshold: float = 0.8,
        overlap_threshold: float = 0.8,
        detections: int = 100,
    ):
        super().__init__(
            feature_info=feature_info,
            num_classes=num_classes,
            things=things,
            weights=Weights(class_weight, mask_weight, dice_weight, no_object),
            costs=Weights(class_cost, mask_cost, dice_cost),
            points=Points(loss_points, oversample, important),
            tasks=tasks,
            score_threshold=score_threshold,
            overlap_threshold=overlap_threshold,
            detections=detections,
            sub_pixel=sub_pixel,
            lr_scale=lr_scale,
        )
        self.kind = choose('kind', kind, KINDS)
        self.pixel_decoder = DeformablePixelDecoder(
            feature_info=self.inputs,
            channels=channels,
            mask_channels=mask_channels,
            num_levels=num_levels,
            num_layers=encoder_layers,
            hidden=encoder_hidden,
            num_heads=num_heads,
            num_points=num_points,
            dropout=dropout,
            sub_pixel=sub_pixel,
        )
        self.predictor = MaskedDecoder(
            num_classes=num_classes,
            channels=channels,
            mask_channels=mask_channels,
            num_queries=num_queries,
            num_layers=decoder_layers,
            hidden=hidden,
            num_heads=num_heads,
            pre_norm=pre_norm,
            project=project,
            num_seeds=num_seeds,
            seed_classes=self.reader.things,
        )

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """List of maps -> logits of classes (B, Q, K + 1), no object last, and of masks (B, Q, h, w)."""
        classes, masks = self.predictions(features)
        return classes[-1], masks[-1]

    def predictions(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The same of the learnt queries and of every layer."""
        maps = self.pixel_decoder(features)
        return self.predictor(maps.levels, maps.mask)

    def loss(self, features: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """See `set_losses`."""
        segments = self.gather(targets, self.inputs.padded_size(features), [self.kind] * len(targets))
        return self.set_losses(*self.predictions(features), segments)


_RENAMES = (
    (r'^pixel_decoder\.transformer\.level_embed', 'pixel_decoder.level_embed'),
    (r'^pixel_decoder\.transformer\.encoder\.layers', 'pixel_decoder.layers'),
    (r'^pixel_decoder\.adapter_(\d+)\.(weight|bias)', r'pixel_decoder.adapters.\1.conv.\2'),
    (r'^pixel_decoder\.layer_(\d+)\.(weight|bias)', r'pixel_decoder.outputs.\1.conv.\2'),
    (r'^pixel_decoder\.adapter_(\d+)\.norm', r'pixel_decoder.adapters.\1.norm'),
    (r'^pixel_decoder\.layer_(\d+)\.norm', r'pixel_decoder.outputs.\1.norm'),
    (r'^predictor\.static_query', 'predictor.query_feat'),
    (r'^predictor\.transformer_self_attention_layers\.(\d+)\.self_attn', r'predictor.self_attention.\1.attention'),
    (
        r'^predictor\.transformer_cross_attention_layers\.(\d+)\.multihead_attn',
        r'predictor.cross_attention.\1.attention',
    ),
    (r'^predictor\.transformer_(self|cross)_attention_layers', r'predictor.\1_attention'),
    (r'^predictor\.transformer_ffn_layers', 'predictor.feed_forward'),
)


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' entries of the head under our keys; those of the backbone and the criterion are left out.

    Args:
        state: a published checkpoint's 'model', or what lies under its 'sem_seg_head.'.
    """
    converted = {}
    for key, value in state.items():
        key = key.removeprefix('sem_seg_head.')
        if key.startswith(('pixel_decoder.', 'predictor.')):
            converted[rename_part(key)] = value
    return converted


def rename_part(key: str) -> str:
    """A key of the pixel decoder or of the predictor."""
    key = rename(key, _RENAMES)
    # The authors count the convolutions of the feature pyramid from 1.
    return re.sub(r'^(pixel_decoder\.(?:adapters|outputs)\.)(\d+)', lambda m: f'{m[1]}{int(m[2]) - 1}', key)
