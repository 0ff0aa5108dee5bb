"""kMaX-DeepLab (Yu et al. 2022, k-means Mask Transformer, arXiv:2207.04044): panoptic segmentation whose queries are
cluster centres.

Written from the paper and from facts of bytedance/kmax-deeplab (Apache 2.0; published weights there: COCO panoptic
PQ 53.3 with R50). Targets and results: see `segments`.
Differs: maps of any size; a segment that falls between the sampled pixels keeps the cells that it touches (there it is
dropped); batch norms are plain ones, torch's convert_sync_batchnorm makes them synchronised.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.precision import full_precision
from . import kmax_loss
from .kmax_decoder import KMaXDecoder, Prediction, SemanticPredictor
from .kmax_pixel_decoder import ConvNorm, KMaXPixelDecoder
from .pyramid import FeatureInfo, choose
from .segments import IGNORE
from .universal import Segments, UniversalHead, at_least_float32

# B batch, Q queries, K classes, M segments of the fullest picture, H W pixels, h w those of the finest map


class KMaXDeepLab(UniversalHead):
    """Universal head on a backbone's maps.

    The published geometry is pictures of 32 k + 1 pixels, whose maps have aligned corners; any other size works, best
    with align_corners=False.

    Args:
        feature_info: channels and strides of the maps, finest first, each stride twice the one before.
        num_classes, things, tasks, overlap_threshold, detections: as UniversalHead.
        num_queries: Q; of more segments than that in a picture the rest is void.
        depths, channels, kinds: of the pixel decoder's stages, COARSEST FIRST (see KMaXPixelDecoder).
        decoder_depths: transformer layers on the coarsest maps, coarsest first.
        drop_path: rate in the transformer decoder; that in the pixel decoder is pixel_drop_path.
        align_corners: None: the published rule; True or False for all sizes.
        auxiliary: the semantic branch of training on the backbone's maps: 'decoder', 'simple' (on the coarsest alone)
            or 'none'. It costs nothing at inference.
        class_weight, mask_weight, dice_weight, pixel_weight, semantic_weight: factors of the losses.
        samples: pixels per picture in the contrast of pixels; semantic_samples in the semantic branch, 0 for all.
        share_matching: the final prediction's matching serves all layers.
        mask_threshold, thing_threshold, stuff_threshold: decoding: pixels from this probability on; class scores.
    """

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        num_classes: int,
        things: int | Sequence[int],
        num_queries: int = 128,
        depths: Sequence[int] = (1, 5, 1, 1),
        channels: Sequence[int] = (512, 256, 128, 64),
        kinds: Sequence[str] = ('axial', 'axial', 'bottleneck', 'bottleneck'),
        decoder_depths: Sequence[int] = (2, 2, 2),
        drop_path: float = 0.0,
        pixel_drop_path: float = 0.0,
        align_corners: bool | None = None,
        auxiliary: str = 'decoder',
        class_weight: float = 3.0,
        mask_weight: float = 0.3,
        dice_weight: float = 3.0,
        pixel_weight: float = 1.0,
        semantic_weight: float = 1.0,
        samples: int = 4096,
        semantic_samples: int = 4096,
        share_matching: bool = True,
        tasks: Sequence[str] = ('panoptic', 'instance', 'semantic'),
        mask_threshold: float = 0.4,
        thing_threshold: float = 0.7,
        stuff_threshold: float = 0.5,
        overlap_threshold: float = 0.8,
        detections: int = 100,
    ):
        super().__init__(
            feature_info=feature_info,
            num_classes=num_classes,
            things=things,
            tasks=tasks,
            rule='order',
            mask_threshold=mask_threshold,
            score_threshold=thing_threshold,
            stuff_threshold=stuff_threshold,
            overlap_threshold=overlap_threshold,
            detections=detections,
            align_corners=align_corners,
        )
        self.align_corners = align_corners
        self.weights = {'class': class_weight, 'mask': mask_weight, 'dice': dice_weight, 'pixel': pixel_weight}
        self.semantic_weight = semantic_weight
        self.samples = samples
        self.semantic_samples = semantic_samples
        self.share_matching = share_matching
        self.pixel_decoder = KMaXPixelDecoder(
            feature_info=self.inputs,
            depths=depths,
            channels=channels,
            kinds=kinds,
            drop_path=pixel_drop_path,
            align_corners=align_corners,
        )
        self.predictor = KMaXDecoder(
            in_channels=self.pixel_decoder.out_channels,
            num_classes=num_classes,
            num_queries=num_queries,
            depths=decoder_depths,
            drop_path=drop_path,
            align_corners=align_corners,
        )
        self.auxiliary = choose('auxiliary', auxiliary, ('decoder', 'simple', 'none'))
        self.auxiliary_semantic_predictor = self._auxiliary(num_classes)

    def no_weight_decay(self) -> set[str]:
        """Cluster centres and tables of distances."""
        return {'*cluster_centers*', '*_rpe*'}

    def _auxiliary(self, num_classes: int) -> nn.Module | None:
        widths = self.inputs.channels()[::-1]
        if self.auxiliary == 'simple':
            return nn.Sequential(
                ConvNorm(widths[0], widths[0], 5, groups=widths[0], act=True),
                ConvNorm(widths[0], 256, act=True),
                ConvNorm(256, num_classes, bias=True, norm=False, std=0.01),
            )
        if self.auxiliary == 'decoder':
            if len(widths) < 4:
                raise ValueError(f"auxiliary='decoder' needs four maps, got {len(widths)}; 'simple' needs one")
            return SemanticPredictor(widths[0], widths[2], widths[3], num_classes, self.align_corners)
        return None

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """List of maps -> logits of classes (B, Q, K + 1), no object last, and of masks (B, Q, h, w) that compete."""
        last = self.predictions(features)[-1]
        return last.classes, last.masks

    def predictions(self, features: Sequence[Tensor]) -> list[Prediction]:
        """Of every layer, each at the size of its own map; the last one at the finest."""
        self.inputs.check(features)
        return self.predictor(self.pixel_decoder(features))

    def loss(self, features: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """'loss_class', 'loss_mask', 'loss_dice', 'loss_pixel' of the last prediction, the same ending in '_aux' summed
        over the layers before, and 'loss_semantic' of the auxiliary branch."""
        predictions = self.predictions(features)
        semantic = self._semantic(features)
        with full_precision(predictions[-1].masks):
            *layers, last = (Prediction(*map(at_least_float32, p)) for p in predictions)
            segments, labels = self._sampled(targets, features)
            final = truth = kmax_loss.match(last, segments)
            losses = {f'loss_{name}': value for name, value in self._terms(last, final).items()}
            for layer in layers:
                layer = self.predictor.resized(layer, last.masks.shape[-2:])
                if not self.share_matching:
                    truth = kmax_loss.match(layer, segments)
                for name, value in self._terms(layer, truth).items():
                    losses[f'loss_{name}_aux'] = losses.get(f'loss_{name}_aux', 0) + value
            if semantic is not None:
                losses['loss_semantic'] = self.semantic_weight * self._semantic_loss(semantic, labels, final)
        return losses

    def _terms(self, prediction: Prediction, truth: kmax_loss.Truth) -> dict[str, Tensor]:
        mask, dice = kmax_loss.mask_losses(prediction.masks, truth)
        terms = {
            'class': kmax_loss.class_loss(prediction.classes, truth),
            'mask': mask,
            'dice': dice,
            'pixel': kmax_loss.pixel_loss(prediction.pixels, truth, self.samples),
        }
        return {name: self.weights[name] * value for name, value in terms.items()}

    def _semantic(self, features: Sequence[Tensor]) -> Tensor | None:
        """Logits of the auxiliary branch."""
        if self.auxiliary_semantic_predictor is None:
            return None
        maps = (features[-1], features[-3], features[-4]) if self.auxiliary == 'decoder' else features[-1:]
        return at_least_float32(self.auxiliary_semantic_predictor(*maps))

    def _semantic_loss(self, logits: Tensor, labels: Tensor, truth: kmax_loss.Truth) -> Tensor:
        samples = self.semantic_samples
        if logits.shape[-2:] != labels.shape[-2:]:
            labels = F.interpolate(labels[:, None].float(), size=logits.shape[-2:], mode='nearest')[:, 0].long()
            samples = 0
        return kmax_loss.semantic_loss(logits, labels, truth, num_classes=self.num_classes, samples=samples)

    def _sampled(self, targets: Sequence[Mapping[str, Any]], features: Sequence[Tensor]) -> tuple[Segments, Tensor]:
        """Segments and semantic labels (B, h, w) at the pixels that the finest map's cells stand for."""
        stride = self.inputs.reduction()[0]
        padded = self.inputs.padded_size(features)
        sizes = [tuple(target['mask'].shape) for target in targets]
        segments = self.gather(targets, padded, ['panoptic'] * len(targets))
        # Cells stand for every s-th pixel from the first where corners are aligned, else for the middle of s pixels.
        aligned = self.reader.align_corners
        if aligned is None:
            aligned = max(width for _, width in sizes) == padded[1] - stride + 1
        start = 0 if aligned else stride // 2
        at = (..., slice(start, None, stride), slice(start, None, stride))
        masks = segments.masks[at]
        lost = segments.masks.flatten(2).any(2) & ~masks.flatten(2).any(2)  # thinner than the stride
        if lost.any():
            masks[lost] = F.max_pool2d(segments.masks[lost].float(), stride) > 0
        labels = torch.full((len(targets), *padded), IGNORE, device=masks.device)
        for row, target in zip(labels, targets):
            row[: target['mask'].shape[0], : target['mask'].shape[1]] = target['mask']
        return segments._replace(masks=masks), labels[at]


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' entries of the head under our keys; those of the backbone and the criterion are left out.

    Args:
        state: a published checkpoint's 'model', or what lies under its 'sem_seg_head.'.
    """
    converted = {}
    for key, value in state.items():
        key = key.removeprefix('sem_seg_head.')
        if not key.startswith(('pixel_decoder.', 'predictor.')):
            continue
        key = re.sub(r'(^|\.)_', r'\1', key).replace('predcitor', 'predictor')
        converted[key.replace('predictor.auxiliary_semantic_predictor', 'auxiliary_semantic_predictor')] = value
    return converted
