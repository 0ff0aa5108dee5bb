"""Without this a token could attend outside its window, a set differ from the authors', or an empty window fail."""

import json
from pathlib import Path

import pytest
import torch

from densezoo.kernels import Windows, build_windows, rotated_sets, sparse_window_attention, window_attention

GOLDENS = Path(__file__).parents[1] / 'goldens' / 'ops'

# tokens per window; ugly ones first
COUNTS = {
    'no window': [],
    'only empty windows': [0, 0],
    'one token': [1],
    'empty ones between': [0, 3, 0, 0, 5, 1, 0],
    'very different': [40, 1, 2, 1, 9],
}
EACH = pytest.mark.parametrize('counts', COUNTS.values(), ids=COUNTS)


def offsets_of(counts):
    return torch.tensor([0, *counts]).cumsum(0)


def tokens(count, heads=2, width=3, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(count, heads, width, generator=g, dtype=dtype) for _ in range(3)]


def by_hand(q, k, v, groups, bias=None, places=None, scale=None):
    """One query and one head at a time; groups: (tokens that ask, tokens that are seen) of each window."""
    out = torch.zeros_like(q)
    for asking, seen in groups:
        for i in asking:
            for h in range(q.shape[1]):
                if len(seen):
                    logits = torch.stack([q[i, h] @ k[j, h] for j in seen]) * (scale or q.shape[-1] ** -0.5)
                    if bias is not None:
                        logits = logits + torch.stack([bias[h, places[i], places[j]] for j in seen])
                    out[i, h] = logits.softmax(0) @ v[list(seen), h]
    return out


def ranges(offsets):
    return [range(a, b) for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist())]


@EACH
@pytest.mark.parametrize('biased', [False, True])
def test_formula(counts, biased):
    offsets = offsets_of(counts)
    q, k, v = tokens(int(offsets[-1]))
    options = {}
    if biased:
        options = {'bias': torch.randn(2, 7, 7).double(), 'places': torch.arange(len(q)) % 7}
    expected = by_hand(q, k, v, [(r, r) for r in ranges(offsets)], **options)
    torch.testing.assert_close(sparse_window_attention(q, k, v, offsets, **options), expected)


def test_other_keys_and_queries_without_any():
    offsets, key_offsets = offsets_of([2, 3, 0, 1]), offsets_of([4, 0, 2, 1])
    (q, _, _), (_, k, v) = tokens(6), tokens(7, seed=1)
    ours = sparse_window_attention(q, k, v, offsets, key_offsets=key_offsets, scale=0.3)
    expected = by_hand(q, k, v, list(zip(ranges(offsets), ranges(key_offsets))), scale=0.3)
    torch.testing.assert_close(ours, expected)
    assert not ours[2:5].any() and ours[:2].all()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_types(dtype):
    offsets = offsets_of([5, 0, 9])
    given = tokens(14)
    bias, places = torch.randn(2, 9, 9), torch.arange(14) % 9
    expected = sparse_window_attention(*given, offsets, bias=bias.double(), places=places)
    ours = sparse_window_attention(*(t.to(dtype) for t in given), offsets, bias=bias, places=places)
    assert ours.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 0.03}[dtype]
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_gradient():
    mask = torch.zeros(1, 4, 5, dtype=torch.bool)
    mask[0, [0, 0, 1, 3, 3], [0, 4, 1, 2, 3]] = True
    windows = build_windows(mask, 2, 1)
    given = [t.requires_grad_() for t in (*tokens(5), torch.randn(2, 4, 4).double())]

    def call(q, k, v, bias):
        return sparse_window_attention(q, k, v, windows, bias=bias)

    assert torch.autograd.gradcheck(call, given)


def test_views_are_taken_as_they_are():
    q, k, v = torch.randn(9, 2, 3, 4).permute(2, 0, 1, 3).unbind(0)
    offsets = offsets_of([4, 5])
    ours = sparse_window_attention(q, k, v, offsets)
    assert torch.equal(ours, sparse_window_attention(*(t.contiguous() for t in (q, k, v)), offsets))


