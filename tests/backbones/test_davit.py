"""Without this DaViT could drift from the paper's sizes, mix the wrong channels, or take arguments it cannot build."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from densezoo.backbones import create_model
from densezoo.backbones.davit import ChannelAttention, WindowAttention

# name -> parameters and multiply-adds at 224, as stated in the authors' code
SIZES = {
    'davit_tiny': (28360168, 4540244736),
    'davit_small': (49745896, 8800488192),
    'davit_base': (87954408, 15510430720),
}


@pytest.mark.parametrize('name', SIZES)
def test_published_sizes(name):
    params, macs = SIZES[name]
    with torch.device('meta'):
        model = create_model(name).eval()
        assert sum(p.numel() for p in model.parameters()) == params
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() / 2 == pytest.approx(macs, rel=0.02)


def test_channel_attention_formula():
    torch.manual_seed(0)
    mixer, x = ChannelAttention(dim=12, num_heads=3).double(), torch.randn(2, 3, 5, 12, dtype=torch.float64)
    query, key, value = mixer.qkv(x).flatten(1, 2).chunk(3, -1)
    out = torch.empty_like(query)
    for head in range(3):
        channels = slice(4 * head, 4 * head + 4)
        for b in range(2):
            scores = key[b, :, channels].T @ value[b, :, channels] / 4**0.5
            out[b, :, channels] = query[b, :, channels] @ scores.softmax(-1).T
    torch.testing.assert_close(mixer(x), mixer.proj(out).reshape(x.shape))


def test_padded_positions_carry_the_bias_of_qkv():
    torch.manual_seed(0)
    mixer = WindowAttention(dim=8, num_heads=2, window_size=4)
    torch.nn.init.normal_(mixer.qkv.bias)
    x = torch.randn(2, 6, 7, 8)
    zeros = torch.nn.functional.pad(x, (0, 0, 0, 1, 0, 2))
    torch.testing.assert_close(mixer(x), mixer(zeros)[:, :6, :7])
    with torch.no_grad():
        mixer.qkv.bias.zero_()
    without = WindowAttention(dim=8, num_heads=2, window_size=4, qkv_bias=False)
    without.load_state_dict({k: v for k, v in mixer.state_dict().items() if k != 'qkv.bias'})
    torch.testing.assert_close(without(x), mixer(x))


def test_blocks_take_turns():
    model = create_model('davit_tiny', **DAVIT, attention_types=('channel', 'spatial', 'channel'))
    kinds = [type(block.attn).__name__[0] for stage in model.stages for block in stage]
    assert ''.join(kinds) == 'CWC' * 5
    assert model(torch.randn(1, 3, 40, 50)).shape == (1, 1000)


DAVIT = {'depths': (1, 1, 2, 1), 'dims': (32, 64, 96, 128), 'num_heads': (1, 2, 3, 4)}


@pytest.mark.parametrize('name', ['channel', 'plain_window'])
def test_mixer_in_another_family(name):
    model = create_model('poolformer_s12', depths=(1, 1, 1, 1), dims=(32, 64, 96, 128), mixers=name, features_only=True)
    assert [m.shape[1:] for m in model(torch.randn(1, 3, 33, 65))] == [(32, 9, 17), (64, 5, 9), (96, 3, 5), (128, 2, 3)]


@pytest.mark.parametrize(
    ('arguments', 'text'),
    [
        ({'num_heads': (3, 7, 12, 24)}, 'num_heads must divide the channels, got num_heads=7, dim=192'),
        ({'window_size': 0}, 'window_size must be positive, got window_size=0'),
        ({'attention_types': ('spatial', 'global')}, "of 'spatial' and 'channel', got .*global"),
        ({'attention_types': ()}, "of 'spatial' and 'channel', got attention_types=\\(\\)"),
    ],
)
def test_what_cannot_be_built(arguments, text):
    with torch.device('meta'), pytest.raises(ValueError, match=text):
        create_model('davit_tiny', **arguments)
