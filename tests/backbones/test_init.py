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


def test_fan_in_init_follows_the_width():
    torch.manual_seed(0)
    for layer, module in layers(create_model('caformer_s18', init='fan_in', **SMALL)):
        assert module.weight.std().item() == pytest.approx(module.weight[0].numel() ** -0.5, rel=0.1), layer


def test_unknown_init_is_named():
    with pytest.raises(ValueError, match="init must be 'published' or 'fan_in', got init='xavier'"):
        create_model('caformer_s18', init='xavier', **SMALL)
