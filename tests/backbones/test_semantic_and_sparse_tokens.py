"""Without this semantic tokens could stand for the wrong part of a map, and Sparsifiner's masks or PYRA's weights could
drift from their formulae. What sampling has of its own is in test_ats.py, what merging methods have in common in
test_reduction.py."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from small_reduced import SETTINGS, as_list, close, images, reduced_by, small

from densezoo.backbones import create_model, load_checkpoint, reduce_tokens
from densezoo.backbones.reduction import Tokens, report, trace_tokens
from densezoo.backbones.reduction.pyra import ReActivation
from densezoo.backbones.reduction.sparsifiner import ConnectivityPredictor, plain_scale
from densezoo.backbones.reduction.stvit import part_of, pool_parts
from densezoo.backbones.reduction.tome import merge_pairs
from densezoo.deploy import OnnxModel, build_engine, export_onnx, export_program
from densezoo.kernels import match_tokens
from densezoo.train.config import load_config

EACH = pytest.mark.parametrize('key', SETTINGS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---- properties of all of them


@EACH
@pytest.mark.parametrize('features_only', [False, True])
@torch.no_grad()
def test_batch_equals_single_images(key, features_only):
    model, x = reduced_by(key, features_only=features_only), images(3, 80, 96)
    together = as_list(model(x))
    plain = as_list(small(features_only=features_only)(x))
    assert [out.shape for out in together] == [out.shape for out in plain]
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(together, plain))
    alone = [as_list(model(x[i : i + 1])) for i in range(3)]
    close(together, [torch.cat(level) for level in zip(*alone)])


@EACH
def test_trains_with_checkpointing_and_drop_path(key):
    model, x = reduced_by(key, drop_path_rate=0.2).train(), images(2)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        model(x).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.isfinite().all(), f'{name} takes no part'
        close(gradients[1][name], gradient)


def by_default(*keys: str, forms: tuple[bool, ...] = (False, True)) -> Any:
    """Every method in both forms; those that are not named, and all but the first form of those that are, are slow."""
    cases = [
        pytest.param(key, form, marks=[] if key in keys and form == forms[0] else [pytest.mark.slow])
        for key in SETTINGS
        for form in forms
    ]
    return pytest.mark.parametrize(('key', 'features_only'), cases)


@by_default('ats', forms=(True, False))
@torch.no_grad()
def test_compiled_equals_eager(key, features_only):
    torch._dynamo.reset()
    model, x = reduced_by(key, features_only=features_only), images()
    close(torch.compile(model, fullgraph=True, backend='aot_eager')(x), model(x))


@by_default('ats')
@torch.no_grad()
def test_onnx_and_engine_equal_eager(key, features_only, tmp_path):
    model, x = reduced_by(key, features_only=features_only, **({'depth': 3} if key == 'ats' else {})), images()
    path = export_onnx(model, x[:2], tmp_path / 'model.onnx')
    close(OnnxModel(path)(x), model(x))
    assert build_engine(path, tmp_path / 'model.engine', batch=(1, 2, 4))['layers'] > 5


@pytest.mark.parametrize(
    'key',
    [
        'ats',
        *(
            pytest.param(key, marks=pytest.mark.slow)
            for key in ('stvit', 'stvit_r', 'sparsifiner', 'sparsifiner_blocks')
        ),
    ],
)
@torch.no_grad()
def test_exports_with_dynamic_size(key):
    model = reduced_by(key, features_only=True)
    program = export_program(model, images(1, 80, 96), dynamic_batch=True, dynamic_size=True).module()
    for size in ((80, 96), (64, 144)):
        x = images(2, *size)
        close(program(x), model(x))


@EACH
@torch.no_grad()
def test_timm_models(key):
    method, settings = SETTINGS[key]
    shape = dict(img_size=96, embed_dim=32, depth=4, num_heads=2, num_classes=5)
    for more in ({}, {'class_token': False, 'global_pool': 'avg'}, {'reg_tokens': 3}):
        model = timm.models.vision_transformer.VisionTransformer(patch_size=16, **shape, **more).eval()
        out = reduce_tokens(model, method, **settings)
        logits = out(images(2))
        assert logits.shape == (2, 5) and logits.isfinite().all()
        close(out.forward_head(out.forward_features(images(2))), logits)


@pytest.mark.slow
@EACH
@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_dense_tasks_learn_on_the_quickstarts_model(task, key):
    method, settings = SETTINGS[key]
    config = load_config(f'quickstart/{task}')
    config.model.backbone = dict(
        type=create_model,
        name='deit_tiny_patch16_224',
        features_only=True,
        depth=4,
        dim=32,
        num_heads=2,
        img_size=96,
        reduction=dict(type=method, **settings),
    )
    model = MODELS.build(config.model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    masks = torch.zeros(1, 96, 96, dtype=torch.bool)
    masks[:, 8:40, 8:40] = True
    boxes, mask = torch.tensor([[8.0, 8.0, 40.0, 40.0]]), masks[0].long()
    target = dict(boxes=boxes, labels=torch.tensor([1]), masks=masks, mask=mask, size=(96, 96), original_size=(96, 96))
    picture = torch.full((3, 96, 96), 99, dtype=torch.uint8)
    losses = []
    for _ in range(8):
        samples = dict(images=[picture, picture], targets=[dict(target), dict(target)])
        batch = model.data_preprocessor(samples, True)
        total, _ = model.parse_losses(model(**batch, mode='loss'))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert min(losses[4:]) < losses[0]


# ---- semantic tokens


def test_parts_are_those_of_adaptive_pooling():
    for size, parts in (((14, 14), (4, 4)), ((6, 5), (4, 2)), ((3, 3), (4, 4))):
        x = torch.randn(2, *size, 5)
        expected = F.adaptive_max_pool2d(x.permute(0, 3, 1, 2), parts).permute(0, 2, 3, 1)
        assert torch.equal(pool_parts(x, parts), expected)
        place = part_of(size, parts, x.device)
        assert place.shape == (size[0] * size[1],)
        if min(size[0] - parts[0], size[1] - parts[1]) >= 0:
            assert place.unique().tolist() == list(range(parts[0] * parts[1]))


@torch.no_grad()
def test_semantic_tokens_attend_to_themselves_and_to_the_map():
    """The two blocks that make them, from the blocks' own parts."""
    model = small()
    x, grid = model.embed(images())
    tokens = reduce_tokens(model, 'stvit', tokens=4, first=0).reduction.begin(x, grid, False)
    reduction = reduce_tokens(model, 'stvit', tokens=4, first=0).reduction

    def after(block, asking, context):
        attn = block.attn
        normed, around = block.norm1(asking), block.norm1(context)
        query = attn.split(normed)[0]
        _, key, value = attn.split(around)
        return block.mix_channels(asking + attn.proj(attn.attend(query, key, value).transpose(1, 2).flatten(2)))

    pooled = F.adaptive_max_pool2d(x[:, 2:].transpose(1, 2).unflatten(2, grid), 2).flatten(2).transpose(1, 2)
    asking = torch.cat((x[:, :2], pooled), 1)
    first = after(model.blocks[0], asking, torch.cat((asking, x[:, 2:]), 1))
    second = after(model.blocks[1], first, torch.cat((first, x[:, 2:]), 1))
    for i, expected in enumerate((first, second, model.blocks[2](second, grid))):
        tokens = reduction.step(tokens, model.blocks[i], i)
        close(tokens.x, expected)


