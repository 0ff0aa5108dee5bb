"""Without this the compact transformers' tokenizer, pooling, positions and names could drift from the authors'."""

import copy

import golden
import probe
import pytest
import torch
import torch.nn.functional as F

from densezoo.backbones import create_model, load_checkpoint
from densezoo.backbones.cct import CCT, ConvTokenizer, sinusoids
from densezoo.backbones.layers import TokenAttention

SMALL = {**CCT.reduced, 'num_classes': 5}


def small(name='cct_2_3x2_32', **overrides):
    torch.manual_seed(0)
    return create_model(name, **{**SMALL, **overrides}).eval()


def image(height=32, width=48):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_positions_resized_as_the_authors_load_them():
    recorded = probe.load('cct_2_3x2_32')
    case = golden.case(recorded, 'logits_48_resized')
    x = probe.image(case['seed'], case['shape'])
    reloaded = load_checkpoint(golden.create('cct_2_3x2_32', img_size=48).eval(), probe.golden_state(recorded))
    probe.compare(reloaded.pos_embed.table, case['outputs']['positional_emb_resized'])
    probe.compare(reloaded(x), case['outputs']['logits'])
    probe.compare(golden.build('cct_2_3x2_32')(x), case['outputs']['logits'])  # at run time


@pytest.mark.parametrize(('kernel', 'layers', 'stride'), [(3, 1, 2), (3, 2, 4), (5, 1, 2), (7, 2, 16), (9, 1, 6)])
@pytest.mark.parametrize('size', [(32, 32), (33, 47)])
def test_tokens_cover_the_image(kernel, layers, stride, size):
    tokenizer = ConvTokenizer(3, 8, kernel=kernel, layers=layers)
    x = image(*size)
    tokens = tokenizer(x)
    assert tokenizer.stride == stride
    assert tokens.shape == (2, -(-size[0] // stride), -(-size[1] // stride), 8) and tokens.is_contiguous()
    for conv in tokenizer.convs:  # the order of the paper
        x = F.max_pool2d(F.relu(conv(x)), 3, 2, 1)
    assert torch.equal(tokens.permute(0, 3, 1, 2), x)


@torch.no_grad()
def test_blocks_normalise_their_tokens():
    block = small().blocks[0]
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(2))
    between = x + block.attn(block.norm1(x), (2, 3))
    normed = F.layer_norm(between, (32,), block.norm2.weight, block.norm2.bias, 1e-5)
    torch.testing.assert_close(block(x, (2, 3)), normed + block.mlp(normed))
    torch.testing.assert_close(copy.deepcopy(block).for_deploy()(x, (2, 3)), block(x, (2, 3)))


@torch.no_grad()
def test_sequence_pooling_is_a_mean_with_learned_weights():
    model = small()
    features = model.forward_features(image())
    pooled = model.forward_head(features, pre_logits=True)
    share = torch.softmax(features @ model.attention_pool.weight[0] + model.attention_pool.bias, 1)
    torch.testing.assert_close(pooled, torch.einsum('bn,bnc->bc', share, features))
    model.attention_pool.weight.zero_()
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean(1))
    model.reset_classifier(3, global_pool='avg')
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean(1))


@torch.no_grad()
def test_class_token_of_vit_lite():
    model = small('vit_7_4_32')
    features = model.forward_features(image())
    assert features.shape[1] == 1 + 8 * 12 and not hasattr(model, 'attention_pool')
    assert model.pos_embed.table.shape == (1, 1 + 8 * 8, 32)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, 0])


def test_sinusoids():
    table = sinusoids(50, 6)
    for row, column, expected in ((0, 0, 0.0), (0, 1, 1.0), (7, 0, 7.0), (7, 3, 7 / 10000 ** (2 / 6))):
        angle = torch.tensor(expected)
        value = (angle.sin() if column % 2 == 0 else angle.cos()) if row else angle
        torch.testing.assert_close(table[0, row, column], value)
    model = small('cct_2_3x2_32_sine')
    assert not model.pos_embed.table.requires_grad
    assert torch.equal(model.pos_embed.table, sinusoids(64, 32))
    assert small('vit_2_4_32_sine').pos_embed.table.shape == (1, 65, 32)
    assert small(positions='none').pos_embed is None


def test_dropped_attention_weights():
    model = small(attn_drop=0.5)
    plain = small()
    assert torch.equal(model(image()), plain(image()))  # evaluation drops nothing
    torch.manual_seed(0)
    attention = TokenAttention(dim=8, num_heads=2, attn_drop=0.5)
    x = torch.randn(2, 10, 8)
    assert not torch.equal(attention(x, (2, 5)), attention(x, (2, 5)))
    clipped = TokenAttention(dim=8, num_heads=2, attn_drop=0.5, clip=dict(gamma=0.0))
    assert not torch.equal(clipped(x, (2, 5)), clipped(x, (2, 5)))
    assert torch.equal(clipped.eval()(x, (2, 5)), clipped(x, (2, 5)))


@pytest.mark.parametrize(
    ('options', 'text'),
    [
        (dict(kernel=4), 'kernel must be odd and at least 3, and layers positive, got kernel=4, layers=2'),
        (dict(conv_layers=-1), 'conv_layers must not be negative, got conv_layers=-1'),
        (dict(pooling='seqq'), "pooling must be one of seq, token, got 'seqq'; did you mean seq"),
        (dict(positions='sin'), "positions must be one of learnable, sine, none, got 'sin'; did you mean sine"),
        (dict(attn_drop=0.1, window_size=4), 'attn_drop must be from 0 to below 1, and 0 in windows, got attn_drop'),
    ],
)
def test_bad_arguments(options, text):
    with torch.device('meta'), pytest.raises(ValueError, match=text):
        create_model('cct_14_7x2_224', **options)


def test_published_classes_and_means():
    with torch.device('meta'):
        model = create_model('cct_7_3x1_32_sine_c100.cifar100_1500e', num_classes=100)
    assert model.default_cfg['num_classes'] == 100 and model.default_cfg['mean'] == (0.4914, 0.4822, 0.4465)
    assert model.default_cfg['input_size'] == (3, 32, 32)
    assert model.default_cfg['url'].endswith('cct_7_3x1_32_sine_cifar100_1500epochs.pth')
