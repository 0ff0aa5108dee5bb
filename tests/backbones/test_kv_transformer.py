"""Without this the key-value attention could lose its symmetry, or its positions what softmax keeps of them."""

import golden
import probe
import pytest
import torch

from densezoo.backbones import create_model, load_checkpoint
from densezoo.backbones.kv_transformer import KeyValueAttention, KVTransformer
from densezoo.backbones.layers.fold_norm import fold_into_next
from densezoo.backbones.layers.rep_norm import RepBN

SMALL = {**KVTransformer.reduced, 'num_classes': 5}


def attention_and_tokens(**options):
    torch.manual_seed(0)
    return KeyValueAttention(dim=8, num_heads=2, prefix=1, **options).eval(), torch.randn(3, 7, 8)


def scores(attention, x):
    key, value = attention.qkv.kv(x).reshape(3, -1, 2, 2, 4).permute(2, 0, 3, 1, 4)
    return key @ key.transpose(2, 3) * 8**-0.5, value


@torch.no_grad()
def test_symmetric_scores():
    attention, x = attention_and_tokens()
    symmetric, value = scores(attention, x)
    torch.testing.assert_close(symmetric, symmetric.transpose(2, 3))
    out = (symmetric.softmax(-1) @ value).transpose(1, 2).reshape(3, 7, 8)
    torch.testing.assert_close(attention(x, (2, 3)), attention.proj(out))


@torch.no_grad()
def test_positions_are_those_of_the_whole_map_of_scores():
    """What the author's code maps: 26 features of the query's index, 24 of the key's, sines and cosines in turn."""
    attention, x = attention_and_tokens(positional=True)
    symmetric, value = scores(attention, x)
    index = torch.arange(7.0)[:, None] / 10000 ** (torch.arange(0, 26, 2) / 26)
    features = torch.stack((index.sin(), index.cos()), -1).flatten(1)  # (7, 26)
    pairs = torch.cat((features[:, None].expand(7, 7, 26), features[None, :, :24].expand(7, 7, 24)), -1)
    mapped = attention.map_pos(symmetric[..., None] + pairs).squeeze(-1)
    out = (mapped.softmax(-1) @ value).transpose(1, 2).reshape(3, 7, 8)
    torch.testing.assert_close(attention(x, (2, 3)), attention.proj(out), rtol=1e-4, atol=1e-6)
    sizes = torch.randn(3, 1, 1, 7)
    out = ((mapped + sizes).softmax(-1) @ value).transpose(1, 2).reshape(3, 7, 8)
    torch.testing.assert_close(attention(x, (2, 3), sizes), attention.proj(out), rtol=1e-4, atol=1e-6)


def test_positions_have_the_type_of_the_weights():
    """Files in half precision hold no sum of two types."""
    attention, _ = attention_and_tokens(positional=True)
    expected = attention.key_positions(7)
    found = attention.half().key_positions(7)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=2e-3)


@torch.no_grad()
def test_windows_and_options_of_attention():
    attention, x = attention_and_tokens(window_size=4)
    whole, _ = attention_and_tokens()
    torch.testing.assert_close(attention(x, (2, 3))[:, 0], whole(x, (2, 3))[:, 0])
    assert not torch.allclose(attention(x, (2, 3)), whole(x, (2, 3)))  # patches do not see the class token
    clipped, _ = attention_and_tokens(clip=dict(gamma=0.0))
    torch.testing.assert_close(clipped(x, (2, 3)), whole(x, (2, 3)))
    with pytest.raises(ValueError, match='windows take no positions, got positional=True, window_size=4'):
        attention_and_tokens(positional=True, window_size=4)


@torch.no_grad()
def test_norms_fold_into_the_shared_projection():
    attention, x = attention_and_tokens()
    norm = RepBN(8).eval()
    norm.bn.running_mean.uniform_()
    expected = attention(norm(x), (2, 3))
    assert isinstance(fold_into_next(norm, attention), torch.nn.Identity)
    torch.testing.assert_close(attention(x, (2, 3)), expected)


@torch.no_grad()
def test_sizes_of_the_head_and_of_the_table():
    torch.manual_seed(0)
    model = create_model('kvt_pos_cifar_patch8', **SMALL).eval()
    x = torch.randn(1, 3, 50, 72)
    features = model.forward_features(x)
    assert features.shape == (1, 1 + 7 * 9, 32) and model.pos_embed.table.shape == (1, 17, 32)
    hidden = torch.nn.functional.gelu(model.head.fc1(features[:, 0]))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), hidden)
    torch.testing.assert_close(model(x), model.head.fc2(hidden))


def test_patches_of_the_author_are_linear():
    state = probe.golden_state(probe.load('kvt_cifar_patch8'))
    model = load_checkpoint(golden.create('kvt_cifar_patch8'), state)
    patch = torch.randn(8, 8, 3)
    expected = state['patch_to_embedding.weight'] @ patch.flatten() + state['patch_to_embedding.bias']
    torch.testing.assert_close(model.patch_embed(patch.permute(2, 0, 1)[None]).flatten(), expected)