def test_tokens_of_each_block():
    semantic = trace_tokens(reduced_by('stvit'), images())
    assert [tokens.x.shape[1] for tokens in semantic] == [6] * 4
    recovered = trace_tokens(reduced_by('stvit_r'), images(1, 96, 128))
    assert [tokens.x.shape[1] for tokens in recovered] == [50, 2 + 4 * 4, 2 + 4 * 4, 50]
    place = recovered[1].place[0]
    grid = place[2:].view(6, 8) - 2
    assert grid[:4, :4].tolist() == [[0, 0, 1, 1]] * 2 + [[4, 4, 5, 5]] * 2 and grid[5].tolist()[:3] == [8, 8, 9]
    assert torch.equal(recovered[3].place[0], torch.arange(50))


def test_share_of_multiply_adds():
    with torch.device('meta'):
        model = create_model('deit_small_patch16_224')
    for method, share in (('stvit', 0.433), ('stvit_r', 0.534)):
        assert report(reduce_tokens(model, method)).share == pytest.approx(share, abs=2e-3)


# ---- Sparsifiner


@torch.no_grad()
def test_attention_to_all_is_the_model_itself():
    model, x = small(features_only=True), images()
    for block in (1, 16):
        close(reduce_tokens(model, 'sparsifiner', keep=1.0, block=block)(x), model(x))


