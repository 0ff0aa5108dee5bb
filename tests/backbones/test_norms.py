"""Without this a norm of another kind (batch, PRepBN, unified) would work in the families that were tried alone, and
reach only some blocks of others."""

import pytest
import torch
from families import each_model
from torch import nn

from densezoo.backbones import create_model
from densezoo.backbones.layers.rep_norm import PRepBN
from densezoo.backbones.registry import constructor_arguments, model_class
from densezoo.deploy import fuse_for_deploy


def blocks(model):
    """(name, module) of every block."""
    return [(name, model.get_submodule(name)) for group in model.block_names() for name in group]


@pytest.mark.parametrize('name', each_model())
def test_every_family_takes_any_norm(name):
    """Every block has it, all parameters learn, and what deployment folds gives the same."""
    torch.manual_seed(0)
    reduced = model_class(name).reduced
    if 'norm' not in constructor_arguments(name):
        model = create_model(name, **reduced)
        assert not any(isinstance(module, nn.LayerNorm) for _, block in blocks(model) for module in block.modules())
        return
    model, usual = (create_model(name, **{**reduced, 'norm': n, 'num_classes': 5}) for n in ('prepbn', 'layer'))
    for block, usual_block in blocks(usual):
        if any(isinstance(module, nn.LayerNorm) for module in usual_block.modules()):
            assert any(isinstance(module, PRepBN) for module in model.get_submodule(block).modules()), block
    model.train()
    size = (64, 96) if model.sizes.dynamic else model.sizes.height_width
    x = torch.randn(2, 3, *size)
    model(x).square().mean().backward()
    assert not [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.eval()
    with torch.no_grad():
        expected, fused = model(x), fuse_for_deploy(model)
        torch.testing.assert_close(fused(x), expected, rtol=0, atol=1e-5 * max(expected.abs().max().item(), 1.0))
