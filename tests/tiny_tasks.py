"""The tasks, each on a PoolFormer of four narrow blocks."""

from typing import Any

from densezoo.backbones import create_model
from densezoo.heads import (
    FCOS,
    FPN,
    RTDETR,
    HybridEncoder,
    KMaXDeepLab,
    LinearClassifier,
    Mask2Former,
    MaskRCNN,
    OneFormer,
    OwnClassifier,
    SemanticFPN,
    UNetRestorer,
)
from densezoo.train import Detector, ImageClassifier, Preprocess, Restorer, Segmentor, Task, UniversalSegmentor

SMALL = {'name': 'poolformer_s12', 'depths': (1, 1, 1, 1), 'dims': (8, 16, 24, 32)}
PYRAMID = {'type': create_model, 'features_only': True, **SMALL}
PIXELS = {'type': Preprocess, 'mean': (120.0, 115.0, 105.0), 'std': (60.0, 55.0, 50.0), 'divisor': 32}


def detector() -> Task:
    return Detector(backbone=PYRAMID, neck={'type': FPN, 'out_channels': 16}, head={'type': FCOS, 'num_classes': 3},
                    preprocess=PIXELS)  # fmt: skip


def rtdetr(backbone: Any = PYRAMID) -> Task:
    """A detector whose exported form gives results."""
    neck = {'type': HybridEncoder, 'out_channels': 32, 'num_heads': 2, 'hidden': 32, 'depth': 1}
    head = {'type': RTDETR, 'num_classes': 3, 'channels': 32, 'num_heads': 2, 'hidden': 32, 'decoder_layers': 2,
            'num_queries': 20}  # fmt: skip
    backbone = {**backbone, 'out_indices': (1, 2, 3)}
    return Detector(backbone=backbone, neck=neck, head=head, preprocess=PIXELS)


def two_stages(masks: bool = False, kind: type = MaskRCNN) -> Task:
    """Faster or Mask R-CNN on two levels, with scores that are not all alike."""
    task = Detector(backbone={**PYRAMID, 'out_indices': (1, 2)}, neck={'type': FPN, 'out_channels': 16},
                    head={'type': kind, 'num_classes': 3, 'masks': masks, 'box_channels': 32, 'mask_channels': 16,
                          'mask_convs': 1, 'rpn_pre_nms': (100, 100), 'rpn_post_nms': (100, 50)},
                    preprocess=PIXELS)  # fmt: skip
    scores = [m for name, m in task.head.named_modules() if name.endswith(('cls_score', 'cls_logits'))]
    for layer in scores:
        layer.weight.data.mul_(30)
    return task


def segmentor() -> Task:
    return Segmentor(backbone=PYRAMID, neck={'type': FPN, 'out_channels': 16}, preprocess=PIXELS,
                     head={'type': SemanticFPN, 'num_classes': 4, 'channels': 16})  # fmt: skip


def classifier() -> Task:
    return ImageClassifier(backbone=PYRAMID, head={'type': LinearClassifier, 'num_classes': 5}, preprocess=PIXELS)


def own_classifier() -> Task:
    backbone = {'type': create_model, 'num_classes': 5, **SMALL}
    return ImageClassifier(backbone=backbone, head={'type': OwnClassifier, 'num_classes': 5}, preprocess=PIXELS)


def restorer() -> Task:
    return Restorer(backbone=PYRAMID, head={'type': UNetRestorer, 'channels': 8}, preprocess={'type': Preprocess})


QUERIES = {'channels': 16, 'mask_channels': 8, 'encoder_layers': 1, 'encoder_hidden': 16, 'decoder_layers': 3,
           'hidden': 16, 'num_heads': 4, 'num_queries': 8, 'loss_points': 50,
           'things': 2, 'score_threshold': 0.0}  # fmt: skip


def universal(**head) -> Task:
    """Mask2Former with seeds, or another head."""
    head = head or {'type': Mask2Former, 'num_classes': 4, 'num_seeds': 4, **QUERIES}
    return UniversalSegmentor(backbone=PYRAMID, head=head, preprocess=PIXELS)


def oneformer() -> Task:
    return universal(type=OneFormer, classes=('a', 'b', 'c', 'd'), text_channels=64, text_layers=1, class_layers=1,
                     context=2, **QUERIES)  # fmt: skip


def kmax() -> Task:
    return universal(type=KMaXDeepLab, num_classes=4, things=2, num_queries=8, depths=(1, 1, 1, 1),
                     channels=(8, 8, 8, 8), decoder_depths=(1, 1), mask_threshold=0.0, overlap_threshold=0.0,
                     thing_threshold=0.0, stuff_threshold=0.0)  # fmt: skip


TASKS = [classifier, own_classifier, detector, segmentor, restorer, universal, oneformer, kmax]
