"""Without this EcoFormer could drift from the published system: its codes, how they are learned, attention by them, and
whole models under the authors' keys."""

import golden
import probe
import pytest
import torch

from densezoo.backbones import binarize, create_model, load_checkpoint
from densezoo.backbones.binary import estimators
from densezoo.backbones.binary.ecoformer import EcoFormerAttention
from densezoo.backbones.binary.hashing import KernelHash, hashes_of, normalised
from densezoo.backbones.registry import model_class
from densezoo.kernels import hashed_attention

RECORDED = probe.load('ops/ecoformer_op')
MODELS = {'ecoformer_pvt_v2_b0': 'pvt_v2_b0', 'ecoformer_twins_svt_small': 'twins_svt_small'}
LEVELS = ('c2_tokens', 'c3_tokens', 'c4_tokens', 'c5_tokens')


def case(name):
    return golden.case(RECORDED, name)


def check(case, **ours):
    assert ours.keys() == case['outputs'].keys()
    for name, stored in case['outputs'].items():
        probe.compare(ours[name], stored, relative=1e-3 if name.startswith('grad') else 1e-5)


def hash_of(width=32, **options):
    torch.manual_seed(0)
    return KernelHash(2, width, **options)


def tokens(case):
    spec = case['inputs']['qk']
    return normalised(probe.image(spec['seed'], spec['shape']))


@pytest.mark.parametrize('kind', ['fill', 'unit'])
def test_codes(kind):
    recorded, hash = case(f'hash_{kind}'), hash_of()
    hash.A.copy_(probe.values('A', hash.A.shape))
    hash.anchor.copy_(probe.values('anchor', hash.anchor.shape))
    hash.mvec.copy_(probe.values('mvec', hash.mvec.shape))
    if kind == 'unit':
        hash.anchor.copy_(normalised(probe.values('anchor', [2, 2, 25, 32])[:1]))
        hash.mvec.fill_(torch.tensor(-0.5).exp())
    hash.trained.fill_(True)
    x = tokens(recorded)
    distances = hash.distances(x)
    check(
        recorded,
        sq_dist=distances,
        sigma=distances.mean((2, 3)),
        kernel_centred=hash.kernel(x),
        projected=hash.project(x),
        codes=hash(x),
    )


def test_learning_the_hash_functions():
    recorded = case('hash_training_50it_lr0.5')
    inputs = recorded['inputs']
    hash = hash_of(iterations=inputs['iteration_n'], lr=inputs['learning_rate'], topk=inputs['topk'])
    start = probe.values('A', hash.A.shape)
    hash.A.copy_(start)
    x = tokens(recorded)
    hash.fit(x, x[:1, :, :25])
    check(
        recorded,
        similarity=hash.labels(x),
        A=hash.A,
        A_delta=hash.A - start,
        mvec=hash.mvec,
        anchor=hash.anchor,
        codes=hash(x),
    )


def test_attention_of_codes():
    recorded = case('linear_attention_bias')
    q, k, v = (probe.image(spec['seed'], spec['shape']) for spec in (recorded['inputs'][n] for n in 'qkv'))
    check(recorded, out=hashed_attention(q.sign(), k.sign(), v))


def test_the_exact_sum_is_attention():
    torch.manual_seed(0)
    codes, value = torch.randn(2, 3, 7, 4).sign(), torch.randn(2, 3, 7, 5)
    weights = codes @ codes.mT + 5
    expected = (weights / weights.sum(-1, keepdim=True)) @ value
    torch.testing.assert_close(hashed_attention(codes, codes, value, own_value=False), expected)


def test_straight_through():
    recorded = case('sign_ste')
    x = (1.2 * probe.image(6, [4, 64])).requires_grad_()
    y = estimators.sign(x)
    y.backward(probe.image(7, [4, 64]))
    check(recorded, y=y, grad_x=x.grad)


@pytest.mark.parametrize('name', ['ecoformer_self_attention', 'ecoformer_self_attention_grad'])
def test_attention(name):
    layer = EcoFormerAttention(dim=64, num_heads=2).eval()
    state = {key.removeprefix('attn.'): value for key, value in probe.golden_state(RECORDED).items()}
    layer.fast_attention['ksh'].resample(state, 'fast_attention.ksh.')
    layer.load_state_dict(state)
    x = probe.image(9, [2, 196, 64]).requires_grad_()
    y = layer(x.view(2, 14, 14, 64)).flatten(1, 2)
    if not name.endswith('grad'):
        check(case(name), y=y)
        return
    loss = y.square().mean()
    loss.backward()
    weights = {f'grad_attn.{key}': p.grad for key, p in layer.named_parameters()}
    outputs = {'loss': loss, 'grad_input': x.grad, **weights}
    check(case(name), **{key: outputs[key] for key in case(name)['outputs']})


# ---- whole models


def authors(stem):
    model = binarize(create_model(MODELS[stem]).eval(), 'ecoformer')
    return load_checkpoint(model, probe.golden_state(probe.load(stem))).eval()


