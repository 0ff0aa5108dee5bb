"""Without this DHVT's head tokens, its dynamic feed-forward and its stem could drift from the authors' code."""

import golden
import probe
import pytest
import torch
import torch.nn.functional as F

from densezoo.backbones import create_model, load_checkpoint
from densezoo.backbones.dhvt import DHVT, HeadInteractingAttention, OverlappingPatches

SMALL = {**DHVT.reduced, 'patch_size': 4, 'num_classes': 5}


def small(name='dhvt_tiny_cifar_patch4', **overrides):
    torch.manual_seed(0)
    return create_model(name, **{**SMALL, **overrides}).eval()


def image(batch=2, height=32, width=48):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def transposed(self, x):
    """The stem as the authors lay it out: gradients reach its last norm transposed, which PyTorch's batch norm in
    evaluation mode gets wrong for one image on a CPU; so the recorded ones are."""
    x = self.pre_affine(x)
    for conv in self.convs:
        x = conv.act(conv.norm(conv.conv(x)))
    x = self.post_affine(x)
    return x.flatten(2).transpose(1, 2).unflatten(1, x.shape[2:])


@torch.no_grad()
@pytest.mark.parametrize('name', ['dhvt_tiny_cifar_patch2', 'dhvt_tiny_cifar_patch4'])
def test_tokens_inside(name):
    recorded = probe.load(name)
    case = golden.case(recorded, 'logits_32')
    model, seen = golden.build(name), {}
    x = probe.image(case['seed'], case['shape'])
    tokens, grid = model.embed(x)
    seen['stem_tokens'] = tokens[:, 1:]
    seen['block0'] = model.blocks[0](tokens, grid)
    seen['tokens_after_norm'] = model.forward_features(x)
    assert {'logits', *seen} == case['outputs'].keys()
    for key, value in seen.items():
        probe.compare(value, case['outputs'][key])


@pytest.mark.parametrize(
    ('name', 'case_name'),
    [
        ('dhvt_tiny_cifar_patch4', 'grad_32'),
        pytest.param('dhvt_tiny_imagenet_patch16', 'grad_224', marks=pytest.mark.slow),
    ],
)
def test_recorded_gradients(monkeypatch, name, case_name):
    monkeypatch.setattr(OverlappingPatches, 'forward', transposed)
    recorded = probe.load(name)
    golden.run(golden.build(name), recorded, golden.case(recorded, case_name))


def test_gradients_do_not_depend_on_the_batch():
    model, x = small(), image().requires_grad_()
    (together,) = torch.autograd.grad(model(x).square().sum(), x)
    alone = [torch.autograd.grad(model(x[i : i + 1]).square().sum(), x)[0][i] for i in range(2)]
    torch.testing.assert_close(torch.stack(alone), together)


@torch.no_grad()
def test_head_tokens_come_from_the_mean_of_all_and_join_the_class_token():
    torch.manual_seed(0)
    attention = HeadInteractingAttention(dim=8, num_heads=2)
    x = torch.randn(3, 7, 8)
    slices = x.mean(1).reshape(3, 2, 4)
    parts = F.gelu(attention.ht_norm(attention.ht_proj(slices).reshape(3, 2, 2, 4))).reshape(3, 2, 8)
    tokens = torch.cat((x, parts + attention.pos_embed), 1)  # the authors append them
    query, key, value = attention.qkv(tokens).reshape(3, 9, 3, 2, 4).permute(2, 0, 3, 1, 4)
    out = torch.softmax(query @ key.transpose(2, 3) / 2, -1) @ value
    out = attention.proj(out.transpose(1, 2).reshape(3, 9, 8))
    expected = torch.cat((out[:, :1] + out[:, 7:].mean(1, keepdim=True), out[:, 1:7]), 1)
    torch.testing.assert_close(attention(x, (2, 3)), expected)


@torch.no_grad()
def test_weights_of_merged_tokens_leave_head_tokens_alone():
    torch.manual_seed(0)
    attention = HeadInteractingAttention(dim=8, num_heads=2)
    x = torch.randn(3, 7, 8)
    torch.testing.assert_close(attention(x, (2, 3), torch.zeros(3, 1, 1, 7)), attention(x, (2, 3)))
    shift = torch.full((3, 1, 1, 7), 50.0)  # all tokens but those of the heads
    out = attention(x, (2, 3), shift)
    assert not torch.allclose(out, attention(x, (2, 3)))
    attention.pos_embed.add_(3.0)
    torch.testing.assert_close(attention(x, (2, 3), shift)[:, 1:], out[:, 1:])


@torch.no_grad()
def test_windows():
    model = small(features_only=True, window_size=4)
    assert [block.attn.window_size for block in model.blocks] == [None, None, None]  # four of three are global
    model = small(features_only=True, window_size=4, global_blocks=(-1,))
    assert [block.attn.window_size for block in model.blocks] == [4, 4, None]
    assert [m.shape[2:] for m in model(image(1, 33, 70))] == [(9, 18), (5, 9), (3, 5), (2, 3)]
    one_window = small(features_only=True, window_size=32, global_blocks=(-1,))
    tokens = torch.randn(1, 1 + 12, 32)
    attention = one_window.blocks[0].attn
    whole = small(features_only=True).blocks[0].attn
    torch.testing.assert_close(attention(tokens, (3, 4))[:, :1], whole(tokens, (3, 4))[:, :1])


@torch.no_grad()
def test_dense_form_has_no_factors_after_the_last_block():
    classifier, dense = small(), small(features_only=True)
    gone = classifier.state_dict().keys() - dense.state_dict().keys()
    last = 'blocks.2.mlp.'
    assert {key for key in gone if key.startswith('blocks.')} == {
        f'{last}{layer}.{kind}' for layer in ('compress', 'excitation') for kind in ('weight', 'bias')
    }
    load_checkpoint(dense, classifier.state_dict())
    maps = [m.forward_intermediates(image(), 1, intermediates_only=True)[0] for m in (classifier, dense)]
    torch.testing.assert_close(*maps)


@pytest.mark.parametrize('patch_size', [2, 4, 8, 16])
def test_stems(patch_size):
    stem = OverlappingPatches(3, 32, patch_size=patch_size).eval()
    assert stem(image(1, 37, 50)).shape == (1, -(-37 // patch_size), -(-50 // patch_size), 32)
    assert [conv.conv.out_channels for conv in stem.convs] == [32 >> i for i in range(len(stem.convs))][::-1]
    assert (stem(100 * image(1)).min() > -0.2) == (patch_size == 2)  # a GELU after the only convolution


def test_other_image_channels(caplog):
    state = small().state_dict()
    state['patch_embed.pre_affine.alpha'] = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)
    grey = load_checkpoint(small(in_chans=1), state)
    assert grey.patch_embed.pre_affine.alpha.flatten().tolist() == [3.0]


def test_patches_that_cannot_be_built():
    with pytest.raises(ValueError, match=r'patch_size must be a power of two from 2 on .*got patch_size=6, dim=32'):
        small(patch_size=6)
    with pytest.raises(ValueError, match='num_heads must divide dim, got num_heads=5, dim=32'):
        small(num_heads=5)
