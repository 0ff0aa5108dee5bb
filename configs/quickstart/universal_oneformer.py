"""quickstart/universal with OneFormer: a token tells the queries whether to answer semantically, by instances or
panoptically."""

from mmengine.config import read_base

from densezoo.heads import OneFormer

with read_base():
    from .universal import *

model['head'] = dict(
    type=OneFormer,
    classes=('background', '0', '1', '2', '3', '4', '5', '6', '7', '8', '9'),
    things=(1, 2, 3, 4, 5, 6, 7, 8, 9, 10),
    num_queries=20,
    channels=64,
    mask_channels=32,
    encoder_layers=1,
    encoder_hidden=128,
    decoder_layers=3,
    class_layers=1,
    hidden=128,
    num_heads=4,
    dropout=0.0,
    sub_pixel=2,
    length=24,
    text_channels=64,
    text_layers=1,
    context=4,
    task_scale=1 / 514,
    loss_points=576,
    lr_scale=0.25,
    class_weight=4.0,
    mask_weight=1.0,
    dice_weight=1.0,
    score_threshold=0.5,
    overlap_threshold=0.5,
    detections=20,
)
