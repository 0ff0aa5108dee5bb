"""Models in the form that computes the same with fewer operations, for inference alone.

A module that can be simplified says so itself: its method `for_deploy()` returns what replaces it in evaluation mode
(batch norm folded into its convolution, branches into one kernel, a position network into a table). Nothing here knows
a family. Convolutions followed by batch norm in an nn.Sequential are folded whosever they are.
"""

import copy
import itertools
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

_Model = TypeVar('_Model', bound=nn.Module)


def fuse_for_deploy(model: _Model) -> _Model:
    """A new model with equal outputs in evaluation mode; the argument is untouched.

    Args:
        model: any module; parts with a method `for_deploy` are replaced, from the innermost outwards.

    Returns:
        The simplified copy, in evaluation mode, without gradients.
    """
    fused = copy.deepcopy(model).eval()
    with torch.no_grad():
        fused = _replaced(fused, {})  # type: ignore[assignment]
    return fused.requires_grad_(False)


def _replaced(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module in done:  # a part used in several places stays one part
        return done[module]
    for name, child in module.named_children():
        simpler = _replaced(child, done)
        if simpler is not child:
            setattr(module, name, simpler)
    if isinstance(module, nn.Sequential):
        _fold_batch_norm(module)
    for_deploy = getattr(module, 'for_deploy', None)
    result = for_deploy() if callable(for_deploy) else module
    done[module] = result.eval()
    return result


def _fold_batch_norm(parts: nn.Sequential) -> None:
    for first, second in itertools.pairwise(parts._modules):
        conv, norm = parts._modules[first], parts._modules[second]
        if isinstance(conv, nn.Conv2d) and type(norm) is nn.BatchNorm2d:
            parts._modules[first] = fuse_conv_bn_eval(conv, norm)
            parts._modules[second] = nn.Identity()
