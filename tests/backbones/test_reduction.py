"""Without this a reduced model could fuse other tokens than the authors' code, change what it was made from, or lose
track of where a token went. Each method and each model is held to the same properties."""

import copy
import pickle
from functools import lru_cache
from typing import Any

import probe
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from densezoo.backbones import create_model, list_models, load_checkpoint, reduce_tokens
from densezoo.backbones.reduction import METHODS, recording, report, trace_tokens, unreduced
from densezoo.backbones.registry import model_class
from densezoo.deploy import OnnxModel, build_engine, export_onnx, export_program, fuse_for_deploy

# settings under which each method does something on four patches and more
SETTINGS: dict[str, dict[str, Any]] = {
    'tome': {'r': 2},
    'mctf': {'ratio': 0.3},
}
# one plain model of each kind of block that attends to all tokens: class token, distillation token, parallel branches
# with positions of patches alone, talking heads without prefix, pooling by attention, shared keys
MODELS = (
    'deit_tiny_patch16_224',
    'deit_tiny_distilled_patch16_224',
    'vit_tiny_paralx2_6x2',
    'cait_xxs24_224',
    'cct_7_3x1_32',
    'kvt_tiny_patch16',
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small(name: str, **arguments: Any) -> Any:
    reduced = {**model_class(name).reduced, **arguments}
    size = {} if 'cct' in name else {'img_size': 96}
    return create_model(name, num_classes=7, **size, **reduced).eval()


def images(model: Any, batch: int = 2) -> torch.Tensor:
    side = 32 if 'CCT' in type(model).__name__ else 96
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def close(ours: torch.Tensor, expected: torch.Tensor, relative: float = 1e-4) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=relative * max(float(expected.abs().max()), 1e-6))


# ---- the authors' values

TOME = ('tome_deit_tiny_patch16_224', 'tome_deit_tiny_distilled_patch16_224')
AHEAD = {0: 'none', 1: 'fused', 2: 'precise'}
POOLING = {0: 'size', 1: 'attention', 2: 'max', 3: 'mean'}


def settings_of(case: dict[str, Any]) -> dict[str, Any]:
    """`reduce_tokens`' settings of a recorded case."""
    if 'mctf_type' not in case:
        r = case['r']
        amount = {'r': r[0], 'inflect': r[1]} if case.get('r_is') == '(r,inflect)' else {'r': r}
        return {'method': 'tome', 'proportional': case['prop_attn'], **amount}
    given = case['mctf_type']
    r = case.get('r_eval', given[0])
    taus = dict(zip(('tau_sim', 'tau_info', 'tau_size'), given[5:8]))
    return {
        'method': 'mctf', ('ratio' if r < 1 else 'r'): r, 'layers': case['activate_layer'], **taus,
        'ahead': AHEAD[given[4]], 'proportional': bool(given[3]), 'both_ways': bool(given[8]),
        'pooling': POOLING[given[9]],
    }  # fmt: skip


@lru_cache(1)
def recorded(stem: str) -> tuple[Any, dict[str, Any]]:
    golden = probe.load(f'reduction/{stem}')
    model = create_model(stem.removeprefix('tome_') if 'tome' in stem else 'deit_tiny_patch16_224')
    return load_checkpoint(model.eval(), probe.golden_state(golden)), golden


def golden_cases():
    for stem in (*TOME, 'mctf_deit_tiny'):
        kept = ('r8', 'r16', 'r(8,1.0)', 'mctf_r16', 'mctf_fast_r0.35', 'precise', 'grad_224_r16', 'grad_224_mctf_r16')
        for case in probe.load(f'reduction/{stem}')['cases']:
            if case['mode'] == 'train' or ('r' not in case and 'mctf_type' not in case):
                continue
            usual = case['name'].removeprefix('logits_224_') in kept
            yield pytest.param(stem, case['name'], marks=[] if usual else [pytest.mark.slow])


