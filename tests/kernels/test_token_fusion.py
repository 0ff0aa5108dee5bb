"""Without this other tokens could be fused than the authors fuse, or rows could go to another image's places."""

import probe
import pytest
import torch

from densezoo.kernels import fuse_by_scores, fusion_scores, mean_to_places, sum_to_places, take_places

GOLDEN = probe.load('reduction/mctf_op')
CASES = {case['name']: case for case in GOLDEN['cases']}


def made(spec):
    z = probe.image(spec['seed'], spec['shape'])
    how = spec.get('how', '')
    return (2 * z).softmax(-1) if 'softmax' in how else 1 + (3 * z.abs()).floor() if 'floor' in how else z


@pytest.mark.parametrize('name', CASES)
def test_authors_values(name):
    """Fused tokens, sizes, sources and the attention one step ahead, for every case of the authors' function."""
    case = CASES[name]
    given, wanted = case['args'], case['outputs']
    inputs = {key: made(spec) for key, spec in case['inputs'].items()}
    x, attention, size = inputs['x'], inputs['attn'], inputs.get('size')
    received = attention.mean((1, 2))
    taus = {key: given[key] for key in ('tau_sim', 'tau_info', 'tau_size')}
    fusion = fuse_by_scores(
        fusion_scores(x, received, size, **taus),
        given['r'],
        class_token=bool(given['num_protected']),
        both_ways=bool(given['bidirection']),
    )
    place, left = fusion.place, fusion.left
    size = torch.ones(*x.shape[:2], 1) if size is None else size
    weight = {1: received[..., None] * size, 0: size, 3: torch.ones_like(size)}.get(given['pooling_type'])
    if weight is None:  # largest values
        index = place[..., None].expand_as(x)
        fused = torch.full((x.shape[0], left, x.shape[2]), float('-inf')).scatter_reduce(1, index, x, 'amax')
    else:
        share = weight / take_places(sum_to_places(weight, place, left), place)
        fused = mean_to_places(x, share, *fusion)
    probe.compare(fused, wanted['x'])
    probe.compare(sum_to_places(size, place, left), wanted['size'])
    probe.compare(sum_to_places(torch.eye(x.shape[1]).expand(2, -1, -1), place, left), wanted['source'])
    if 'attn_next' in wanted and weight is not None:
        heads = attention.shape[1]
        of_heads = place[:, None].expand(-1, heads, -1).flatten(0, 1)
        rows = sum_to_places((attention * share[:, None]).flatten(0, 1), of_heads, left)
        both = sum_to_places(rows.mT, of_heads, left).mT
        probe.compare(both.unflatten(0, (2, heads)), wanted['attn_next'])


@pytest.mark.parametrize(('shape', 'left'), [((1, 1, 1), 1), ((3, 7, 2), 4), ((2, 5, 3), 9), ((2, 0, 3), 2)])
def test_rows_against_a_loop(shape, left):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True)
    place = torch.randint(0, left, shape[:2], generator=g)
    out = sum_to_places(x, place, left)
    expected = torch.zeros(shape[0], left, shape[2], dtype=torch.float64)
    for b in range(shape[0]):
        for n in range(shape[1]):
            expected[b, place[b, n]] += x.detach()[b, n]
    torch.testing.assert_close(out, expected)
    back = take_places(out, place)
    for b in range(shape[0]):
        for n in range(shape[1]):
            torch.testing.assert_close(back[b, n], out[b, place[b, n]])
    if shape[1]:
        assert torch.autograd.gradcheck(lambda t: take_places(sum_to_places(t, place, left), place), (x,))


@pytest.mark.parametrize(('N', 'r'), [(2, 0), (3, 1), (7, 3), (8, 3), (9, 3), (9, 4)])
@pytest.mark.parametrize('both_ways', [True, False])
def test_every_place_is_taken(N, r, both_ways):
    """The r tokens that leave leave no gap, and the class token is alone at the front."""
    x = torch.randn(4, N, 6, generator=torch.Generator().manual_seed(N))
    scores = fusion_scores(x, torch.rand(4, N, generator=torch.Generator().manual_seed(1)) + 0.1, None)
    place, kept, moved = fuse_by_scores(scores, r, class_token=True, both_ways=both_ways)
    assert torch.equal(place.gather(1, kept), torch.arange(N - r).expand(4, -1))
    assert torch.cat((kept, moved), 1).sort(1).values.equal(torch.arange(N).expand(4, -1))
    assert (kept[:, 0] == 0).all() and ((place == 0).sum(1) == 1).all()
    share = torch.ones(4, N, 1) / take_places(sum_to_places(torch.ones(4, N, 1), place, N - r), place)
    expected = sum_to_places(x * share, place, N - r)
    torch.testing.assert_close(mean_to_places(x, share, place, kept, moved), expected)


@pytest.mark.parametrize('r', [0, 1, 2, 5])
@pytest.mark.parametrize('both_ways', [True, False])
def test_the_class_token_stays_alone(r, both_ways):
    scores = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(r))
    scores[:, 0] = 2  # everybody's best partner, if it could be one
    place = fuse_by_scores(scores, r, class_token=True, both_ways=both_ways).place
    assert (place[:, 0] == 0).all() and (place[:, 1:] > 0).all()


def test_bad_input():
    with pytest.raises(ValueError, match=r'r must be from 0 to 4, got r=5'):
        fuse_by_scores(torch.rand(1, 5, 4), 5, class_token=True)
    with pytest.raises(ValueError, match=r'x must be \(B, N, C\) and place \(B, N\), got .*\(2, 3, 4\)'):
        sum_to_places(torch.rand(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64), 3)
    place = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(
        ValueError, match="mean_to_places cannot run with backend='triton': rows are 8193 channels wide"
    ):
        mean_to_places(torch.rand(1, 1, 8193), torch.ones(1, 1, 1), place, place, place[:, 1:], backend='triton')
