"""Without this UViT's windows could stop growing with the map, or its patches of 8 pixels could lose the scale of those
of 16; and the pixel transformer could mix pixels before its first block."""

import pytest
import torch
import torch.nn.functional as F

from densezoo.backbones import create_model, load_checkpoint
from densezoo.backbones.pixel_transformer import PixelTransformer
from densezoo.backbones.uvit import PartAttention, UViT


def small(name='uvit_small', cls=UViT, **arguments):
    torch.manual_seed(0)
    return create_model(name, **{**cls.reduced, 'num_classes': 7, **arguments}).eval()


# parameters without classifier, with patches of 8 pixels and positions for 896 x 896: those of the paper's table
@pytest.mark.parametrize(('name', 'millions'), [('uvit_tiny', 13.5), ('uvit_small', 21.7)])
def test_sizes_of_the_paper(name, millions):
    with torch.device('meta'):
        model = create_model(name, features_only=True, img_size=896)
    ours = sum(p.numel() for key, p in model.named_parameters() if not key.startswith('pyramid.'))
    assert ours / 1e6 == pytest.approx(millions, abs=0.05)


def test_windows_of_the_paper():
    with torch.device('meta'):
        dense, classifier = create_model('uvit_base', features_only=True), create_model('uvit_base')
    assert [block.attn.parts for block in dense.blocks] == [4] * 14 + [2] * 2 + [1] * 2
    assert all(block.attn.parts == 1 for block in classifier.blocks)
    assert dense.stride == 8 and classifier.stride == 16 and dense.feature_info.reduction() == [4, 8, 16, 32]


@torch.no_grad()
@pytest.mark.parametrize(('parts', 'grid'), [(2, (4, 6)), (2, (5, 7)), (4, (8, 4)), (4, (5, 9)), (4, (2, 3))])
def test_windows_attend_alone(parts, grid):
    torch.manual_seed(0)
    attention = PartAttention(dim=8, num_heads=2, parts=parts)
    whole = PartAttention(dim=8, num_heads=2)
    whole.load_state_dict(attention.state_dict())
    x = torch.randn(2, grid[0] * grid[1], 8)
    high, wide = -(-grid[0] // parts), -(-grid[1] // parts)
    expected = torch.cat(
        [
            torch.cat([whole(w.flatten(1, 2), w.shape[1:3]).unflatten(1, w.shape[1:3]) for w in row.split(wide, 2)], 2)
            for row in x.unflatten(1, grid).split(high, 1)
        ],
        1,
    )
    torch.testing.assert_close(attention(x, grid), expected.flatten(1, 2))


def test_windows_of_padding_have_finite_gradients():
    attention, x = PartAttention(dim=8, num_heads=2, parts=4), torch.randn(1, 6, 8, requires_grad=True)
    attention(x, (2, 3)).square().sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in attention.parameters())


@torch.no_grad()
def test_patches_of_another_size_answer_alike():
    source, target = small(), small(patch_size=8, features_only=True)
    weight = source.patch_embed.conv.weight
    weight.copy_(torch.randn(32, 3, 1, 1).expand_as(weight))
    load_checkpoint(target, source.state_dict())
    assert target.pos_embed.table.shape[1] == 28 * 28
    x = torch.randn(1, 3, 64, 48)
    fine = target.patch_embed(F.avg_pool2d(x, 2))
    torch.testing.assert_close(fine, source.patch_embed(x), atol=1e-3, rtol=0)


@torch.no_grad()
def test_pixels_are_tokens():
    model, x = small('pixel_tiny_28', PixelTransformer), torch.randn(1, 3, 32, 40)
    tokens, grid = model.embed(x)
    assert grid == (32, 40) and tokens.shape == (1, 32 * 40, 16)
    x[0, :, 3, 5] += 1.0
    changed = (model.embed(x)[0] != tokens).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [3 * 40 + 5]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'window_parts': (1, 2)}, 'window_parts must be 4 numbers, one per block, got 2'),
        ({'window_parts': (0, 1, 1, 1)}, 'parts must be positive, got parts=0'),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_windows_take_no_bias():
    with pytest.raises(ValueError, match='windows take no bias'):
        PartAttention(dim=8, num_heads=2, parts=2)(torch.randn(1, 4, 8), (2, 2), torch.zeros(1))
