"""What every registered backbone must do, written once: a model is tested by being registered.

Classes declare what differs (`sizes`, `min_dynamic_size`, `new_in_dense`, `reduced`); there are no lists of exceptions
here. By default one reduced representative of each family runs; `-m slow` runs every name.
"""

import copy
import inspect
import logging

import pytest
import timm
import torch
from families import each_kind, each_model
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay

from densezoo.backbones import create_model, list_models, load_checkpoint
from densezoo.backbones.registry import constructor_arguments, model_class
from densezoo.deploy import export_program

# graphs are traced in the dense form by default, of classifiers too among the slow ones
DENSE = pytest.mark.parametrize('features_only', [pytest.param(False, marks=pytest.mark.slow), True])
EACH = pytest.mark.parametrize('name', each_model())


def small(name, features_only=False, **overrides):
    """A reduced copy with seeded weights, in evaluation mode."""
    cls = model_class(name)
    torch.manual_seed(0)
    model = create_model(name, features_only=features_only, **{**cls.reduced, 'num_classes': 7, **overrides}).eval()
    with torch.no_grad():  # scales that start near 0 would hide the branches
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1 and parameter.requires_grad:
                parameter.copy_(torch.rand_like(parameter) + (0.5 if not key.endswith('bias') else -0.5))
    return model


def sizes_of(model, *wanted):
    """The wanted sizes if the model takes any, else the one it takes."""
    return list(wanted) if model.sizes.dynamic else [model.sizes.height_width]


def one_size(model):
    return sizes_of(model, (64, 96))[0]


