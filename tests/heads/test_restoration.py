"""Without this the restorer could move pictures by half a pixel, fail at odd sizes, or learn from padding."""

import pytest
import torch

from densezoo.heads import PyramidInfo, UNetRestorer
from densezoo.heads.restoration import Merge

PYRAMIDS = [
    PyramidInfo([6, 8, 10, 12], [4, 8, 16, 32]),
    PyramidInfo([6], [3]),
    PyramidInfo([6, 8], [8, 32]),
    PyramidInfo([6, 8], [4, 6]),
]
SIZES = [(1, 1), (2, 5), (33, 47), (64, 64), (97, 31)]


def maps(info, size, batch=2):
    return [
        torch.randn(batch, c, -(-size[0] // s), -(-size[1] // s)) for c, s in zip(info.channels(), info.reduction())
    ]


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('info', PYRAMIDS)
def test_any_size_starts_as_identity_and_learns(info, size):
    torch.manual_seed(0)
    head = UNetRestorer(feature_info=info, channels=4)
    images, features = torch.rand(2, 3, *size), maps(info, size)
    assert torch.equal(head(features, images), torch.zeros(2, 3, *size))
    for result, image in zip(head.predict(features, images, [size] * 2), images, strict=True):
        torch.testing.assert_close(result['image'], image)
    targets = [{'clean': torch.rand(3, *size)} for _ in range(2)]
    optimizer = torch.optim.SGD(head.parameters(), lr=1e-3)
    first = head.loss(features, images, targets)
    first['loss_charbonnier'].backward()
    optimizer.step()  # moves the last convolution off zero: everything before it gets gradients now
    optimizer.zero_grad()
    second = head.loss(features, images, targets)
    second['loss_charbonnier'].backward()
    assert second['loss_charbonnier'] < first['loss_charbonnier']
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in head.named_parameters() if n.endswith('weight')
    )


@pytest.mark.parametrize(('fine', 'ratio'), [(20, 2), (19, 2), (21, 4), (40, 8)])
def test_maps_are_merged_in_place(fine, ratio):
    """A coarse map that holds its cells' positions, in fine pixels, must arrive as the fine pixels' positions."""
    merge = Merge(1, 1, 1, 0)
    with torch.no_grad():
        for conv, value in ((merge.reduce, 1.0), (merge.lateral, 0.0)):
            conv.weight.fill_(value)
            conv.bias.zero_()
    coarse = (torch.arange(-(-fine // ratio)) + 0.5) * ratio - 0.5
    out = merge(coarse.expand(1, 1, len(coarse), -1), torch.zeros(1, 1, fine, fine), ratio)[0, 0, 0]
    inner = slice(ratio // 2, (len(coarse) - 1) * ratio)
    torch.testing.assert_close(out[inner], torch.arange(fine, dtype=torch.float32)[inner])


@pytest.mark.parametrize(('loss', 'expected'), [('l1', 0.25), ('mse', 0.0625), ('charbonnier', (0.0625 + 1e-6) ** 0.5)])
def test_loss_counts_only_the_pictures(loss, expected):
    info = PYRAMIDS[0]
    head = UNetRestorer(feature_info=info, channels=4, loss=loss)
    images = torch.full((2, 3, 32, 40), 0.5)
    images[0, :, 20:] = images[0, :, :, 33:] = 0  # padding
    for sizes in ([(20, 33), (32, 40)], [(32, 40), (32, 40)]):
        if sizes[0] == (32, 40):
            images = torch.full((2, 3, 32, 40), 0.5)
        targets = [{'clean': torch.full((3, *size), 0.75)} for size in sizes]
        terms = head.loss(maps(info, (32, 40)), images, targets)
        assert terms[f'loss_{loss}'].item() == pytest.approx(expected, rel=1e-4)
        assert terms['psnr'].item() == pytest.approx(12.0412, abs=1e-3)


def test_results_are_cropped_scaled_and_in_range():
    info = PYRAMIDS[0]
    torch.manual_seed(0)
    head = UNetRestorer(feature_info=info, channels=4)
    torch.nn.init.normal_(head.last.weight, std=3.0)
    images, features = torch.rand(2, 3, 32, 40), maps(info, (32, 40))
    plain = head.predict(features, images, [(31, 7), (32, 40)])
    scaled = head.predict(features, images, [(31, 7), (32, 40)], [(62, 15), (32, 40)])
    assert [tuple(r['image'].shape) for r in plain] == [(3, 31, 7), (3, 32, 40)]
    assert [tuple(r['image'].shape) for r in scaled] == [(3, 62, 15), (3, 32, 40)]
    for result in [*plain, *scaled]:
        assert result['image'].min() >= 0 and result['image'].max() <= 1
    alone = head.predict([f[1:] for f in features], images[1:], [(32, 40)])[0]['image']
    torch.testing.assert_close(alone, plain[1]['image'], rtol=1e-4, atol=1e-4)


def test_other_channels():
    head = UNetRestorer(feature_info=PYRAMIDS[0], in_chans=1, channels=4, blocks=(2, 1, 0), stem_blocks=(1, 0))
    assert head(maps(PYRAMIDS[0], (16, 16)), torch.rand(2, 1, 16, 16)).shape == (2, 1, 16, 16)


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (
            lambda: UNetRestorer(feature_info=PyramidInfo([4, 4], [2, 4])),
            r'feature_info must start at stride 3 or more .*got \[2, 4\]',
        ),
        (lambda: UNetRestorer(feature_info=PYRAMIDS[0], loss='charbonier'), "did you mean 'charbonnier'"),
        (
            lambda: UNetRestorer(feature_info=PYRAMIDS[0], blocks=(1, 1)),
            'blocks needs three and stem_blocks two entries',
        ),
        (
            lambda: UNetRestorer(feature_info=PYRAMIDS[0])(maps(PYRAMIDS[0], (8, 8)), torch.rand(2, 1, 8, 8)),
            r'images must be \(B, 3, H, W\)',
        ),
        (
            lambda: UNetRestorer(feature_info=PYRAMIDS[0], channels=4).loss(
                maps(PYRAMIDS[0], (8, 8)), torch.rand(2, 3, 8, 8), [{'clean': torch.rand(3, 9, 8)}] * 2
            ),
            'clean pictures must fit into the batch',
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
