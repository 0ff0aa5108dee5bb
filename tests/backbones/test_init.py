"""New weights. Without these tests a change of initialisation passes unseen: no golden covers it, since goldens fill in
their own weights, and a training that learns worse raises no error."""

import pytest
import torch
from torch import nn

from densezoo.backbones import create_model

SMALL = dict(features_only=True, depths=(1, 1, 1, 1), dims=(32, 64, 96, 128))


def layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    found = [
        (n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and m.weight.numel() > 2000
    ]
    assert len(found) >= 11
    return found


@pytest.mark.parametrize('name', ['caformer_s18', 'poolformerv2_s12'])
def test_published_init_has_one_deviation(name):
    torch.manual_seed(0)
    for layer, module in layers(create_model(name, **SMALL)):
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), layer


def test_output_norm_of_the_dense_form():
    """Raw maps of small random weights are too faint for a neck to start from."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    raw = create_model('caformer_s18', **SMALL)(x)
    normed = create_model('caformer_s18', output_norm='layer', **SMALL)(x)
    assert all(m.std() < 0.5 for m in raw[1:])
    assert all(m.std().item() == pytest.approx(1.0, abs=0.05) for m in normed)
    assert all(m.mean(1).abs().max() < 1e-5 for m in normed)
