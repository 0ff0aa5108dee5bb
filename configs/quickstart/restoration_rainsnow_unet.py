"""`restoration_rainsnow` under the plain U-shaped decoder: what Histoformer's blocks are compared to."""

from mmengine.config import read_base

with read_base():
    from .restoration_rainsnow import *

# 55.9 thousand multiply-adds per pixel, Histoformer's 47.4
model['head'].update(block='residual', blocks=(1, 1, 1))