@pytest.mark.parametrize(('stem', 'name'), golden_cases())
def test_authors_models(stem, name):
    model, golden = recorded(stem)
    case = next(case for case in golden['cases'] if case['name'] == name)
    settings, x = settings_of(case), probe.image(case['seed'], case['shape'])
    reduced = reduce_tokens(model, settings.pop('method'), **settings)
    if name.startswith('grad'):
        x.requires_grad_()
        loss = reduced(x).square().mean()
        loss.backward()
        wanted = case['outputs']
        parameters = dict(reduced.named_parameters())
        assert loss.item() == pytest.approx(wanted['loss']['mean'], rel=1e-4)
        probe.compare(x.grad, wanted['grad_input'], relative=1e-3)
        patches = parameters['patch_embed.conv.weight'].grad
        probe.compare(patches, wanted['grad_patch_embed.proj.weight'], relative=1e-3)
        probe.compare(
            parameters['blocks.8.attn.qkv.weight'].grad, wanted['grad_blocks.8.attn.qkv.weight'], relative=1e-3
        )
        return
    with torch.no_grad():
        logits = reduced(x)
        with recording(reduced) as tokens:
            in_full = reduced(x)
    probe.compare(logits, case['outputs']['logits'])
    close(in_full, logits, 1e-5)
    assert [each.x.shape[1] for each in tokens] == case['outputs']['tokens_per_block']
    if 'final_size' in case['outputs']:
        probe.compare(tokens[-1].size, case['outputs']['final_size'])


def test_timm_gives_the_same_as_ours():
    """Other weights' names and blocks, the same tokens."""
    model, _ = recorded(TOME[0])
    theirs = timm.create_model('deit_tiny_patch16_224').eval()
    theirs.load_state_dict(probe.golden_state(probe.load(f'reduction/{TOME[0]}')))
    x = probe.image(0, (2, 3, 224, 224))
    for method, settings in (('tome', {'r': 16}), ('mctf', {'r': 16})):
        with torch.no_grad():
            expected = reduce_tokens(model, method, **settings)(x)
            reduced = reduce_tokens(theirs, method, **settings)
            close(reduced(x), expected)
            close(reduced.forward_head(reduced.forward_features(x)), expected)
    assert type(theirs) is VisionTransformer and theirs(x).shape == (2, 1000)


# ---- properties of every method on every kind of model


def each():
    for method in SETTINGS:
        for name in MODELS:
            usual = name in MODELS[:2] or (method == 'mctf' and name in MODELS[2:4])
            yield pytest.param(method, name, marks=[] if usual else [pytest.mark.slow])


def test_every_method_is_tried():
    elsewhere = {'ats', 'pyra', 'sparsifiner', 'stvit', 'stvit_r'}  # test_ats.py, test_semantic_and_sparse_tokens.py
    assert METHODS.keys() == SETTINGS.keys() | elsewhere


