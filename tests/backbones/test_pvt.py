"""Without this PVT could place its position embeddings wrongly, in the model or on loading, or lose the class token."""

import pytest
import torch
import torch.nn.functional as F

from densezoo.backbones import create_model, load_checkpoint
from densezoo.backbones.pvt import PVT, PositionedDownsample

# name -> parameters; to the unit where they were counted in the authors' code, else as published
SIZES = {'pvt_tiny': 13.229288, 'pvt_small': 24.5, 'pvt_medium': 44.2, 'pvt_large': 61.4}


@pytest.mark.parametrize('name', SIZES)
def test_sizes_of_the_paper(name):
    with torch.device('meta'):
        model = create_model(name)
    tolerance = 0.05 if SIZES[name] == round(SIZES[name], 1) else 1e-6
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(SIZES[name], abs=tolerance)


def small(**arguments):
    torch.manual_seed(0)
    return create_model('pvt_tiny', **{**PVT.reduced, 'num_classes': 7, **arguments}).eval()


# ---- position embeddings


def ramp(height, width):
    """(1, H, W, 2): at each position its row and its column, in units of the map, from its pixels' centres."""
    rows, columns = (torch.arange(size).add(0.5).div(size) for size in (height, width))
    return torch.stack(torch.meshgrid(rows, columns, indexing='ij'), -1)[None]


def embedding(grid, extra=0):
    layer = PositionedDownsample(3, 2, patch=4, norm=torch.nn.LayerNorm, grid=grid, extra=extra, image=True)
    with torch.no_grad():
        layer.pos_embed[:, :extra] = -1
        layer.pos_embed[:, extra:] = ramp(*grid).flatten(1, 2)
    return layer.requires_grad_(False)


@pytest.mark.parametrize('extra', [0, 1])
@pytest.mark.parametrize('size', [(6, 8), (12, 8), (9, 20)])
def test_positions_hold_their_row_and_column(size, extra):
    positions = embedding((6, 8), extra).positions(*size)
    inside = (slice(None), slice(size[0] // 6, -(size[0] // 6) - 1), slice(size[1] // 8, -(size[1] // 8) - 1))
    torch.testing.assert_close(positions[inside], ramp(*size)[inside])  # the border is constant when enlarged
    if size == (6, 8):
        torch.testing.assert_close(positions, ramp(*size))


def test_positions_are_added_to_the_patches():
    layer, x = embedding((6, 8)), torch.randn(1, 3, 24, 32)
    patches = layer.post_norm(F.conv2d(x, layer.conv.weight, layer.conv.bias, 4).permute(0, 2, 3, 1))
    torch.testing.assert_close(layer(x), patches + ramp(6, 8))


@torch.no_grad()
def test_tables_are_resized_on_loading():
    source = small(img_size=64)
    for s, layer in enumerate(source.downsample_layers):
        side = 16 // 2**s
        layer.pos_embed[:, :1] = 5.0  # the class token's in the last table
        layer.pos_embed[:, layer.extra :] = torch.randn(1, side * side, layer.pos_embed.shape[-1])
    target = load_checkpoint(small(img_size=(96, 160)), source.state_dict())
    for s, (ours, theirs) in enumerate(zip(target.downsample_layers, source.downsample_layers, strict=True)):
        side, grid = 16 // 2**s, (24 // 2**s, 40 // 2**s)
        assert ours.grid == grid and ours.pos_embed.shape[1] == grid[0] * grid[1] + (s == 3)
        table = theirs.pos_embed[:, theirs.extra :].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        expected = F.interpolate(table, grid, mode='bilinear').permute(0, 2, 3, 1)
        torch.testing.assert_close(ours.positions(*grid), expected)
        assert torch.equal(ours.pos_embed[:, : ours.extra], theirs.pos_embed[:, : theirs.extra])
    x = torch.randn(1, 3, 96, 160)
    torch.testing.assert_close(target(x), source(x))  # the same tables, resized once instead of at each image


def test_a_table_that_is_no_square_is_refused():
    state = small(img_size=64).state_dict()
    state['downsample_layers.0.pos_embed'] = torch.zeros(1, 15 * 16, 32)
    with pytest.raises(ValueError, match=r'downsample_layers\.0\.pos_embed'):
        load_checkpoint(small(img_size=96), state)


# ---- class token


@torch.no_grad()
def test_the_class_token_joins_in_the_last_stage():
    model, x = small(), torch.randn(2, 3, 64, 96)
    seen = []
    model.stages[3][0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    last, maps = model.forward_intermediates(x)
    token = model.cls_token + model.downsample_layers[3].pos_embed[:, :1]
    assert seen[0].shape == (2, 1, 1 + 2 * 3, 128)
    assert torch.equal(seen[0][:, 0, :1], token.expand(2, -1, -1))
    assert last.shape == (2, 128, 1, 1) and maps[-1].shape == (2, 128, 2, 3)
    model.cls_token += 1
    assert not torch.allclose(model.forward_features(x), last)


@torch.no_grad()
def test_without_a_class_token_the_map_is_averaged():
    model, x = small(class_token=False), torch.randn(2, 3, 64, 96)
    features = model.forward_features(x)
    assert model.cls_token is None and model.downsample_layers[3].extra == 0 and features.shape == (2, 128, 2, 3)
    torch.testing.assert_close(model(x), model.head(model.norm(features.mean((2, 3)))))


# ---- arguments


def test_other_mixers_in_pvt():
    model = small(mixers=('pool', 'lsa', {'name': 'sra', 'sr_ratio': 3}, 'sra'))
    kinds = [type(stage[0].token_mixer).__name__ for stage in model.stages]
    assert kinds == ['PoolMixer', 'LocallyGroupedAttention', *['SpatialReductionAttention'] * 2]
    assert [stage[0].token_mixer.sr_ratio for stage in model.stages[2:]] == [3, 1]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'num_heads': (1, 2, 6, 8)}, 'num_heads must divide the width of its stage, got num_heads=6, dim=320'),
        ({'sr_ratios': (8, 4, 2)}, 'sr_ratios must be one value or 4, one per stage'),
        (
            {'sr_ratios': (8, 4, 2, 2)},
            r'a class token needs plain attention .*sr_ratios\[3\]=2; pass class_token',
        ),
        ({'mixers': 'pool'}, r"a class token needs plain attention in the last stage, got mixers\[3\]='pool'"),
    ],
)
def test_errors(arguments, message):
    with torch.device('meta'), pytest.raises(ValueError, match=message):
        create_model('pvt_tiny', **arguments)