@torch.no_grad()
def test_masks_keep_the_highest_predictions():
    reduction = reduced_by('sparsifiner').reduction
    scores = torch.rand(2, 2, 36, 38)
    mask = reduction.mask(scores)
    assert mask.shape == (2, 2, 38, 38) and mask[:, :, :2].all()
    assert (mask[:, :, 2:].sum(3) == 12).all()  # of 38, 30% rounded up
    lowest = torch.where(mask[:, :, 2:], scores, 2.0).amin(3)
    assert (torch.where(mask[:, :, 2:], -1.0, scores).amax(3) <= lowest).all()
    blocks = reduced_by('sparsifiner_blocks').reduction.mask(scores)
    assert blocks.shape == (2, 2, 3, 3) and blocks[:, :, 0].all() and (blocks[:, :, 1:].sum(3) == 1).all()


@torch.no_grad()
def test_prediction_is_the_formula():
    predictor = ConnectivityPredictor(
        head_dim=8, num_heads=4, prefix=1, grid=(3, 4), width_factor=2, token_factor=3, coefficients=2, threshold=0.02
    )
    query, key = torch.randn(2, 4, 13, 8), torch.randn(2, 4, 13, 8)
    q, k = predictor.proj_c_q(query), predictor.proj_c_k(key)
    logits = (
        torch.einsum('bhnc,bhmc,mk->bhnk', q[:, :, 1:], k, predictor.proj_n) / 2
    )  # h ** -0.5, as the authors have it
    coefficient = logits.softmax(-1)
    close(predictor(query, key, (3, 4), sparse=False), coefficient @ predictor.proj_back_n.T)
    least = coefficient.sort(-1, descending=True).values[..., 1:2]
    basis = predictor.proj_back_n.abs()
    expected = (coefficient * (coefficient >= least)) @ (basis * (basis > 0.02)).T
    close(predictor(query, key, (3, 4)), expected)
    predictor.proj_back_n.fill_(1.0)  # tables of another grid keep what is constant
    close(
        predictor(torch.randn(2, 4, 31, 8), torch.randn(2, 4, 31, 8), (5, 6)),
        torch.ones(2, 4, 30, 31) * coefficient.new_tensor(1.0),
        1.0,
    )
    assert predictor(torch.randn(1, 4, 31, 8), torch.randn(1, 4, 31, 8), (5, 6)).shape == (1, 4, 30, 31)


@torch.no_grad()
def test_kernel_and_masked_attention_agree():
    for key in ('sparsifiner', 'sparsifiner_blocks'):
        model = reduced_by(key)
        block = model.blocks[0]
        assert plain_scale(block) == 16**-0.5
        query, keys, value = block.split(torch.randn(2, 38, 32))
        mask = model.reduction.mask(torch.rand(2, 2, 36, 38))
        through_kernel = model.reduction._attend(block, query, keys, value, mask)
        block.attn.softmax = lambda x: x.softmax(-1)  # no longer plain
        assert plain_scale(block) is None
        close(model.reduction._attend(block, query, keys, value, mask), through_kernel)


def test_first_phase_trains_the_predictors_alone():
    plain = small().train()
    model = reduce_tokens(plain, 'sparsifiner', reconstruction=0.5)
    model.set_grad_checkpointing(True)
    x = images()
    model(x)
    (loss,) = model.reduction.penalties(model.reduction.final).values()
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.reduction.parameters())
    assert all(p.grad is None or not p.grad.any() for key, p in model.named_parameters() if key.startswith('blocks.'))
    close(model(x), plain(x))  # attention to everything while training
    assert not reduce_tokens(small(), 'sparsifiner').reduction.penalties(model.reduction.final)


@pytest.mark.parametrize(
    ('method', 'keys'),
    [
        (
            'sparsifiner',
            {
                f'predictors.1.{name}': f'blocks.1.attn.mask_predictor.{name}'
                for name in ('proj_n', 'proj_back_n', 'proj_c_q.weight', 'proj_c_k.bias')
            },
        ),
        (
            'pyra',
            {
                'merged.1.pyra_a': 'blocks.1.pyra_a',
                'merged.1.pyra_norm.bias': 'blocks.1.pyra_norm.bias',
                'lora.1.down.weight': 'blocks.1.attn.LoRA_a.weight',
                'lora.1.up.weight': 'blocks.1.attn.LoRA_b.weight',
            },
        ),
    ],
)
def test_keys_of_the_authors_load(method, keys):
    settings = {'r': 4} if method == 'pyra' else {}
    model = reduce_tokens(small(), method, **settings)
    state = model.state_dict()
    state = {**{k: v for k, v in state.items() if not k.startswith('reduction.')}}
    own = dict(model.reduction.state_dict())
    wanted = {theirs: torch.randn_like(own[ours]) for ours, theirs in keys.items()}
    load_checkpoint(model, {**state, **wanted})
    for ours, theirs in keys.items():
        assert torch.equal(model.reduction.state_dict()[ours], wanted[theirs])


