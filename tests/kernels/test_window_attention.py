"""Without this a window could see its neighbours, lose its border or add the bias of another pair of positions.

The definition, the part-by-part path of CPUs and the compiled graph are compared with attention between all positions
of the padded map, in which everything that window attention leaves out is masked.
"""

import pytest
import torch

from densezoo.deploy import export_program
from densezoo.kernels import use, window_attention
from densezoo.kernels.window_attention import window_attention_reference
from densezoo.kernels.window_parts import runs

# size, window, shift, pad, dilation; ugly ones first
CASES = {
    'one row': ((1, 5), (3, 3), (1, 1), (0, 0), 1),
    'one column': ((9, 1), (2, 4), (1, 3), (0, 0), 1),
    'one position': ((1, 1), (7, 7), (3, 3), (0, 0), 1),
    'window larger than the map': ((4, 4), (7, 7), (3, 3), (0, 0), 1),
    'window larger, padding above': ((4, 3), (7, 5), (2, 4), (2, 1), 1),
    'padding longer than the rest of a window': ((8, 9), (7, 7), (3, 3), (0, 0), 1),
    'padding in two rows of windows': ((8, 8), (5, 5), (4, 4), (1, 1), 1),
    'shift below the padding above': ((6, 7), (4, 4), (1, 1), (3, 2), 1),
    'rows shifted, columns not': ((6, 7), (3, 2), (2, 0), (0, 0), 1),
    'ragged and shifted': ((8, 10), (3, 4), (1, 2), (0, 0), 1),
    'one window': ((8, 10), (9, 11), (0, 0), (0, 0), 1),
    'ragged, padded on all sides': ((5, 9), (2, 4), (1, 2), (1, 2), 1),
    'dilated': ((7, 9), (2, 2), (0, 0), (0, 0), 2),
    'dilated, one large window': ((7, 9), (4, 3), (0, 0), (0, 0), 3),
    'dilated and shifted': ((7, 9), (3, 2), (1, 1), (0, 0), 2),
    'dilated, shifted, padding above': ((9, 5), (3, 2), (2, 1), (1, 2), 2),
    'stripes of rows': ((7, 4), (2, 4), (0, 0), (0, 0), 1),
    'stripes of columns': ((4, 7), (4, 3), (0, 2), (0, 1), 1),
    'exact': ((6, 9), (3, 3), (0, 0), (0, 0), 1),
    'exact and shifted': ((9, 12), (3, 3), (1, 1), (0, 0), 1),
    'windows of one position': ((3, 4), (1, 1), (0, 0), (0, 0), 1),
}
EACH = pytest.mark.parametrize('case', CASES.values(), ids=CASES)
HEADS, DIM = 2, 3  # per head


