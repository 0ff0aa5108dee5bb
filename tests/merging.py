"""The authors' arithmetic of LIT's token merging, where ours differs from it; shared by the tests of its families."""

import torch
import torch.nn.functional as F


def without_padding(model):
    """The authors' arithmetic at sizes where their layers drop the border."""
    for module in model.modules():
        if hasattr(module, 'drops_border'):
            module.drops_border = False
    return model


def transposed(self, x):
    """Token merging in the authors' layout, tokens as a transposed view. For one image PyTorch's batch norm in
    evaluation mode then returns a wrong gradient on a CPU, which the recorded gradients went through."""
    x = self.norm_layer(self.dconv(x.permute(0, 3, 1, 2).contiguous()).contiguous())
    return F.gelu(x).flatten(2).transpose(1, 2).unflatten(1, x.shape[-2:])


class TransposedGradient(torch.autograd.Function):
    """Changes nothing but the layout in which the gradient of one image (1, C, H, W) arrives: that of `transposed`."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        _, C, H, W = gradient.shape
        return gradient.permute(0, 2, 3, 1).contiguous().as_strided((1, C, H, W), (C, 1, W * C, C))