# ---- PYRA


@torch.no_grad()
def test_starts_as_token_merging():
    model, x = small(features_only=True), images()
    expected = reduce_tokens(model, 'tome', r=4)(x)
    close(reduce_tokens(model, 'pyra', r=4)(x), expected)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(reduced_by('pyra', features_only=True)(x), expected))


@torch.no_grad()
def test_reactivation_is_the_formula():
    module = ReActivation(dim=5, count=3)
    module.pyra_b.normal_()
    x, partner = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    both = F.layer_norm(x + partner, (5,))
    channel = 2 / (1 + torch.exp(-torch.einsum('ro,brc->boc', module.pyra_a, both)))
    token = 2 / (1 + torch.exp(-torch.einsum('brc,oc->bro', both, module.pyra_b))) - 1
    close(module(x, partner), x + x * channel * token, 1e-5)
    assert module(x[:, :2], partner[:, :2]).shape == (2, 2, 5)


@torch.no_grad()
def test_merged_tokens_are_reactivated_by_their_weighted_values():
    """As the authors have it: what is merged are the tokens times their sizes, and only those that are taken up."""
    model = reduced_by('pyra')
    reduction, size = model.reduction, torch.rand(1, 38, 1) + 1
    tokens, metric = Tokens(torch.randn(1, 38, 32), size=size), torch.randn(1, 38, 16)
    matching = match_tokens(metric, 4, class_token=True, distill_token=True)
    source, target = matching.a[matching.source[0]], matching.b[matching.target[0]]
    weighted = (tokens.x * size)[0]
    changed = reduction.merged['0'](weighted[None, source], weighted[None, target])[0]
    total = weighted.clone()
    total.index_add_(0, target, changed)
    sizes = size[0].clone()
    sizes.index_add_(0, target, size[0, source])
    out = merge_pairs(tokens, metric, 4, 2, reduction._activated(0))
    close(out.x[0, -1], (total / sizes)[37])  # the last token of B
    assert out.x.shape == (1, 34, 32)
    close(out.size.sum(), size.sum())


# ---- errors


@pytest.mark.parametrize(
    ('method', 'settings', 'message'),
    [
        ('stvit', {'tokens': 5}, r'tokens must be a square number or \(rows, columns\), got tokens=5'),
        ('stvit', {'tokens': 49}, r'tokens must not be more than the patches, 6 x 6, got tokens=49'),
        ('stvit', {'first': 3}, r'first must be a block number from 0 to 2, got first=3'),
        ('stvit', {'r': 4}, r'stvit takes neither r, ratio nor target'),
        ('stvit_r', {'group': 5}, r'group must be from 3 to 4, .* got group=5'),
        ('stvit_r', {'group': 4, 'first': 1}, r'first must be from 0 to 0, .* got first=1'),
        ('stvit_r', {'group': 4, 'sample': 8}, r'sample must be from 1 to window, got sample=8, window=7'),
        ('sparsifiner', {'keep': 0.0}, r'keep must be above 0 and at most 1, got keep=0.0'),
        ('sparsifiner', {'block': 0}, r'block must be a positive whole number, got block=0'),
        ('sparsifiner', {'coefficients': 0}, r'coefficients must be positive, got coefficients=0'),
        ('sparsifiner', {'ratio': 0.1}, r'sparsifiner takes neither r, ratio nor target'),
        ('pyra', {'r': 4, 'adapter': 'prefix'}, r"adapter must be 'lora', 'bottleneck' or None, got adapter='prefix'"),
        ('pyra', {'r': 4, 'rank': 0}, r'rank must be positive, got rank=0'),
        ('ats', {'r': 40}, r'r must be at most 36, the patches'),
    ],
)
def test_errors(method, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        reduce_tokens(small(), method, **settings)
    assert '\n' not in str(caught.value)


def test_blocks_without_one_norm_take_no_low_rank_adapters():
    model = create_model('vit_tiny_paralx2_6x2', depth=2, dim=32, num_heads=2)
    with pytest.raises(ValueError, match=r"adapter='lora' needs blocks with one norm .* take adapter='bottleneck'"):
        reduce_tokens(model, 'pyra', r=4)
    assert reduce_tokens(model, 'pyra', r=4, adapter='bottleneck').reduction.adapters