def among_all_positions(
    qkv, window, shift=(0, 0), *, heads, bias=None, scale=None, outside=None, pad=(0, 0), dilation=1, cosine=None
):
    """Attention of each position of the padded map to every other one; all that do not share a window are masked."""
    B, H, W, C3 = qkv.shape
    C, d = C3 // 3, dilation
    padded = [-(-(size + before) // (w * d)) * w * d for size, before, w in zip((H, W), pad, window)]
    x = torch.zeros(B, *padded, C3, dtype=qkv.dtype) + (0 if outside is None else outside)
    x[:, pad[0] : pad[0] + H, pad[1] : pad[1] + W] = qkv
    real = torch.zeros(padded, dtype=torch.bool)
    real[pad[0] : pad[0] + H, pad[1] : pad[1] + W] = True

    group, place = [], []  # of each row and of each column: what must be equal to share a window, number in the window
    for size, w, s in zip(padded, window, shift):
        shifted = [(position - s * d) % size for position in range(size)]
        group.append([(r // (w * d), r % d, r >= size - s * d) for r in shifted])
        place.append([r // d % w for r in shifted])
    positions = [(i, j) for i in range(padded[0]) for j in range(padded[1])]
    number = torch.tensor([place[0][i] * window[1] + place[1][j] for i, j in positions])
    groups = [(group[0][i], group[1][j]) for i, j in positions]
    seen = torch.tensor([[a == b for b in groups] for a in groups])
    if outside is None:
        seen &= real.flatten()

    query, key, value = x.reshape(B, -1, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
    if cosine is None:
        products = query @ key.transpose(-1, -2) * ((C // heads) ** -0.5 if scale is None else scale)
    else:
        lengths = query.norm(dim=-1)[..., :, None] * key.norm(dim=-1)[..., None, :]
        products = query @ key.transpose(-1, -2) / lengths.clamp(min=1e-300) * cosine[:, None, None]
    if bias is not None:
        products = products + bias[:, number[:, None], number[None, :]]
    weights = products.masked_fill(~seen, float('-inf')).softmax(-1).nan_to_num()  # padding may see nothing
    out = (weights @ value).transpose(1, 2).reshape(B, *padded, C)
    return out[:, pad[0] : pad[0] + H, pad[1] : pad[1] + W]


def arguments(case, outside=True, biased=True, batch=2, seed=0):
    (H, W), window, shift, pad, dilation = case
    torch.manual_seed(seed)
    N, C = window[0] * window[1], HEADS * DIM
    options = {
        'heads': HEADS,
        'bias': torch.randn(HEADS, N, N, dtype=torch.double) if biased else None,
        'outside': torch.randn(3 * C, dtype=torch.double) if outside else None,
        'pad': pad,
        'dilation': dilation,
    }
    return torch.randn(batch, H, W, 3 * C, dtype=torch.double), window, shift, options


@EACH
@pytest.mark.parametrize('biased', [True, False])
@pytest.mark.parametrize('outside', [True, False])
@pytest.mark.parametrize('gradients', [True, False], ids=['definition', 'parts'])
def test_values(case, biased, outside, gradients):
    qkv, window, shift, options = arguments(case, outside, biased)
    ours = window_attention(qkv.requires_grad_(gradients), window, shift, **options)
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, among_all_positions(qkv, window, shift, **options))


@EACH
@pytest.mark.parametrize('gradients', [True, False], ids=['definition', 'parts'])
def test_cosine(case, gradients):
    qkv, window, shift, options = arguments(case, outside=True)
    options['cosine'] = torch.tensor([0.5, 7.0], dtype=torch.double).requires_grad_(gradients)
    ours = window_attention(qkv.requires_grad_(gradients), window, shift, **options)
    expected = among_all_positions(qkv, window, shift, **options)
    torch.testing.assert_close(ours, expected)
    if gradients:
        given = [qkv, options['cosine']]
        grads = [torch.autograd.grad(out.square().sum(), given) for out in (ours, expected)]
        torch.testing.assert_close(*grads)


@EACH
def test_runs_cover_each_position_once(case):
    size, window, shift, pad, dilation = case
    for axis in (0, 1):
        found = runs(size[axis], window[axis], shift[axis], pad[axis], dilation, True)
        covered = [source + n for run in found for _, source, count in run.pieces for n in range(count)]
        assert sorted(covered) == list(range(size[axis]))
        assert all(len(run.labels) == window[axis] * dilation for run in found)
        assert all(run.windows == 1 or run.whole for run in found)


@pytest.mark.parametrize('elements', [1, 500, 2000])
@pytest.mark.parametrize('name', ['dilated, shifted, padding above', 'exact and shifted', 'exact'])
def test_a_few_windows_at_a_time(elements, name, monkeypatch):
    monkeypatch.setattr('densezoo.kernels.window_parts._BUFFER', elements)
    qkv, window, shift, options = arguments(CASES[name], outside=False, batch=3)
    torch.testing.assert_close(
        window_attention(qkv, window, shift, **options), among_all_positions(qkv, window, shift, **options)
    )


@pytest.mark.parametrize('name', ['ragged and shifted', 'ragged, padded on all sides', 'dilated and shifted', 'exact'])
@pytest.mark.parametrize('outside', [True, False])
def test_gradients(name, outside):
    qkv, window, shift, options = arguments(CASES[name], outside, batch=1)
    given = [t for t in (qkv, options['bias'], options['outside']) if t is not None]
    ours, expected = (
        torch.autograd.grad(f(qkv, window, shift, **options).square().sum(), given, materialize_grads=True)
        for f in (window_attention, among_all_positions)
        if all(t.requires_grad_() is t for t in given)
    )
    torch.testing.assert_close(ours, expected)
    assert torch.autograd.gradcheck(
        lambda x: window_attention(x, window, shift, **options)[:, ::2, ::2, ::2], (qkv,), fast_mode=True
    )


def test_sides_may_be_numbers_and_scale_is_used():
    qkv, _, _, options = arguments(CASES['exact and shifted'])
    expected = among_all_positions(qkv, (3, 3), (1, 1), scale=0.1, **options)
    torch.testing.assert_close(window_attention(qkv, 3, 1, scale=0.1, **options), expected)
    with use('torch'):
        torch.testing.assert_close(window_attention(qkv, 3, 1, scale=0.1, **options), expected)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_types(dtype):
    qkv, window, shift, options = arguments(CASES['ragged and shifted'])
    expected = window_attention(qkv, window, shift, **options)
    for gradients in (False, True):  # bias and outside keep their own type, as parameters do under autocast
        ours = window_attention(qkv.to(dtype).requires_grad_(gradients), window, shift, **options)
        assert ours.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_a_view_of_a_larger_map_is_taken_as_it_is():
    qkv, window, shift, options = arguments(CASES['ragged and shifted'])
    larger = torch.randn(2, 9, 20, qkv.shape[-1], dtype=torch.double)
    larger[:, :8, 10:] = qkv
    assert torch.equal(
        window_attention(larger[:, :8, 10:], window, shift, **options), window_attention(qkv, window, shift, **options)
    )


@pytest.mark.parametrize(
    ('case', 'outside'),
    [
        ('ragged and shifted', True),
        ('one window', False),  # in the example: the other sizes have several
        pytest.param('ragged and shifted', False, marks=pytest.mark.slow),
    ],
)
def test_one_graph_for_every_size(case, outside):
    class Attend(torch.nn.Module):
        def forward(self, maps):
            return window_attention(maps.permute(0, 2, 3, 1), window, shift, **options)

    _, window, shift, options = arguments(CASES[case], outside)

    def maps(batch, *size):
        return torch.randn(batch, 3 * HEADS * DIM, *size, dtype=torch.double)

    program = export_program(Attend(), maps(2, 8, 10), dynamic_size=True, min_size=5).module()
    for size in ((1, 5, 5), (3, 6, 8), (2, 11, 12)):
        x = maps(*size)
        torch.testing.assert_close(program(x), Attend()(x))


def test_compiles_into_one_graph():
    qkv, window, shift, options = arguments(CASES['ragged and shifted'])
    compiled = torch.compile(window_attention, fullgraph=True, backend='aot_eager')
    expected = window_attention_reference(qkv, window, shift, scale=DIM**-0.5, **options)
    torch.testing.assert_close(compiled(qkv, window, shift, **options), expected)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'qkv': torch.zeros(4, 4, 18)}, r'qkv must be \(B, H, W, 3C\), got .*\(4, 4, 18\)'),
        ({'heads': 4}, r'heads must divide the channels of q, k and v, got heads=4'),
        ({'window': 0}, r'window and dilation must be positive, got window=\(0, 0\)'),
        ({'dilation': 0}, r'window and dilation must be positive, .*dilation=0'),
        ({'shift': 2}, r'shift must be from 0 to window - 1, got shift=\(2, 2\), window=\(2, 2\)'),
        ({'bias': torch.zeros(2, 9, 9)}, r'bias must be \(heads, N, N\) = \(2, 4, 4\), got .*\(2, 9, 9\)'),
        ({'outside': torch.zeros(6)}, r'outside must be \(18,\), one row of qkv, got .*\(6,\)'),
        ({'pad': (-1, 0)}, r'pad must be from 0 to below a window, got pad=\(-1, 0\)'),
        ({'pad': (0, 2)}, r'pad must be from 0 to below a window, got pad=\(0, 2\)'),
        ({'cosine': torch.ones(3)}, r'cosine must be \(2,\), one factor per head, got .*\(3,\)'),
        ({'cosine': torch.ones(2), 'scale': 1.0}, r'cosine takes the place of scale; pass one of them, got scale=1.0'),
        ({'bias': torch.zeros(2, 4, 4, device='meta')}, r'bias must be where qkv is, on cpu, got bias on meta'),
        ({'backend': 'triton'}, r'window_attention cannot run with backend=.triton.'),
    ],
)
def test_errors(change, message):
    given = {'qkv': torch.zeros(1, 4, 4, 18), 'window': 2, 'heads': 2, **change}
    with pytest.raises(ValueError, match=message) as caught:
        window_attention(**given)
    assert '\n' not in str(caught.value)