@pytest.mark.parametrize(
    ('stem', 'name'),
    [
        ('ecoformer_pvt_v2_b0', 'features_200x264'),
        pytest.param('ecoformer_pvt_v2_b0', 'logits_224', marks=pytest.mark.slow),
        pytest.param('ecoformer_pvt_v2_b0', 'logits_256x320', marks=pytest.mark.slow),
        pytest.param('ecoformer_pvt_v2_b0', 'grad_224', marks=pytest.mark.slow),
        pytest.param('ecoformer_twins_svt_small', 'logits_224', marks=pytest.mark.slow),
        pytest.param('ecoformer_twins_svt_small', 'logits_256x320', marks=pytest.mark.slow),
    ],
)
def test_models_of_the_authors(stem, name):
    recorded, model = probe.load(stem), authors(stem)
    shapes = {key for key in recorded['state_dict'] if 'projection_matrix' not in key}
    assert len(shapes) + len(hashes_of(model)) == len(model.state_dict())
    assert sum(p.numel() for p in model.parameters()) == recorded['params']
    case = golden.case(recorded, name)
    x = probe.image(case['seed'], case['shape'])
    if name.startswith('grad'):
        outputs = golden._gradients(model, recorded, case, x)
    else:
        with torch.no_grad():
            maps = model.forward_intermediates(x, intermediates_only=True) if name.startswith('features') else ()
            outputs = dict(zip(LEVELS, (m.flatten(2).mT for m in maps))) or {'logits': model(x)}
    for key, stored in case['outputs'].items():
        if isinstance(stored, dict):
            probe.compare(outputs[key], stored, relative=1e-3 if name.startswith('grad') else 1e-5)


def small(name, **overrides):
    torch.manual_seed(0)
    return create_model(name, num_classes=5, **{**model_class(name).reduced, **overrides})


@pytest.mark.parametrize('name', ['pvt_v2_b0', 'twins_svt_small', 'deit_tiny_patch16_224'])
def test_the_first_training_batch_learns_the_codes(name):
    parent = small(name) if 'deit' not in name else create_model(name, depth=2, dim=48, num_classes=5)
    model = binarize(parent, 'ecoformer', iterations=3).eval()
    x = probe.image(0, [3, 3, 72, 40])
    with pytest.raises(ValueError, match='hash functions are not learned yet; run a batch'):
        model(x)
    model.train()(x).square().mean().backward()
    assert all(hash.trained for hash in hashes_of(model)) and hashes_of(model)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), torch.cat([model(i[None]) for i in x]), rtol=1e-4, atol=1e-4)
        again = load_checkpoint(binarize(parent, 'ecoformer').eval(), model.state_dict())
        torch.testing.assert_close(again(x), model(x))
    before = hashes_of(model)[0].anchor.clone()
    hashes_of(model)[0].forget()
    model.train()(x)
    assert not torch.equal(before, hashes_of(model)[0].anchor)


def test_projections_are_the_parents():
    parent = small('pvt_v2_b0')
    model = binarize(parent, 'ecoformer', stages=(0, 2))
    for s, b in ((0, 0), (2, 1)):
        old, new = parent.stages[s][b].token_mixer, model.stages[s][b].token_mixer
        assert torch.equal(new.to_qk.weight, old.q.weight)
        assert torch.equal(new.to_v.bias, old.kv.bias.chunk(2)[1])
        assert torch.equal(new.proj.weight, old.proj.weight)
    kept = model.stages[1][0].token_mixer
    assert torch.equal(kept.qkv.weight[:64], parent.stages[1][0].token_mixer.q.weight)
    other = binarize(small('pvt_v2_b0'), 'ecoformer', stages=(0, 2))
    load_checkpoint(other, parent.state_dict())
    for key, value in model.state_dict().items():
        if 'ksh' not in key:
            assert torch.equal(other.state_dict()[key], value), key


def test_softmax_attention_of_the_last_stage_is_the_models_own():
    parent = small('pvt_v2_b0', sr_ratios=1, depths=(1, 1, 1, 1)).eval()
    model = binarize(parent, 'ecoformer').eval()
    x = torch.randn(2, 3, 4, 128)
    with torch.no_grad():
        torch.testing.assert_close(model.stages[3][0](x), parent.stages[3][0](x))


def test_without_stages_of_codes_it_is_the_first_stage_of_the_recipe():
    parent = small('pvt_v2_b0', sr_ratios=1)
    model = binarize(parent, 'ecoformer', stages=())
    x = probe.image(4, [1, 3, 64, 64])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), parent.eval()(x))
    reduced = small('pvt_v2_b0')  # published weights: their spatial reductions are dropped
    load_checkpoint(model, reduced.state_dict())
    assert torch.equal(model.stages[0][0].token_mixer.proj.weight, reduced.stages[0][0].token_mixer.proj.weight)


@pytest.mark.parametrize(
    ('name', 'settings', 'message'),
    [
        ('swin_tiny_patch4_window7_224', {}, 'ecoformer has no form of WindowAttention'),
        ('pvt_v2_b0', {'stages': (4,)}, 'stages must be numbers from 0 to 3'),
        ('pvt_v2_b0', {'bits': 0}, 'bits must be at least 1'),
    ],
)
def test_errors(name, settings, message):
    with pytest.raises(ValueError, match=message):
        binarize(small(name), 'ecoformer', **settings)
