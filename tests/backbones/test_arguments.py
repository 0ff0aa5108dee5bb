"""Without this an override that no model can be built with would end in a traceback from inside PyTorch, or in a model
that fails at its first image."""

import golden
import probe
import pytest
import torch
from families import each_model

from densezoo.backbones import create_model, list_models, load_checkpoint
from densezoo.backbones.registry import constructor_arguments, model_class

EACH = pytest.mark.parametrize('name', each_model())
SIDES = ('window_size', 'group_size', 'split_size', 'sr_ratios', 'reductions')


def build(name, **overrides):
    """A reduced copy without memory."""
    with torch.device('meta'):
        return create_model(name, **{**model_class(name).reduced, **overrides})


def refused(name, match, **overrides):
    with pytest.raises((ValueError, TypeError), match=match) as caught:
        build(name, **overrides)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('name', [p for p in each_model() if 'num_heads' in constructor_arguments(p.values[0])])
def test_heads_divide_the_width(name):
    if not any(hasattr(module, 'num_heads') for module in build(name).modules()):
        build(name, num_heads=7)  # inherited by a family whose mixers have no heads
        return
    for value in (7, 0):
        refused(name, r'num_heads must .*got num_heads=[70]\b', num_heads=value)
    refused(name, r'num_heads must .*got num_heads=(7\b|\(7, 7, 7, 7\))', num_heads=(7, 7, 7, 7))


@EACH
def test_windows_fit_their_maps(name):
    sides = [side for side in SIDES if side in constructor_arguments(name)]
    if not model_class(name).staged:
        for side in sides:
            for value in (1.5, (1, 1)):
                refused(name, rf'^{side} must be a whole number, got {side}=', **{side: value})
        return
    for side in sides:
        ending = r'pass img_size= for larger images$'
        refused(
            name,
            rf'^{side} must be at most 16, the side of the largest map at .*got {side}=17; {ending}',
            **{side: 17, 'img_size': 64},
        )
        refused(
            name,
            rf'^{side} must be at most 2, the side of the map of stage 3 at img_size=\(64, 64\), .*; {ending}',
            **{side: (1, 1, 1, 3), 'img_size': 64},
        )
        refused(name, rf'^{side} must be .*got {side}=1.5', **{side: 1.5})
        refused(name, rf'^{side} must be one value or 4, one per stage', **{side: (1, 1)})


@EACH
def test_numbers(name):
    refused(name, r'^num_classes must be a whole number from 0 on, got num_classes=-1', num_classes=-1)
    refused(name, r'^in_chans must be a whole number from 1 on, got in_chans=0', in_chans=0)
    refused(name, r'^drop_path_rate must be from 0 to below 1, got drop_path_rate=2.0', drop_path_rate=2.0)
    refused(name, r'^drop_rate must be from 0 to below 1, got drop_rate=-0.1', drop_rate=-0.1)
    if model_class(name).staged:
        refused(name, r'^depths must be [34] positive numbers.*got depths=3', depths=3)
        refused(name, r'^dims must be [34] positive numbers.*got dims=\(8, 16\)', dims=(8, 16))
    else:
        refused(name, r'^depth must be a positive whole number, got depth=0', depth=0)
        refused(name, r'^dim must be a positive whole number, got dim=-8', dim=-8)
    for size in (31, '224', (224, 224, 3), (224, 16)):
        refused(name, r'^img_size must be one or two whole numbers from 32 on, got img_size=', img_size=size)
    for ratio in {'mlp_ratio', 'mlp_ratios'} & set(constructor_arguments(name)):
        refused(name, rf'^{ratio} must be positive, got {ratio}=-1', **{ratio: -1})
    if 'mixers' in constructor_arguments(name):
        refused(name, r'^mixers must be a name or dict.*got mixers=3', mixers=3)


def test_windows_as_large_as_the_map_are_built():
    for name in ('swin_tiny_patch4_window7_224', 'davit_tiny', 'tiny_vit_5m_224', 'twins_svt_small', 'cswin_tiny'):
        side = 'split_size' if 'cswin' in name else 'window_size'
        build(name, img_size=64, **{side: 16})
        build(name, img_size=64, **{side: (16, 8, 4, 2)})
        build(name, img_size=(64, 96), **{side: 24})  # of a map of 16 x 24


@pytest.mark.parametrize(
    ('name', 'overrides', 'match'),
    [
        ('fmvit_t', {'kernel': 4}, 'kernel must be odd and groups positive, got kernel=4, groups=4'),
        ('fmvit_t', {'reductions': (8, 4, 0, 1)}, r'reductions must be positive .*got reductions=\(8, 4, 0, 1\)'),
        ('fmvit_t', {'periods': -1}, 'periods not negative, got .*periods=-1'),
        (
            'efficientvit_cls_b0',
            {'head_widths': (1,)},
            r'head_widths must be two positive numbers, got head_widths=\(1,\)',
        ),
        ('efficientvit_cls_b0', {'stem_dim': 0}, 'stem_dim must be a whole number from 1 on, got stem_dim=0'),
        ('twins_pcpvt_small', {'padding': 'masc'}, "padding must be one of .*got 'masc'; did you mean mask"),
    ],
)
def test_what_single_families_refuse(name, overrides, match):
    refused(name, match, **overrides)


def first_recorded():
    """The first recorded model of each class that has several."""
    seen = set()
    for path in sorted(probe.GOLDENS.glob('*.json')):
        name = golden.registered_name(path.stem)
        if name in list_models() and not golden.ending(path.stem) and model_class(name) not in seen:
            seen.add(model_class(name))
            yield path.stem


def of_another_size(stem):
    """A model of the same class and classes with another number of parameters, or None."""
    recorded, name = probe.load(stem), golden.registered_name(stem)
    with torch.device('meta'):
        classes = golden.create(stem).num_classes
        for other in list_models():
            if model_class(other) is model_class(name):
                model = create_model(other, num_classes=classes)
                if abs(sum(p.numel() for p in model.parameters()) / recorded['params'] - 1) > 0.1:
                    return other, model
    return None


def test_weights_of_another_variant_are_one_line():
    refused_classes = 0
    for stem in first_recorded():
        found = of_another_size(stem)
        if found is None:  # a class of one size
            continue
        other, model = found
        state = {key: torch.empty(shape) for key, shape in probe.load(stem)['state_dict'].items()}
        with pytest.raises(
            ValueError, match=rf'^the state dict does not fit {other}: (missing|unexpected|of another)'
        ) as caught:
            load_checkpoint(model, state)
        assert '\n' not in str(caught.value) and len(str(caught.value)) < 1200
        refused_classes += 1
    assert refused_classes >= 25
