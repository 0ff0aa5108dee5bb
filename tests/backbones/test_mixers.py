"""Without this a mixer could work in its own family alone, though a config may name it in any."""

import pytest
import torch

from densezoo.backbones import create_model
from densezoo.backbones.layers import MIXERS
from densezoo.backbones.registry import model_class

SMALL = {'depths': (1, 2, 1, 1), 'dims': (16, 32, 32, 64), 'num_classes': 3}
HEADS = {'num_heads': (2, 2, 2, 4)}
# one family of each kind: MetaFormer, windows, pyramid attention
FAMILIES = {'convformer_s18': {}, 'swin_tiny_patch4_window7_224': {**HEADS, 'window_size': 2}, 'pvt_v2_b0': HEADS}


def pairs():
    """Each mixer in each family: by default in one of them, which differs from mixer to mixer."""
    for n, mixer in enumerate(sorted(MIXERS.keys() - {'random'})):  # for one size: see test_registry.py
        for f, name in enumerate(FAMILIES):
            yield pytest.param(name, mixer, marks=[] if f == n % len(FAMILIES) else [pytest.mark.slow])


@pytest.mark.parametrize(('name', 'mixer'), pairs())
def test_every_mixer_in_every_kind_of_family(name, mixer):
    torch.manual_seed(0)
    options = {**SMALL, **FAMILIES[name], 'mixers': mixer, 'img_size': 64}
    model = create_model(name, features_only=True, **options)
    x = torch.randn(1, 3, 64, 96)
    sum(level.square().mean() for level in model(x)).backward()
    blocks = [block for stage in model.stages for block in stage if hasattr(block, 'token_mixer')]
    assert all(isinstance(block.token_mixer, MIXERS[mixer]) for block in blocks)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        maps = model.eval()(torch.randn(1, 3, 40, 72))
    assert [tuple(level.shape[1:]) for level in maps] == [(16, 10, 18), (32, 5, 9), (32, 3, 5), (64, 2, 3)]


@pytest.mark.parametrize('norm', ['prepbn', 'unified'])
@pytest.mark.parametrize('name', ['swin_tiny_patch4_window7_224', 'pvt_v2_b0', 'twins_svt_small', 'crossformer_tiny'])
def test_norms_that_fold_in_other_families(name, norm):
    torch.manual_seed(0)
    model = create_model(name, **{**model_class(name).reduced, 'num_classes': 3, 'norm': norm})
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        x = torch.randn(3, 3, 64, 64)
        logits = model.eval()(x)
        torch.testing.assert_close(logits[:1], model(x[:1]), rtol=0, atol=1e-4 * logits.abs().max().item())
