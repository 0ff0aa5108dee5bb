"""Models and files that the tests of exported forms share."""

import pytest
import torch

from densezoo.backbones import create_model
from densezoo.deploy import export_onnx


@pytest.fixture(scope='session')
def tiny():
    """A small classifier of pooling and attention blocks, and two images for it."""
    torch.manual_seed(0)
    model = create_model(
        'caformer_s18',
        depths=(1, 1, 1, 1),
        dims=(32, 32, 64, 64),
        mixers=('pool', 'conv', 'attention', 'attention'),
        num_classes=7,
    ).eval()
    return model, torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='session')
def tiny_onnx(tiny, tmp_path_factory):
    """Its ONNX file, with a dynamic batch."""
    model, images = tiny
    return export_onnx(model, images, tmp_path_factory.mktemp('onnx') / 'tiny.onnx', outputs=['logits'])