@pytest.mark.parametrize(('method', 'name'), each())
@torch.no_grad()
def test_tokens_and_maps(method, name):
    model = small(name, features_only=True)
    x = images(model, 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(x)
    reduced = reduce_tokens(model, method, **SETTINGS[method])
    maps = reduced(x)
    assert [m.shape for m in maps] == [m.shape for m in expected]
    assert any(not torch.equal(a, b) for a, b in zip(maps, expected))
    assert all(torch.equal(a, b) for a, b in zip(model(x), expected)), 'the argument was changed'
    assert model.state_dict().keys() == before.keys() and reduced.state_dict().keys() >= before.keys()
    single = [reduced(x[i : i + 1]) for i in range(3)]
    for i, m in enumerate(maps):
        close(torch.cat([each[i] for each in single]), m)
    of_blocks = reduced.forward_intermediates(x, intermediates_only=True)
    assert [m.shape for m in of_blocks] == [m.shape for m in model.forward_intermediates(x, intermediates_only=True)]
    tokens = trace_tokens(reduced, x)
    assert len({each.x.shape[1] for each in tokens}) > 1
    for each in tokens:  # every patch lies in one token, which knows how many it stands for
        assert int(each.place.min()) >= 0 and int(each.place.max()) < each.x.shape[1]
        counts = torch.zeros(each.x.shape[:2]).scatter_add(1, each.place, torch.ones(each.place.shape))
        if each.size is not None:
            close(each.size[..., 0], counts)
        prefix = reduced.reduction.prefix
        assert (each.place[:, :prefix] == torch.arange(prefix)).all() and (counts[:, :prefix] == 1).all()


@pytest.mark.parametrize(('method', 'name'), each())
def test_nothing_removed_is_the_model_itself(method, name):
    model = small(name)
    x = images(model)
    with torch.no_grad():
        close(reduce_tokens(model, method, r=0)(x), model(x), 1e-5)


@pytest.mark.parametrize('method', SETTINGS)
def test_restoring_undoes_merging(method):
    """With blocks that add nothing maps are what was embedded, however many tokens became one."""
    reduced = reduce_tokens(small('deit_tiny_distilled_patch16_224'), method, **SETTINGS[method])
    for name, parameter in reduced.blocks.named_parameters():
        if '.proj.' in name or '.fc2.' in name:
            torch.nn.init.zeros_(parameter)
    with torch.no_grad(), recording(reduced) as states:
        tokens, grid = reduced.embed(images(reduced))
        restored, _ = reduced.run_blocks(tokens, grid)
    assert states[-1].x.shape[1] < tokens.shape[1] - 2
    close(restored, tokens, 1e-6)


@pytest.mark.parametrize('method', SETTINGS)
@torch.no_grad()
def test_all_tokens_again(method, tmp_path):
    """A block at which tokens are restored computes what the model's own block does with the restored ones."""
    model = small('deit_tiny_patch16_224')
    reduced = reduce_tokens(model, method, **SETTINGS[method], restore_at=2)
    x = images(model)
    tokens, grid = reduced.embed(x)
    kept, _ = reduced.run_blocks(tokens, grid, last=1)
    with recording(reduced) as states:
        again, _ = reduced.run_blocks(tokens, grid)
    assert states[1].x.shape[1] < tokens.shape[1]
    close(again, model.blocks[2](kept, grid))
    logits = reduced(x)
    close(logits, model.forward_head(model.norm(again)))
    close(OnnxModel(export_onnx(reduced, x, tmp_path / 'reduced.onnx'))(x), logits)
    pyramid = reduce_tokens(small('deit_tiny_patch16_224', features_only=True), method, target=0.97, restore_at=2)
    assert report(pyramid).tokens[2] == tokens.shape[1]


@pytest.mark.parametrize(('method', 'name'), each())
def test_train_checkpoint_and_drop_path(method, name):
    model = reduce_tokens(small(name, drop_path_rate=0.2), method, **SETTINGS[method]).train()
    x = images(model)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        logits = model(x)
        logits = sum(logits) if isinstance(logits, tuple) else logits
        logits.square().mean().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
    for key, gradient in gradients[0].items():
        assert gradient is not None, f'{key} takes no part'
        close(gradients[1][key], gradient)


@pytest.mark.parametrize('method', SETTINGS)
@torch.no_grad()
def test_copies_states_and_deployment(method, tmp_path):
    model = small('deit_tiny_patch16_224', layer_scale=0.1)
    reduced = reduce_tokens(model, method, **SETTINGS[method])
    x = images(model)
    expected = reduced(x)
    assert torch.equal(copy.deepcopy(reduced)(x), expected)
    close(pickle.loads(pickle.dumps(reduced))(x), expected, 1e-6)
    close(fuse_for_deploy(reduced)(x), expected)
    close(unreduced(reduced)(x), model(x), 1e-6)
    again = create_model(
        'deit_tiny_patch16_224', num_classes=7, img_size=96, layer_scale=0.1, **model.reduced,
        reduction={'type': method, **SETTINGS[method]},
    ).eval()  # fmt: skip
    torch.save(model.state_dict(), tmp_path / 'plain.pth')
    load_checkpoint(again, tmp_path / 'plain.pth')  # a reduced model takes the unreduced one's weights
    if not any(key.startswith('reduction.') for key in again.state_dict()):
        close(again(x), expected, 1e-6)
    with torch.autocast('cpu', torch.bfloat16):
        assert reduced(x).isfinite().all()


def one_by_default(usual: tuple[str, bool]):
    """Each method with logits and with maps; graphs take seconds."""
    for method in SETTINGS:
        for features_only in (False, True):
            slow = [] if (method, features_only) == usual else [pytest.mark.slow]
            yield pytest.param(method, features_only, marks=slow)


@pytest.mark.parametrize(('method', 'features_only'), one_by_default(('mctf', True)))
@torch.no_grad()
def test_compiled_and_exported(method, features_only, tmp_path):
    """Also what TensorRT refuses: an engine is built."""
    model = small('deit_tiny_distilled_patch16_224', features_only=features_only, depth=2)
    reduced = reduce_tokens(model, method, **SETTINGS[method])
    x = images(model, 3)
    expected = reduced(x)
    compiled = torch.compile(reduced, fullgraph=True, backend='aot_eager')(x)
    for ours, wanted in zip(compiled, expected):
        close(ours, wanted)
    path = export_onnx(reduced, x[:2], tmp_path / 'reduced.onnx')
    found = OnnxModel(path)(x)
    for ours, wanted in zip(found, expected):
        close(ours, wanted)
    assert build_engine(path, tmp_path / 'reduced.engine', batch=(1, 2, 4))['layers'] > 5
    static = export_onnx(reduced, x[:1], tmp_path / 'static.onnx', dynamic_batch=False)
    for ours, wanted in zip(OnnxModel(static)(x[:1]), reduced(x[:1])):
        close(ours, wanted)


@pytest.mark.slow
@pytest.mark.parametrize('method', SETTINGS)
@torch.no_grad()
def test_exported_timm_model(method):
    model = VisionTransformer(patch_size=16, img_size=64, embed_dim=32, depth=2, num_heads=2, num_classes=5).eval()
    reduced = reduce_tokens(model, method, **SETTINGS[method])
    x = torch.randn(2, 3, 64, 64)
    close(export_program(reduced, x).module()(x), reduced(x))


@pytest.mark.parametrize('method', SETTINGS)
@torch.no_grad()
def test_timm_models(method):
    """Registers, pooling by mean, layer scale, maps."""
    shape = {'img_size': 64, 'embed_dim': 32, 'depth': 3, 'num_heads': 2, 'num_classes': 5}
    x = torch.randn(2, 3, 64, 64)
    for more in ({'reg_tokens': 4, 'init_values': 0.1, 'qk_norm': True}, {'class_token': False, 'global_pool': 'avg'}):
        model = VisionTransformer(patch_size=16, **shape, **more).eval()
        reduced = reduce_tokens(model, method, **SETTINGS[method])
        logits = reduced(x)
        assert not torch.equal(logits, model(x))
        close(reduced.forward_head(reduced.forward_features(x)), logits)
        close(reduce_tokens(model, method, r=0)(x), model(x), 1e-5)
        final, maps = reduced.forward_intermediates(x, indices=2)
        assert final.shape == (2, 16 + model.num_prefix_tokens, 32) and [m.shape[1:] for m in maps] == [(32, 4, 4)] * 2
        close(unreduced(reduced)(x), model(x), 1e-6)
    pyramid = create_model('vit_tiny_patch16_224', features_only=True, out_indices=[2],
                           reduction={'type': method, **SETTINGS[method]})  # fmt: skip
    assert [m.shape for m in pyramid.eval()(torch.randn(1, 3, 224, 224))] == [(1, 192, 14, 14)]


# ---- schedules and the report


@pytest.mark.parametrize(
    ('settings', 'tokens'),
    [
        ({'r': 4}, [33, 29, 25]),
        ({'r': [4, 0, 8]}, [33, 33, 25]),
        ({'r': (6,)}, [31, 31, 31]),
        ({'r': 4, 'layers': (1,)}, [37, 33, 33]),
        ({'r': [4, 2], 'layers': (0, -1)}, [33, 33, 31]),
        ({'r': 4, 'inflect': -1.0}, [29, 25, 25]),
        ({'r': 30}, [19, 10, 6]),  # half of the patches at most
        ({'ratio': 0.25}, [28, 22, 17]),
        ({'ratio': [0.0, 0.5]}, [37, 19, 19]),
        ({'r': 4, 'restore_at': 2}, [33, 29, 37]),
        ({'r': 4, 'layers': (0,), 'restore_at': 1}, [33, 37, 37]),
    ],
)
def test_schedules(settings, tokens):
    model = reduce_tokens(small('deit_tiny_patch16_224'), 'tome', **settings)
    assert [each.x.shape[1] for each in trace_tokens(model, images(model))] == tokens


@pytest.mark.parametrize(('method', 'features_only'), one_by_default(('mctf', False)))
def test_targets(method, features_only):
    model = small('deit_tiny_patch16_224', depth=4, features_only=features_only)
    whole = None
    for target in (0.75,) if method == 'mctf' else (0.9, 0.7):
        found = report(reduce_tokens(model, method, target=target, img_size=128), img_size=128)
        assert target - 0.02 < found.share <= target
        assert whole in (None, found.unreduced_macs)
        whole = found.unreduced_macs
    assert 'GMACs' in str(found) and len(found.tokens) == 4


def test_report_counts():
    """Multiply-adds by hand, and those that a classifier carries out."""
    model = reduce_tokens(small('deit_tiny_patch16_224'), 'tome', r=4)
    D, tokens, after = 32, [37, 33, 29], [33, 29, 25]
    blocks = sum(4 * n * D * D + 2 * n * n * D + 8 * m * D * D for n, m in zip(tokens, after))
    similar = sum((n + 1) // 2 * (n // 2) * 16 for n in tokens)
    found = report(model, batch=2, repeats=1)
    assert found.macs == blocks + similar + 36 * 768 * D + D * 7
    assert found.macs_run < found.macs and found.tokens == (33, 29, 25)
    assert found.images_per_second > 0 and 'images/s' in str(found)
    assert report(model, images=images(model)).macs_of_images == (found.macs, found.macs)
    assert report(reduce_tokens(small('t2t_vit_7'), 'tome', r=4)).share < 1  # whose stem has no convolution
    with pytest.raises(ValueError, match=r'the model has no reduction, got DeiT; make one with reduce_tokens'):
        report(small('deit_tiny_patch16_224'))


# ---- errors

PATCHES = '36, the patches that there are'


@pytest.mark.parametrize(
    ('settings', 'error', 'text'),
    [
        ({'r': 37}, ValueError, rf'r must be at most {PATCHES} \(cls_token and dist_token stay\), got r=37'),
        ({'r': [2, 40]}, ValueError, rf'r must be at most {PATCHES}.*, got r=\[2, 40\]'),
        ({'r': 0.5}, TypeError, r'r must be a whole number of tokens, or one per block, got r=0.5'),
        ({'r': -1}, TypeError, r'r must be a whole number'),
        ({'r': [1, 1, 1, 1]}, ValueError, r'r must have at most 3 entries, one per block, got 4'),
        ({'ratio': 0.6}, ValueError, r'ratio must be from 0 to 0.5, what one block can remove, got ratio=0.6'),
        ({'r': 2, 'ratio': 0.1}, ValueError, r'state one of r, ratio and target, got r=2, ratio=0.1'),
        ({'r': 2, 'target': 0.5}, ValueError, r'state one of r, ratio and target, got target=0.5'),
        ({'target': 0.1}, ValueError, r'target must be at least 0\.\d+, the share of multiply-adds .*, got target=0.1'),
        ({'target': 3}, ValueError, r"target must be a share of the model's multiply-adds, above 0 and at most 1, got"),
        (
            {'r': 2, 'layers': (3,)},
            ValueError,
            r'layers must be increasing block numbers from 0 to 2, got layers=',
        ),
        ({'r': 2, 'restore_at': 3}, ValueError, r'restore_at must be a block from 1 to 2, got restore_at=3'),
        (
            {'r': 2, 'layers': (2,), 'restore_at': 2},
            ValueError,
            r'layers must be increasing block numbers from 0 to 1, got layers=',
        ),
        ({'r': 2, 'inflect': 2}, ValueError, r'inflect must be from -1 to 1, beside a whole number r'),
        ({'rr': 2}, TypeError, r"method 'tome' has no setting rr=2.*; it takes r, ratio"),
        ({'proportionate': 2}, TypeError, r'no setting proportionate=2; did you mean proportional\?'),
    ],
)
def test_bad_settings(settings, error, text):
    with pytest.raises(error, match=text) as caught:
        reduce_tokens(small('deit_tiny_distilled_patch16_224'), 'tome', **settings)
    assert '\n' not in str(caught.value)


def test_methods_that_drop_tokens_do_not_restore_them():
    with pytest.raises(
        ValueError, match=r"restore_at is for methods that merge tokens \(mctf, pyra, tome\), got .*'ats'"
    ):
        reduce_tokens(small('deit_tiny_patch16_224'), 'ats', layers=(1,), restore_at=2)


def test_bad_settings_of_mctf():
    model = small('deit_tiny_patch16_224')
    with pytest.raises(ValueError, match=r"pooling must be one of attention, size, max, mean, got pooling='sum'"):
        reduce_tokens(model, 'mctf', pooling='sum')
    with pytest.raises(ValueError, match=r'tau_sim must be 0 or positive, got tau_sim=-1'):
        reduce_tokens(model, 'mctf', tau_sim=-1)


def test_bad_models():
    model = small('deit_tiny_patch16_224')
    with pytest.raises(ValueError, match=r"method must be one of .*tome.*, got 'tom'; did you mean tome\?"):
        reduce_tokens(model, 'tom')
    with pytest.raises(ValueError, match=r"the model is reduced already, by 'tome'"):
        reduce_tokens(reduce_tokens(model, 'tome'), 'mctf')
    reasons = {
        'poolformer_s12': 'poolformer_s12 has no sequence of tokens to reduce, its blocks see maps',
        'gfnet_ti': r'gfnet_ti has no sequence of tokens to reduce: block 0 .* needs all tokens on their grid',
        'tnt_s_patch16_224': r'block 0 \(TNTBlock\) needs all tokens on their grid',
        'kvt_pos_tiny_patch16': r'block 0 \(KeyValueAttention\) needs all tokens on their grid',
    }
    for name, text in reasons.items():
        with torch.device('meta'), pytest.raises(ValueError, match=text):
            create_model(name, reduction={'type': 'tome'})
    with pytest.raises(
        ValueError, match=r'TokenAttention\) needs all tokens .*; build the model with window_size=None'
    ):
        reduce_tokens(small('deit_tiny_patch16_224', features_only=True, window_size=2, global_blocks=()), 'tome')
    with pytest.raises(ValueError, match=r'ResNet has no sequence of tokens to reduce'):
        reduce_tokens(timm.create_model('resnet18'), 'tome')
    with pytest.raises(ValueError, match=r"takes timm's Block with Attention"):
        reduce_tokens(timm.create_model('vit_base_patch16_xp_224'), 'tome')
    with pytest.raises(ValueError, match=r'sums its paths over all tokens'):
        reduce_tokens(small('deit_tiny_patch16_224', path_scale=1.0), 'tome')
    with pytest.raises(
        ValueError, match=r"reduction must be dict\(type=\.\.\., \.\.\.\) or None, got reduction='tome'"
    ):
        create_model('deit_tiny_patch16_224', reduction='tome')


def test_sizes_are_not_exported_dynamically():
    model = small('deit_tiny_patch16_224', features_only=True, reduction={'type': 'tome'})
    with pytest.raises(ValueError, match=r'dynamic_size needs a model with all its tokens: .* export it once per size'):
        export_program(model, images(model), dynamic_size=True)


@pytest.mark.slow
@pytest.mark.parametrize('name', list_models())
def test_every_model_is_reduced_or_refused(name):
    model = create_model(name, **model_class(name).reduced).eval()
    x = torch.randn(2, *model.default_cfg['input_size'])
    try:
        reduced = reduce_tokens(model, 'tome', ratio=0.2)
    except ValueError as error:
        assert 'to reduce' in str(error) and '\n' not in str(error)
        return
    with torch.no_grad():
        assert reduced(x).isfinite().all()
        close(reduce_tokens(model, 'mctf', r=0)(x), model(x), 1e-5)
