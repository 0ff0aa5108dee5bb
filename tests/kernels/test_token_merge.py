"""Without this other tokens could be merged than the authors merge, or unmerging could mix tokens up."""

import json
from dataclasses import replace
from pathlib import Path

import probe
import pytest
import torch

from densezoo.kernels import match_every_kth, match_tokens, merge_source, token_merge, token_unmerge

GOLDEN = json.loads((Path(__file__).parents[1] / 'goldens' / 'ops' / 'tome_op.json').read_text())
CASES = {case['name']: case for case in GOLDEN['cases']}


def close(ours, expected):
    assert list(ours.shape) == expected['shape']
    tolerance = 1e-4 * max(expected['absmax'], 1e-6)
    sampled = ours.flatten()[expected['index']].double()
    torch.testing.assert_close(sampled, torch.tensor(expected['values']).double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize('name', CASES)
def test_authors_values(name):
    case = CASES[name]
    outputs, arguments = case['outputs'], dict(case['args'])
    inputs = {key: probe.image(value['seed'], value['shape']) for key, value in case['inputs'].items()}
    size = 1 + (3 * inputs['size'].abs()).floor() if 'size' in inputs else None
    metric, x = inputs['metric'], inputs['x']
    matching = match_every_kth(metric, arguments['k']) if 'k' in arguments else match_tokens(metric, **arguments)
    merged, total = token_merge(x, matching, size)
    close(merged, outputs['x'])
    close(total, outputs['size'])
    # the authors' unmerging does not undo the order that a distillation token brings
    close(token_unmerge(merged, replace(matching, distill_token=False)), outputs['unmerged'])
    if 'k' not in arguments:
        close(merge_source(matching), outputs['source'])
        close(token_merge(x, matching)[0], outputs['merged_mean'])
        for ours, stored in ((matching.stay, 'unm_idx'), (matching.source, 'src_idx'), (matching.target, 'dst_idx')):
            assert ours.flatten().tolist() == outputs[stored]['ints']


def by_hand(x, metric, r, size):
    """Merges pair by pair; without protected tokens."""
    N = x.shape[0]
    unit = metric / metric.norm(dim=1, keepdim=True)
    pairs = []
    for a in range(0, N, 2):
        similar = [(float(unit[a] @ unit[b]), b) for b in range(1, N, 2)]
        best = max(similar, key=lambda pair: pair[0])
        pairs.append((best[0], a, best[1]))
    pairs.sort(key=lambda pair: -pair[0])
    groups = {b: [b] for b in range(1, N, 2)}
    for _, a, b in pairs[:r]:
        groups[b].append(a)
    order = [[a] for _, a, _ in pairs[r:]] + [groups[b] for b in range(1, N, 2)]
    values = [sum(x[i] * size[i] for i in group) / sum(size[i] for i in group) for group in order]
    return torch.stack(values), order


@pytest.mark.parametrize(('N', 'r'), [(2, 1), (3, 1), (7, 2), (8, 4), (9, 100)])
def test_formula(N, r):
    g = torch.Generator().manual_seed(N)
    x, metric = torch.randn(2, N, 3, generator=g).double(), torch.randn(2, N, 4, generator=g).double()
    size = torch.rand(2, N, 1, generator=g).double() + 1
    matching = match_tokens(metric, r)
    merged, total = token_merge(x, matching, size)
    restored, source = token_unmerge(merged, matching), merge_source(matching)
    for b in range(2):
        expected, groups = by_hand(x[b], metric[b], min(r, N // 2), size[b])
        torch.testing.assert_close(merged[b], expected)
        for place, group in enumerate(groups):
            assert source[b, place].nonzero().flatten().tolist() == sorted(group)
            torch.testing.assert_close(total[b, place], size[b, group].sum(0))
            torch.testing.assert_close(restored[b, group], merged[b, place].expand(len(group), -1))


@pytest.mark.parametrize('distill_token', [False, True])
def test_unmerging_restores_what_was_not_merged(distill_token):
    x = torch.randn(2, 11, 4)
    matching = match_tokens(x, 3, class_token=True, distill_token=distill_token)
    merged, _ = token_merge(x, matching)
    assert torch.equal(merged[:, 0], x[:, 0])
    if distill_token:
        assert torch.equal(merged[:, 1], x[:, 1])
    restored = token_unmerge(merged, matching)
    again = merge_source(matching).mT @ merged
    torch.testing.assert_close(restored, again)


def test_nothing_to_merge_changes_nothing():
    x = torch.randn(2, 6, 3)
    matching = match_tokens(x, 0)
    merged, size = token_merge(x, matching)
    assert torch.equal(merged, x) and torch.equal(size, torch.ones(2, 6, 1))
    assert torch.equal(token_unmerge(merged, matching), x) and torch.equal(merge_source(matching)[0], torch.eye(6))


def test_sizes_add_up_over_two_layers():
    x = torch.randn(1, 12, 4).double()
    first = match_tokens(x, 4)
    once, size = token_merge(x, first)
    second = match_tokens(once, 3)
    twice, size = token_merge(once, second, size)
    source = merge_source(second, merge_source(first)).double()
    assert size.sum() == 12 and torch.equal(source.sum(1), torch.ones(1, 12).double())
    torch.testing.assert_close(twice, source @ x / source.sum(2, keepdim=True))


def test_gradient():
    metric = torch.randn(1, 7, 3)
    matching = match_tokens(metric, 2)
    x, size = torch.randn(1, 7, 2).double().requires_grad_(), (torch.rand(1, 7, 1) + 1).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, size: token_unmerge(token_merge(x, matching, size)[0], matching), (x, size)
    )


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    x = torch.randn(2, 9, 8).to(dtype)
    matching = match_tokens(x, 3)
    merged, _ = token_merge(x, matching)
    assert merged.dtype == dtype
    torch.testing.assert_close(merged.float(), token_merge(x.float(), matching)[0], rtol=0.02, atol=0.02)


def test_compiles_into_one_graph():
    def f(x):
        matching = match_tokens(x, 3, class_token=True)
        return token_unmerge(token_merge(x, matching)[0], matching)

    x = torch.randn(2, 9, 8)
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend='aot_eager')(x), f(x))


X = torch.randn(2, 8, 3)


@pytest.mark.parametrize(
    ('call', 'text'),
    [
        (lambda: match_tokens(X[0], 2), r'metric must be \(B, N, C\) floating point with N >= 2, got .*\(8, 3\)'),
        (lambda: match_tokens(X, -1), 'r must not be negative, got r=-1'),
        (
            lambda: match_tokens(X, 2, backend='triton'),
            "match_tokens cannot run with backend='triton': metric is on cpu",
        ),
        (lambda: match_every_kth(X, 9), 'k must be from 2 to the number of tokens, 8, got k=9'),
        (lambda: token_merge(X[:, 1:], match_tokens(X, 2)), r'x must be \(2, 8, C\), the tokens that were matched'),
        (lambda: token_merge(X, match_tokens(X, 2), torch.ones(2, 8)), r'size must be \(2, 8, 1\), one per token'),
        (lambda: token_unmerge(X, match_tokens(X, 2)), r'x must be \(2, 6, C\), the tokens that merging left'),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text) as caught:
        call()
    assert '\n' not in str(caught.value)
