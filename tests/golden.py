"""Runs a backbone on the cases of a recorded reference; shared by the tests of whole models and of families."""

import re
from functools import lru_cache
from typing import Any

import probe
import pytest
import torch
from torch import nn

from densezoo.backbones import create_model, load_checkpoint

# ending of a file name -> arguments of create_model
FORMS: dict[str, dict[str, Any]] = {
    '': {},
    'dense': {'features_only': True},
    'dense_det': {'features_only': True, 'dense': 'det'},
    'dense_seg': {'features_only': True, 'dense': 'seg'},
}
# Families whose gradients were recorded through an error of PyTorch's (batch norm in evaluation mode, one image, on a
# CPU, gradients that arrive transposed): their own test files compare them, in the layout that meets the error. SReT's
# are compared there too, as its authors name a shared block once for each of its runs.
OWN_GRADIENTS = ('dhvt', 'lit', 'litv2', 'sret', 'stvit')
# recorded gradients that a fault of PyTorch's batch norm spoilt: see their family's tests
SPOILT = {('tiny_vit_5m_224', 'grad_224'), ('vit_tiny_hmlp_stem_d4', 'grad_224')}
# recorded with permutations that the authors draw in evaluation too: SReT's tests draw the same ones
SPOILT |= {('SReT_T', 'logits_224'), ('SReT_LT', 'logits_224')}
_STRIDES = {'c2': 4, 'c3': 8, 'c4': 16, 'c5': 32}


def registered_name(stem: str) -> str:
    """The model's name out of a file name."""
    return stem.split('__')[0].lower()


def ending(stem: str) -> str:
    """What follows the model's name in a file name."""
    return stem.partition('__')[2]


def create(stem: str, **overrides: Any) -> Any:
    """The model that a file describes, in the form that its ending names."""
    classes = (probe.load(stem).get('config') or {}).get('num_classes', 1000)
    return create_model(registered_name(stem), **{**FORMS.get(ending(stem), {}), 'num_classes': classes, **overrides})


@lru_cache(1)
def build(stem: str, **overrides: Any) -> Any:
    """The same with the recorded weights, in evaluation mode."""
    return load_checkpoint(create(stem, **overrides).eval(), probe.golden_state(probe.load(stem)))


def case(recorded: dict[str, Any], name: str) -> dict[str, Any]:
    """The case called `name`."""
    return next(case for case in recorded['cases'] if case['name'] == name)


def is_plain(case: dict[str, Any]) -> bool:
    """Whether a case is logits, maps or gradients of the model as it is, at a size whose maps the authors do not cut.

    Where authors round odd sizes down, our pyramid pads, so there is nothing to compare at those sizes.
    """
    if not re.fullmatch(r'(logits|features|grad)_\d+(x\d+)?(_seed\d+|_b)?', case['name']):
        return False
    height, width = case['shape'][-2:]
    return all(
        case['outputs'][level]['shape'][-2:] == [-(-height // stride), -(-width // stride)]
        for level, stride in _STRIDES.items()
        if level in case['outputs']
    )


def run(model: Any, recorded: dict[str, Any], case: dict[str, Any]) -> None:
    """Compares what the model gives for a case with what was recorded.

    Raises:
        AssertionError: they differ by more than the tolerance.
    """
    gradient = case['name'].startswith('grad')
    x = probe.image(case['seed'], case['shape'])
    outputs = _gradients(model, recorded, case, x) if gradient else _forward(model, case, x)
    noise_name = 'fp32_vs_fp64_maxdiff_over_absmax' if gradient else 'fp32_vs_fp64_maxdiff_over_std'
    wanted = case['outputs']
    if 'logits' in wanted and not gradient:  # what lies before them is compared in the family's tests
        wanted = {'logits': wanted['logits']}
    wanted = {key: stored for key, stored in wanted.items() if key != 'c1'}  # stride 2: likewise
    assert outputs.keys() == wanted.keys()
    for key, stored in wanted.items():
        if not isinstance(stored, dict):
            assert outputs[key].item() == pytest.approx(stored, rel=1e-3)
            continue
        scale = stored['absmax' if gradient else 'std']
        noise = case.get(noise_name, {}).get(key, 0.0) * scale
        probe.compare(outputs[key], stored, noise, 1e-3 if gradient else 1e-4)


def _forward(model: Any, case: dict[str, Any], x: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        if 'logits' in case['outputs']:
            return {'logits': model(x)}
        maps = model(x) if model.features_only else model.forward_intermediates(x, intermediates_only=True)
        return dict(zip(_STRIDES, maps, strict=True))


def _gradients(
    model: nn.Module, recorded: dict[str, Any], case: dict[str, Any], x: torch.Tensor
) -> dict[str, torch.Tensor]:
    x.requires_grad_()
    model.zero_grad(set_to_none=True)
    logits = model(x)
    loss = logits.square().mean()
    loss.backward()
    names: Any = model.convert({key: key for key in recorded['state_dict']})  # type: ignore[operator]
    ours_of = {theirs: ours for ours, theirs in names.items()}
    parameters = dict(model.named_parameters())
    stored_loss = case['outputs']['loss']
    outputs = {
        'loss': loss.reshape(stored_loss['shape']) if isinstance(stored_loss, dict) else loss,
        'grad_input': x.grad,
    }
    if 'logits' in case['outputs']:
        outputs['logits'] = logits
    for key in case['outputs'].keys() - outputs.keys():
        gradient = parameters[ours_of[key.removeprefix('grad_')]].grad
        assert gradient is not None
        outputs[key] = gradient.reshape(case['outputs'][key]['shape'])
    return outputs  # type: ignore[return-value]
