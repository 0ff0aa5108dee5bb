"""quickstart/universal with kMaX-DeepLab: pixels are clustered by the queries."""

from mmengine.config import read_base

from densezoo.heads import KMaXDeepLab

with read_base():
    from .universal import *

model['head'] = dict(
    type=KMaXDeepLab,
    num_classes=11,
    things=(1, 2, 3, 4, 5, 6, 7, 8, 9, 10),
    num_queries=20,
    depths=(1, 1, 1, 1),
    channels=(64, 32, 16, 16),
    kinds=('axial', 'axial', 'bottleneck', 'bottleneck'),
    decoder_depths=(1, 1, 1),
    align_corners=False,  # 96 is no 32 k + 1
    auxiliary='none',  # the task's own serves
    # Maps of 24x24: all their pixels are compared.
    samples=576,
    thing_threshold=0.5,
    stuff_threshold=0.5,
    overlap_threshold=0.5,
    detections=20,
)
optim_wrapper['optimizer'].update(lr=2e-3)
