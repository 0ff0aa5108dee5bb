"""Without this a deployed model could differ from the trained one, or fusing could change the trained one."""

import copy

import pytest
import torch
from families import each_model
from torch import nn
from torchvision.ops.misc import Conv2dNormActivation

from densezoo.backbones import create_model
from densezoo.backbones.registry import model_class
from densezoo.deploy import fuse_for_deploy


def trained(name, **options):
    """A reduced model whose scales, norms and running statistics are not at their start values."""
    cls = model_class(name)
    torch.manual_seed(0)
    model = create_model(name, **{**cls.reduced, **options}).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.ndim == 1 and tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(noise - 0.5 if key.endswith(('bias', 'mean')) else noise + 0.5)
    return model


def images(model):
    size = (64, 96) if model.sizes.dynamic else model.sizes.height_width
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))


def close(ours, expected):
    pairs = zip(ours, expected, strict=True) if isinstance(expected, list) else [(ours, expected)]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(b.abs().max().item(), 1.0))


@torch.no_grad()
@pytest.mark.parametrize('name', each_model())
def test_fused_equals_trained(name):
    model = trained(name, features_only=True).train()
    before = copy.deepcopy(model.state_dict())
    fused = fuse_for_deploy(model)
    assert model.training and not fused.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    x = images(model)
    close(fused(x), model.eval()(x))


def test_layer_scales_go_into_the_linear_layers():
    model = trained('poolformer_s12', layer_scale=0.1)
    scales = [module for module in fuse_for_deploy(model).modules() if type(module).__name__ == 'Scale']
    blocks = sum(len(stage) for stage in model.stages)
    assert len(scales) == blocks  # pooling has no layer that could take its scale
    model = trained('poolformer_s12', layer_scale=0.1, mixers='attention')
    assert not [module for module in fuse_for_deploy(model).modules() if type(module).__name__ == 'Scale']


def test_batch_norm_after_a_convolution_disappears():
    torch.manual_seed(0)
    model = nn.Sequential(Conv2dNormActivation(3, 8), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)).eval()
    for norm in (model[0][1], model[3]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    fused, x = fuse_for_deploy(model), torch.randn(2, 3, 9, 9)
    close(fused(x), model(x))
    kinds = [type(module).__name__ for module in fused.modules()]
    assert kinds.count('BatchNorm2d') == 1 and isinstance(model[0][1], nn.BatchNorm2d)


def test_a_shared_part_stays_shared():
    class Shares(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
            self.other = self.one

        def forward(self, x):
            return self.other(self.one(x))

    model = Shares().eval()
    fused, x = fuse_for_deploy(model), torch.randn(1, 3, 4, 4)
    close(fused(x), model(x))
    assert fused.one is fused.other and isinstance(fused.one[1], nn.Identity)
