"""The digits of `classification` with a DHVT from scratch, in the same 1000 iterations; 0.54 million parameters.

One command trains both; `tools/results.py` puts the accuracies into one table of docs/results.md:

    for name in cct dhvt; do densezoo train quickstart/classification_$name; done
"""

from mmengine.config import read_base

from densezoo.backbones import create_model

with read_base():
    from .classification import *

# 8 x 8 tokens of a 32x32 scan, by two overlapping convolutions.
model['backbone'] = dict(
    type=create_model, name='dhvt_tiny_cifar_patch4', num_classes=10, depth=4, dim=96, drop_path_rate=0.05
)