@pytest.mark.parametrize('shift', [(0, 0), (1, 2)])
@pytest.mark.parametrize('occupied', [0.0, 0.3, 1.0])
def test_agrees_with_windows_of_a_whole_map(occupied, shift):
    """A full map is shifted-window attention; of a sparse one each token sees the tokens of its window."""
    torch.manual_seed(0)
    B, H, W, heads, width = 2, 7, 8, 2, 3
    qkv = torch.randn(B, H, W, 3 * heads * width, dtype=torch.float64)
    bias = torch.randn(heads, 12, 12, dtype=torch.float64)
    mask = torch.rand(B, H, W) < occupied
    q, k, v = qkv[mask].unflatten(1, (3, heads, width)).unbind(1)
    windows = build_windows(mask, (3, 4), shift)
    ours = sparse_window_attention(q, k, v, windows, bias=bias)
    if occupied == 1:
        expected = window_attention(qkv, (3, 4), shift, heads=heads, bias=bias)[mask].unflatten(1, (heads, width))
    else:
        coords = mask.nonzero()
        cells = [(b, (y - shift[0]) // 3, (x - shift[1]) // 4) for b, y, x in coords.tolist()]
        places = [(y - shift[0]) % 3 * 4 + (x - shift[1]) % 4 for _, y, x in coords.tolist()]
        groups = [[i for i, cell in enumerate(cells) if cell == one] for one in dict.fromkeys(cells)]
        assert len(windows) == len(groups)
        expected = by_hand(q, k, v, [(g, g) for g in groups], bias, places)
    torch.testing.assert_close(ours, expected)


def test_coordinates_in_any_order_are_the_mask():
    mask = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    coords = mask.nonzero()
    order = torch.randperm(len(coords))
    given = tokens(len(coords))
    expected = sparse_window_attention(*given, build_windows(mask, 3))
    ours = sparse_window_attention(*(t[order] for t in given), build_windows(coords[order], 3))
    torch.testing.assert_close(ours, expected[order])


def voxels(count, width, height, depth):
    """The coordinates that the recorded runs had, see `inputs` there."""
    images = []
    for image in range(2):
        i = torch.arange(width * height * depth)
        hashed = (i * 2654435761 + image * 40503 * 97 + (i // 977) * 7919) % 2**32
        x, y, z = i % width, i // width % height, i // (width * height)
        kind = (x // 9 + y // 11) % 3
        rarity = count * torch.where(kind == 0, 8, torch.where(kind == 1, 2, 60))
        kept = (hashed >> 8) % rarity == 0
        coords = torch.stack((torch.full_like(x, image), z, y, x), 1)[kept]
        images.append(coords[torch.argsort(hashed[kept], stable=True)])
    return torch.cat(images)


@pytest.mark.parametrize(('name', 'rarity'), [('dsvt_pillar', 1), ('dsvt_voxel', 6)])
@pytest.mark.parametrize('shifted', [0, 1])
def test_sets_are_the_authors(name, rarity, shifted):
    golden = json.loads((GOLDENS / f'{name}_partition.json').read_text())
    config, case = golden['config'], golden['cases'][0]
    expected = case['outputs'][f'stage0_shift{shifted}']
    coords = voxels(rarity, *config['sparse_shape'])
    assert coords.sum(0).tolist() == case['outputs']['stage0_coords']['sum']
    window, shift = config['window_shape'][0], config['shifts_list'][0][shifted]
    if shifted:
        window = [a * b for a, b in zip(window, config['hybrid_factor'])]
    window, shift = window[::-1], shift[::-1]
    theirs = [(w - s) % w for w, s in zip(window, shift)]
    sets = rotated_sets(coords, window, theirs, set_size=config['set_info'][0][0])
    assert sets.index.shape[1] == expected['num_sets']
    first, last = (torch.tensor(expected[f'set_inds_{which}']) for which in ('first', 'last'))
    assert torch.equal(sets.index[:, : first.shape[1]], first) and torch.equal(sets.index[:, -1], last)
    sampled = sets.index.flatten()[expected['set_inds']['index']]
    assert sampled.tolist() == expected['set_inds']['values']
    assert sets.repeated.sum((1, 2)).tolist() == expected['mask_count']
    assert sets.repeated[0].sum(1).tolist() == expected['mask_per_set_y']
    windows = build_windows(coords, window, theirs)
    assert sorted(windows.offsets.diff().tolist()) == sorted(expected['voxels_per_window'])


def test_attention_within_sets():
    """Queries and keys are each set's distinct tokens, and each token is in one set."""
    coords = torch.stack((torch.zeros(23).long(), torch.arange(23) // 5, torch.arange(23) % 5), 1)
    q, k, v = tokens(23)
    sets = rotated_sets(coords, (3, 5), set_size=4)
    assert sets.repeated.any()
    for axis in (0, 1):
        rows = [list(dict.fromkeys(row)) for row in sets.index[axis].tolist()]
        assert sorted(token for row in rows for token in row) == list(range(23))
        expected = by_hand(q, k, v, [(row, row) for row in rows])
        torch.testing.assert_close(sparse_window_attention(q, k, v, sets.windows(axis)), expected)
    assert torch.equal(sets.index[0].flatten()[~sets.repeated[0].flatten()].unique(), torch.arange(23))


def test_windows_may_share_tokens():
    """Token 2 is in both windows and gets the first one's result; token 4 is in none and gets zeros."""
    q, k, v = tokens(5)
    index = torch.tensor([1, 0, 2, 2, 3])
    windows = Windows(torch.tensor([0, 3, 5]), index, torch.tensor([1, 0, 2, -1, 3]), None, 3)
    expected = by_hand(q, k, v, [([1, 0, 2], [1, 0, 2]), ([3], [2, 3])])
    torch.testing.assert_close(sparse_window_attention(q, k, v, windows), expected)


def test_sets_of_nothing():
    sets = rotated_sets(torch.zeros(0, 3).long(), 4, set_size=5)
    assert sets.index.shape == (2, 0, 5)
    q, k, v = tokens(0)
    assert sparse_window_attention(q, k, v, sets.windows(0)).shape == (0, 2, 3)


def test_compiles_with_windows_made_outside():
    windows = build_windows(torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.7, 3)
    given, bias = tokens(int(windows.index.numel())), torch.randn(2, 9, 9).double()
    compiled = torch.compile(sparse_window_attention, fullgraph=True, backend='aot_eager')
    expected = sparse_window_attention(*given, windows, bias=bias)
    torch.testing.assert_close(compiled(*given, windows, bias=bias), expected)
    offsets = offsets_of([3, 0, 5])
    given = tokens(8)
    ours = compiled(*given, offsets, longest=5)
    torch.testing.assert_close(ours, sparse_window_attention(*given, offsets))


COORDS = torch.tensor([[0, 1, 2], [0, 3, 1]])


@pytest.mark.parametrize(
    ('call', 'error', 'text'),
    [
        (
            lambda: build_windows(COORDS.float(), 2),
            TypeError,
            'coords must be integers, or a mask of bool, got torch.fl',
        ),
        (lambda: build_windows(COORDS[0], 2), ValueError, r'coords must be \(T, 1 \+ n\), .*\(3,\)'),
        (lambda: build_windows(COORDS, (2, 2, 2)), ValueError, 'must have one number per axis, 2, got window='),
        (lambda: build_windows(COORDS, 2, 2), ValueError, r'shift from 0 to window - 1, got window=\(2, 2\), shift='),
        (lambda: build_windows(COORDS - 1, 2), ValueError, r'coords must not be negative, got \[-1, 0, 0\]'),
        (
            lambda: build_windows(COORDS, 2, size=(3, 3)),
            ValueError,
            r'coords must lie in the map, size=\(3, 3\), got \[3',
        ),
        (lambda: build_windows(torch.ones(3, dtype=torch.bool), 2), ValueError, r'a mask must be \(B, H, W\)'),
        (lambda: rotated_sets(COORDS[:, :2], 2, set_size=3), ValueError, 'sets need two spatial axes'),
        (lambda: rotated_sets(COORDS, 2, set_size=0), ValueError, 'a positive set_size, got 2 and set_size=0'),
    ],
)
def test_bad_coordinates(call, error, text):
    with pytest.raises(error, match=text) as caught:
        call()
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('change', 'text'),
    [
        ({'q': torch.zeros(4, 6)}, r'q must be \(T, h, d\), k and v \(S, h, d\), got'),
        ({'v': torch.zeros(4, 2, 4)}, r'q must be \(T, h, d\), k and v \(S, h, d\), got'),
        ({'k': torch.zeros(4, 2, 3).half()}, 'q, k and v must be of one type on one device, got torch.float32 on cpu'),
        ({'k': torch.zeros(5, 2, 3), 'v': torch.zeros(5, 2, 3)}, 'other keys need key_offsets'),
        ({'offsets': torch.tensor([0, 5])}, 'offsets must go from 0 to 4, the number of tokens, .*got 0 to 5'),
        ({'offsets': torch.tensor([0, 3, 2, 4])}, 'not decrease; got 0 to 4, smallest step -1'),
        ({'offsets': torch.tensor([0.0, 4.0])}, r'offsets must be \(W \+ 1,\) integers, got torch.float32'),
        ({'key_offsets': torch.tensor([0, 1, 2, 4])}, r'key_offsets must have one number per window'),
        ({'bias': torch.zeros(3, 2, 2)}, r'bias must be \(h, N, N\), h = 2'),
        ({'bias': torch.zeros(2, 2, 2)}, 'bias needs the places of tokens within their windows'),
        ({'bias': torch.zeros(2, 2, 2), 'places': torch.arange(4)}, 'places must be from 0 to 1, got 0 to 3'),
        ({'offsets': build_windows(COORDS, 2), 'places': torch.arange(4)}, 'Windows bring their own places'),
        ({'backend': 'triton'}, "sparse_window_attention cannot run with backend='triton': q is on cpu"),
    ],
)
def test_bad_calls(change, text):
    given = {'q': torch.zeros(4, 2, 3), 'k': torch.zeros(4, 2, 3), 'v': torch.zeros(4, 2, 3)}
    with pytest.raises(ValueError, match=text) as caught:
        sparse_window_attention(**{**given, 'offsets': torch.tensor([0, 1, 4]), **change})
    assert '\n' not in str(caught.value)