def images(model, batch=2, size=None, seed=1):
    height, width = size or one_size(model)
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def close(ours, expected, tolerance=1e-5):
    for a, b in zip(as_list(ours), as_list(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(b.abs().max().item(), 1e-3))


def as_list(x):
    return list(x) if isinstance(x, list | tuple) else [x]


@EACH
@torch.no_grad()
def test_pyramid_at_any_size(name):
    model = small(name, features_only=True)
    for height, width in sizes_of(model, (32, 32), (33, 65), (200, 264)):
        maps = model(images(model, 1, (height, width)))
        assert model.feature_info.reduction() == list(model.strides)
        channels = model.feature_info.channels()
        assert [tuple(m.shape) for m in maps] == [
            (1, c, -(-height // s), -(-width // s)) for c, s in zip(channels, model.strides, strict=True)
        ]
        assert all(m.isfinite().all() for m in maps)


@EACH
def test_other_sizes_are_refused_in_one_line(name):
    model = small(name)
    height, width = (31, 64) if model.sizes.dynamic else (model.sizes.height_width[0] + 32, 64)
    with pytest.raises(ValueError, match=rf'^images must be .* got size=\({height}, {width}\)') as caught:
        model(images(model, 1, (height, width)))
    assert '\n' not in str(caught.value)
    with pytest.raises(ValueError, match=r'^images must be \(B, 3, H, W\), got .*\(2, 4, 64, 64\)'):
        model(torch.randn(2, 4, 64, 64))


@EACH
@torch.no_grad()
@pytest.mark.parametrize('features_only', [False, True])
def test_batch_equals_single_images(name, features_only):
    model = small(name, features_only=features_only)
    for size in sizes_of(model, (33, 65)):
        x = images(model, 3, size)
        together = as_list(model(x))
        alone = [as_list(model(x[i : i + 1])) for i in range(3)]
        close(together, [torch.cat(level) for level in zip(*alone, strict=True)])


@EACH
@torch.no_grad()
def test_maps_are_contiguous_at_stage_borders(name):
    model, seen = small(name, features_only=True), []
    groups = model.block_names()
    for group in groups:
        model.get_submodule(group[0]).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(images(model))
    assert len(seen) == len(groups) >= 3
    assert all(m.is_contiguous() and m.shape[-1] in model.feature_info.channels() for m in seen)


@EACH
@torch.no_grad()
def test_classifier_interface(name):
    model = small(name)
    x = images(model)
    logits = model(x)
    assert logits.shape == (2, 7)
    features = model.forward_features(x)
    channels = features.shape[1 if features.ndim == 4 else -1]  # a map, or tokens
    assert channels == model.num_features == model.feature_info.channels()[-1]
    close(model.forward_head(features), logits)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    last, maps = model.forward_intermediates(x)
    assert len(maps) == len(model.feature_info.out_indices) >= 3
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    close(last, features)
    close(model.forward_intermediates(x, [1, -1], intermediates_only=True), [maps[1], maps[-1]])
    nhwc = model.forward_intermediates(x, 1, output_fmt='NHWC', intermediates_only=True)
    close(nhwc[0].permute(0, 3, 1, 2), maps[-1])
    assert all(layer.out_features == 7 for layer in as_list(model.get_classifier()))
    model.reset_classifier(5)
    assert model(x).shape == (2, 5) and model.num_classes == 5
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)


@EACH
@torch.no_grad()
def test_classifier_weights_load_into_the_dense_form(name, caplog):
    classifier, dense = small(name), small(name, features_only=True)
    with caplog.at_level(logging.INFO, 'densezoo'):
        load_checkpoint(dense, classifier.state_dict())
    assert len(caplog.records) == 1 and 'head' in caplog.text and '\n' not in caplog.records[0].getMessage()
    theirs = classifier.state_dict()
    shared = [key for key in dense.state_dict() if key in theirs]
    assert shared and all(torch.equal(dense.state_dict()[key], theirs[key]) for key in shared)
    assert all(key.startswith(dense.new_in_dense) for key in dense.state_dict() if key not in theirs)
    x = images(dense)
    raw = [model.forward_intermediates(x, intermediates_only=True) for model in (dense, classifier)]
    if dense.same_maps_in_dense:
        close(*raw)
    with pytest.raises(ValueError, match='missing'):
        load_checkpoint(classifier, dense.state_dict())


@EACH
@pytest.mark.parametrize('features_only', [False, True])
def test_gradient_to_every_parameter(name, features_only):
    model = small(name, features_only=features_only).train()
    x = images(model).requires_grad_()
    sum(m.square().sum() for m in as_list(model(x))).backward()
    assert x.grad.abs().max() > 0
    without = [key for key, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not without
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@EACH
def test_out_indices_build_what_they_need(name):
    model = small(name, features_only=True, out_indices=(1, 2)).train()
    assert model.feature_info.reduction() == list(model.strides[1:3])
    maps = model(images(model))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    sum(m.square().sum() for m in maps).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    load_checkpoint(model, small(name).state_dict())
    load_checkpoint(model, small(name, features_only=True).state_dict())


@EACH
@torch.no_grad()
@DENSE
def test_compiles_into_one_graph(name, features_only):
    torch._dynamo.reset()
    model = small(name, features_only=features_only)
    x = images(model)
    close(torch.compile(model, fullgraph=True, backend='aot_eager')(x), model(x))


@torch.no_grad()
def test_inductor():
    """Generated code for one family; the graphs of all go through aot_eager above."""
    torch._dynamo.reset()
    model = small('poolformer_s12', features_only=True, depths=(1, 1, 1, 1), out_indices=(0, 1))
    x = images(model)
    close(torch.compile(model, fullgraph=True)(x), model(x), 1e-4)


@EACH
@torch.no_grad()
@DENSE
def test_exports_with_dynamic_batch(name, features_only):
    model = small(name, features_only=features_only)
    program = export_program(model, images(model, 1), dynamic_batch=True).module()
    for batch in (1, 3):
        x = images(model, batch)
        close(program(x), model(x))


@pytest.mark.parametrize('name', each_kind())
@torch.no_grad()
@DENSE
def test_exports_with_dynamic_batch_and_size(name, features_only):
    model = small(name, features_only=features_only)
    smallest = model.min_dynamic_size
    example = images(model, 1, sizes_of(model, (max(64, smallest), max(96, smallest)))[0])
    program = export_program(model, example, dynamic_batch=True, dynamic_size=model.sizes.dynamic).module()
    for size in sizes_of(model, (smallest, smallest + 30), (197, 133)):
        for batch in (1, 3):
            x = images(model, batch, size)
            close(program(x), model(x))


@EACH
@torch.no_grad()
def test_channels_last(name):
    model = small(name, features_only=True)
    x = images(model)
    expected = model(x)
    close(model(x.contiguous(memory_format=torch.channels_last)), expected)
    close(model.to(memory_format=torch.channels_last)(x), expected)


@EACH
@pytest.mark.parametrize('features_only', [False, True])
def test_bf16_autocast(name, features_only):
    model = small(name, features_only=features_only)
    x = images(model)
    expected = as_list(model(x))
    with torch.autocast('cpu', torch.bfloat16):
        ours = as_list(model(x))
        with torch.no_grad():
            inference = as_list(model(x))
    close([m.float() for m in ours], expected, 0.05)
    close([m.float() for m in inference], expected, 0.05)
    sum(m.float().square().sum() for m in ours).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@EACH
@torch.no_grad()
def test_state_dict_round_trip(name, tmp_path):
    model = small(name)
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    torch.manual_seed(9)
    again = create_model(name, checkpoint_path=str(tmp_path / 'model.pth'), num_classes=7, **model.reduced).eval()
    x = images(model)
    assert torch.equal(again(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@EACH
def test_checkpointing_changes_nothing(name):
    model = small(name, features_only=True).train()
    x = images(model)
    gradients, calls = [], []
    first = model.get_submodule(model.block_names()[1][0])
    first.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad(set_to_none=True)
        sum(m.square().mean() for m in model(x)).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    close(gradients[1], gradients[0])
    assert len(calls) == 3  # once, then once forward and once more for the gradients


@EACH
def test_parameter_groups(name):
    for features_only in (False, True):
        model = small(name, features_only=features_only)
        for coarse in (False, True):
            layers = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
            assert layers.keys() == {key for key, _ in model.named_parameters()}
            groups = model.block_names()
            blocks = [name for group in groups for name in group]
            assert max(layers.values()) + 1 <= 2 + len(groups if coarse else blocks)
            own = {name: {i for key, i in layers.items() if key.startswith(f'{name}.')} for name in blocks}
            assert all(len(ids) == 1 for ids in own.values())
            first = [min(own[group[0]]) for group in groups]
            assert min(layers.values()) < first[0] and first == sorted(set(first))
            last_block = max(own[blocks[-1]])
            assert all(layer == last_block for key, layer in layers.items() if key.startswith('norm.'))
            assert all(
                layer == max(layers.values())
                for key, layer in layers.items()
                if key.startswith(('head.', *model.new_in_dense))
            )
        names = {key for key, _ in model.named_parameters()}
        assert model.no_weight_decay() <= names
        groups = param_groups_layer_decay(model, layer_decay=0.7)
        assert sum(len(group['params']) for group in groups) == sum(p.requires_grad for p in model.parameters())


@EACH
def test_drop_path_schedule(name):
    model = small(name, drop_path_rate=0.3)
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == 'DropPath']
    assert rates and rates[-1] == pytest.approx(0.3) and rates == sorted(rates)
    assert rates[0] == (0 if model.drop_path_rises else rates[-1])
    x = images(model)
    assert torch.equal(model(x), model(x))  # evaluation drops nothing
    assert model.train()(x).shape == (2, 7)


@EACH
def test_metadata_and_parameters(name):
    with torch.device('meta'):
        model = create_model(name)
        if model.default_cfg['num_classes'] != 1000:  # as published
            model = create_model(name, num_classes=model.default_cfg['num_classes'])
    cfg, published = model.default_cfg, model.metadata
    assert cfg['architecture'] == name
    assert model.get_submodule(cfg['first_conv']).in_channels == 3
    named = [model.get_submodule(name) for name in as_list(cfg['classifier'])]
    assert all(a is b for a, b in zip(named, as_list(model.get_classifier()), strict=True))
    assert published['licence'] and published['paper'].startswith('https://arxiv.org/')
    assert (name in list_models(pretrained=True)) == bool(cfg.get('url') or published['page'])
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    whole = isinstance(published['params'], int)  # as many decimals as were published
    assert millions == pytest.approx(published['params'], abs=0.6 if whole else 0.1)
    assert all(p.is_meta for p in model.parameters())


@EACH
def test_signature_is_closed(name):
    cls = model_class(name)
    for parameter in inspect.signature(cls).parameters.values():
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, f'{cls.__name__}({parameter}) must be keyword-only'
    accepted = constructor_arguments(name).keys()
    assert {'features_only', 'out_indices', 'drop_path_rate', 'pretrained', *cls.reduced} <= accepted
    with pytest.raises(TypeError, match=r'drop_path_rat.*did you mean drop_path_rate'):
        create_model(name, drop_path_rat=0.1)


@EACH
def test_known_to_timm(name):
    assert timm.is_model(name)
    if timm.models.model_entrypoint(name).__module__ == 'densezoo.backbones.timm_entries':
        with torch.device('meta'):
            model = timm.create_model(name, features_only=True, out_indices=(2, 3))
        assert type(model).__module__.startswith('densezoo.')
        assert model.feature_info.reduction() == list(model.strides[2:])
