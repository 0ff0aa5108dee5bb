"""Without this ATS could sample other patches than the authors' code, or let images of a batch change each other."""

from functools import lru_cache
from typing import Any

import golden
import probe
import pytest
import torch
import torch.nn.functional as F
from small_reduced import close, images, reduced_by, small
from torch import nn

from densezoo.backbones import create_model, load_checkpoint, reduce_tokens
from densezoo.backbones.layers import Mlp, TokenAttention, TokenBlock
from densezoo.backbones.reduction import Tokens, report, trace_tokens
from densezoo.backbones.reduction.ats import sample, significance


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def recorded_inputs(case: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    inputs = case['inputs']
    sharp = float(inputs['attn']['how'].split('(')[1].split('*')[0])
    attention, value, x = (probe.image(inputs[key]['seed'], inputs[key]['shape']) for key in ('attn', 'v', 'raw_x'))
    return (sharp * attention).softmax(-1), value, x


@pytest.mark.parametrize('name', ['its_n197', 'its_n197_peaky', 'its_n120_ref197', 'its_k100_of_197'])
def test_recorded_sampling(name):
    case = golden.case(probe.load('ats_op'), name)
    attention, value, x = recorded_inputs(case)
    wanted, N = case['outputs'], x.shape[1]
    scores = significance(attention[:, :, :1], value)[:, 1:]
    order, kept = sample(scores, case['args']['n_ref_tokens'] - 1)
    probe.compare((scores / scores.sum(1, keepdim=True)).gather(1, order), wanted['sorted_scores'])
    assert order.flatten().tolist() == wanted['sorted_indices']['ints']
    assert kept.sum(1).tolist() == [count - 1 for count in wanted['count']['ints']]
    picks = [torch.cat((torch.zeros(1, dtype=torch.long), each[hit] + 1)) for each, hit in zip(order, kept)]
    length = wanted['selected_x']['shape'][1]
    rows = [F.pad(tokens[index], (0, 0, 0, length - len(index))) for tokens, index in zip(x, picks)]
    probe.compare(torch.stack(rows), wanted['selected_x'])
    policy = torch.stack([(torch.arange(length) < len(index)).float()[:, None] for index in picks])
    probe.compare(policy, wanted['policy'])
    weights = [F.pad(w[:, index], (0, 0, 0, length - len(index))) for w, index in zip(attention, picks)]
    probe.compare(torch.stack(weights), wanted['attn_sel'])
    assert kept.sum(1).max() < N - 1


class Bare(TokenBlock):
    """A block of which nothing is left but the attention: no norm, no MLP; `join` gives the branch alone."""

    def __init__(self):
        attn = TokenAttention(dim=96, num_heads=3, prefix=1)
        super().__init__(dim=96, norm=lambda dim: nn.Identity(), attn=attn, mlp=Mlp(dim=96))
        self.attn.load_state_dict(probe.golden_state(probe.load('ats_op')))

    def join(self, x, out):
        self.selected = x
        return self.attn.join(out, x)

    def mix_channels(self, x):
        return x


@pytest.mark.parametrize(('drop', 'masked'), [(False, False), (False, True), (True, False)])
@torch.no_grad()
def test_recorded_sampler(drop, masked):
    """Queries of the sampled tokens alone; with dropped tokens in the authors' form for training."""
    case = golden.case(probe.load('ats_op'), f'sampler_module_drop{drop:d}_policy{masked:d}')
    raw = probe.image(3, (2, 197, 96))
    alive = torch.ones(2, 197, dtype=torch.bool)
    alive[0, 150:] = not masked
    x = F.layer_norm(raw, (96,)) * alive[..., None]
    model = create_model('deit_tiny_patch16_224', dim=96, num_heads=3)
    reduction = reduce_tokens(model, 'ats', drop_tokens=drop).reduction
    block = Bare()
    tokens = Tokens(x, alive=alive if masked else None, extra=(raw.new_zeros(0, 197),))
    out = reduction.step(tokens, block, 3)
    exists = out.alive[..., None]
    probe.compare(out.x * exists, case['outputs']['x'])
    probe.compare(exists.float(), case['outputs']['policy'])


@lru_cache(1)
def recorded_model() -> Any:
    model = create_model('deit_tiny_patch16_224').eval()
    return load_checkpoint(model, probe.golden_state(probe.load('ats_deit_tiny')))


@pytest.mark.parametrize(
    'name',
    [
        'ats_drop_single0',
        pytest.param('ats_drop_single1', marks=pytest.mark.slow),
        'ats_nodrop',
        pytest.param('ats_plain', marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_recorded_logits(name):
    """Where a batch was recorded with dropped tokens removed, images had changed each other: those cases are left out,
    and single images are compared with themselves in a batch."""
    case = golden.case(probe.load('ats_deit_tiny'), f'logits_224_{name}')
    model, x = recorded_model(), probe.image(0, (2, 3, 224, 224))
    if case['ats_blocks']:
        model = reduce_tokens(model, 'ats', layers=case['ats_blocks'], drop_tokens=case['drop_tokens'])
    logits = model(x)
    if 'single' in name:
        number = int(name[-1])
        logits = logits[number : number + 1]
        close(model(x[number : number + 1]), logits)
    probe.compare(logits, case['outputs']['logits'])


def test_recorded_gradients():
    recorded = probe.load('ats_deit_tiny')
    case = golden.case(recorded, 'grad_224_ats_nodrop')
    golden.run(reduce_tokens(recorded_model(), 'ats', drop_tokens=False), recorded, case)


def test_heights_hit_the_nearest_patch():
    """The counting against the definition, compared one by one."""
    for L, count, sharp in ((9, 12, 1.0), (40, 40, 3.0), (40, 15, 6.0), (200, 196, 8.0)):
        scores = (sharp * torch.randn(4, L)).softmax(-1).double().float()
        order, kept = sample(scores, count)
        ordered = scores.gather(1, order)
        assert (ordered.diff() >= 0).all()
        heights = ordered.cumsum(1)
        heights = (heights - heights[:, :1]) / (heights[:, -1:] - heights[:, :1])
        for c, hit in zip(heights, kept):
            first = c[c > 0].min()
            spread = first + (1 - first) * torch.arange(count) / (count - 1)
            candidates = c[max(L - count, 0) :]
            nearest = (spread[:, None] - candidates).abs().argmin(1) + max(L - count, 0)
            assert hit.nonzero().flatten().tolist() == nearest.unique().tolist()


def test_patches_that_do_not_exist_change_nothing():
    scores = torch.rand(1, 20)
    alive = torch.tensor([[True] * 13 + [False] * 7])
    order, kept = sample(scores, 30, alive)
    alone, kept_alone = sample(scores[:, :13], 30)
    assert torch.equal(order[:, 7:], alone) and torch.equal(kept[:, 7:], kept_alone) and not kept[:, :7].any()
    assert sample(scores, 30, alive, count_dead=True)[1][0, 7]  # the authors' form: the least significant one too


@torch.no_grad()
def test_dropped_patches_keep_their_last_value():
    model = reduced_by('ats', features_only=True)
    states = trace_tokens(model, images())
    first, last = states[1], states[-1]
    dropped = (first.place < 0).nonzero()
    assert len(dropped) and (last.place[first.place < 0] < 0).all()
    restored, before = model.reduction.restore(last), states[0].x
    for image, token in dropped:
        assert torch.equal(restored[image, token], before[image, token])
    alive = last.alive.sum(1)
    assert len(alive.unique()) > 1, 'all images keep the same number'
    assert torch.equal((last.place >= 0).sum(1), alive)
    assert (last.place[:, :2] == torch.arange(2)).all()


@torch.no_grad()
def test_cost_of_each_image():
    model, x = reduced_by('ats'), images()
    costs = report(model, images=x).macs_of_images
    assert len(set(costs)) > 1 and max(costs) < report(model).unreduced_macs
    counts = [tokens.alive.sum(1) for tokens in trace_tokens(model, x)[2:]]
    order = sum(count.float() for count in counts).argsort()
    assert list(order) == sorted(range(3), key=lambda i: costs[i])


def test_schedule_caps_the_samples():
    model = reduced_by('ats_capped')
    assert [tokens.x.shape[1] <= most for tokens, most in zip(trace_tokens(model, images()), (32, 26))] == [True, True]


@pytest.mark.slow
def test_targets_bound_the_samples():
    share = report(reduce_tokens(small(), 'ats', layers=(0, 1, 2), target=0.7)).share
    assert 0.6 < share <= 0.7
