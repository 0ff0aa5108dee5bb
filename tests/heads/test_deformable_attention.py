"""Without this deformable attention could read the wrong place and still train: it is compared with the authors' module
and with points picked by hand."""

import probe
import pytest
import torch
from torch.export import Dim, export

from densezoo.heads.deformable_attention import DeformableAttention, sample_levels

SHAPES = [(8, 10), (4, 5), (2, 3)]
GOLDEN = probe.load('heads/ms_deform_attn')
CASES = {case['name']: case['outputs'] for case in GOLDEN['cases']}


@pytest.fixture(scope='module')
def attention():
    module = DeformableAttention(channels=64, num_levels=3)
    module.load_state_dict(probe.golden_state(GOLDEN))
    return module


def inputs(width=2):
    reference = probe.image(5 if width == 2 else 6, [2, 15, 3, width]).sigmoid()
    return probe.image(3, [2, 15, 64]), reference, probe.image(4, [2, 106, 64]), SHAPES


def test_core_equals_the_authors():
    value = probe.image(0, [2, 106, 8, 8]).requires_grad_()
    locations = (probe.image(1, [2, 15, 8, 3, 4, 2]) * 0.5 + 0.5).requires_grad_()
    weights = probe.image(2, [2, 15, 8, 12]).softmax(-1).view(2, 15, 8, 3, 4).requires_grad_()
    out = sample_levels(value, SHAPES, locations, weights)
    probe.compare(out, CASES['core']['out'])
    out.square().mean().backward()
    for x, name in ((value, 'value'), (locations, 'loc'), (weights, 'weights')):
        probe.compare(x.grad, CASES['core'][f'grad_{name}'], relative=1e-3)


@torch.no_grad()
def test_module_equals_the_authors(attention):
    probe.compare(attention(*inputs()), CASES['module_points']['out'])
    padding = torch.zeros(2, 106, dtype=torch.bool)
    padding[1, 60:80] = True
    probe.compare(attention(*inputs(4), padding), CASES['module_boxes_masked']['out'])


def test_reads_the_cell_that_is_pointed_at():
    """Cell (row 1, column 2) of a 3 x 4 map lies at ((2 + 0.5) / 4, (1 + 0.5) / 3); beyond the border are zeros."""
    value = torch.arange(12.0).view(1, 12, 1, 1)
    places = torch.tensor([[2.5 / 4, 1.5 / 3], [0.5 / 4, 2.5 / 3], [2.0, 0.5]]).view(1, 3, 1, 1, 1, 2)
    out = sample_levels(value, [(3, 4)], places, torch.ones(1, 3, 1, 1, 1))
    torch.testing.assert_close(out.flatten(), torch.tensor([6.0, 8.0, 0.0]))


def test_published_initialisation():
    module = DeformableAttention(channels=16, num_heads=4, num_levels=2, num_points=3)
    bias = module.sampling_offsets.bias.view(4, 2, 3, 2)
    unit = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    for point in range(3):
        torch.testing.assert_close(bias[:, 1, point], unit * (point + 1))


@torch.no_grad()
def test_batch_equals_singles_and_exports(attention):
    query, reference, memory, shapes = inputs()
    whole = attention(query, reference, memory, shapes)
    for i in range(2):
        alone = attention(query[i : i + 1], reference[i : i + 1], memory[i : i + 1], shapes)
        torch.testing.assert_close(alone, whole[i : i + 1])
    one = attention(query, reference[:, :, :1], memory, shapes)
    torch.testing.assert_close(one, attention(query, reference[:, :, :1].expand(-1, -1, 3, -1), memory, shapes))
    batch = Dim('batch', min=2, max=8)
    dynamic = ({0: batch}, {0: batch}, {0: batch}, [(None, None)] * 3)
    program = export(attention, (query, reference, memory, shapes), dynamic_shapes=dynamic).module()
    more = [torch.cat([x, x.flip(0), x]) for x in (query, reference, memory)]
    torch.testing.assert_close(program(*more, shapes), attention(*more, shapes))


def test_errors(attention):
    with pytest.raises(ValueError, match='channels must be a multiple of num_heads=8, got 20'):
        DeformableAttention(channels=20)
    with pytest.raises(ValueError, match='num_points must be at least 1, got 0'):
        DeformableAttention(num_points=0)
    with pytest.raises(ValueError, match=r'one \(height, width\) for each of 3 levels, got \[\(8, 10\)\]'):
        attention(*inputs()[:3], SHAPES[:1])
