"""A classifier on your folders of images: <root>/{train,val}/<class>/*.jpg."""

from mmengine.config import read_base
from torchvision.transforms import v2

from densezoo.backbones import create_model
from densezoo.data import ImageFolder
from densezoo.heads import LinearClassifier
from densezoo.train import ImageClassifier, Preprocess
from densezoo.train.evaluators import Accuracy

with read_base():
    from .._base_.schedule_custom import *

model = dict(
    type=ImageClassifier,
    backbone=dict(type=create_model, name='caformer_s18', pretrained=True, features_only=True, out_indices=(3,)),
    head=dict(type=LinearClassifier, num_classes=10, label_smoothing=0.1),
    preprocess=dict(type=Preprocess, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375)),
)
train_dataloader = dict(
    batch_size=32,
    num_workers=4,
    persistent_workers=True,
    dataset=dict(
        type=ImageFolder,
        root='data',
        split='train',
        transforms=[
            dict(type=v2.RandomResizedCrop, size=(224, 224), scale=(0.3, 1.0), interpolation='bicubic'),
            dict(type=v2.RandomHorizontalFlip),
            dict(type=v2.RandAugment, num_ops=2, magnitude=9),
        ],
    ),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=4,
    dataset=dict(
        type=ImageFolder,
        root='data',
        split='val',
        transforms=[
            dict(type=v2.Resize, size=224, interpolation='bicubic'),
            dict(type=v2.CenterCrop, size=224),
        ],
    ),
)
val_evaluator = dict(type=Accuracy, topk=(1, 5))
