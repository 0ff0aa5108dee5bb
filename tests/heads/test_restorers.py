"""Without this a whole restorer could fail at odd sizes, mix the pictures of a batch, touch known pixels, or learn from
padding; and the authors' kinds of blocks could stop fitting pyramids of other backbones."""

import pytest
import torch
import torch.nn.functional as F

from densezoo.backbones import create_model, load_checkpoint
from densezoo.heads import MAT, TAT, Histoformer, OwnRestorer, PyramidInfo, Restormer, UNetRestorer
from densezoo.heads.losses import pearson
from densezoo.heads.mat_layers import MATBlock, PartialConv, between
from densezoo.heads.tat import LocalChannelAttention, TaskBalance, depthwise, starts
from densezoo.heads.ushaped import mirror
from densezoo.train import Restorer

U_SHAPED = {
    'restormer': lambda **kw: Restormer(**{**Restormer.reduced, **kw}),
    'bias_free': lambda **kw: Restormer(**{**Restormer.reduced, 'norm': 'bias_free', 'bias': True, **kw}),
    'histoformer': lambda **kw: Histoformer(**{**Histoformer.reduced, **kw}),
    'tat': lambda **kw: TAT(**{**TAT.reduced, 'in_chans': 3, 'out_chans': 3, **kw}),
}
SIZES = [(1, 1), (3, 17), (16, 24), (33, 40)]


def build(name, **options):
    torch.manual_seed(0)
    return U_SHAPED[name](**options).eval()


def small_mat(**options):
    torch.manual_seed(0)
    model = MAT(**{**MAT.reduced, **options}).eval()
    torch.nn.init.normal_(model.mapping.w_avg)
    return model


@pytest.mark.parametrize('name', U_SHAPED)
@torch.no_grad()
def test_any_size_and_batch_equals_singles(name):
    model = build(name).double()
    for size in SIZES:
        images = torch.rand(2, 3, *size, dtype=torch.float64)
        out = model(images)
        assert out.shape == images.shape and out.isfinite().all()
        torch.testing.assert_close(out[1:], model(images[1:]), rtol=0, atol=1e-9)
    torch.testing.assert_close(out, model(mirror(images, 8))[..., :33, :40])


def test_mirrored_edges():
    row = torch.tensor([[[[1.0, 2.0, 3.0, 4.0, 5.0]]]])
    assert mirror(row, 4)[0, 0, 0].tolist() == [1, 2, 3, 4, 5, 4, 3, 2]
    assert (mirror(row, 4) == mirror(row, 4)[:, :, :1]).all()  # one row alone is repeated
    torch.testing.assert_close(
        mirror(row.expand(1, 1, 5, 5), 4), F.pad(row.expand(1, 1, 5, 5), (0, 3, 0, 3), 'reflect')
    )


@pytest.mark.parametrize('name', U_SHAPED)
@pytest.mark.parametrize('scale', [1, 2, 4])
def test_learns_at_every_scale(name, scale):
    """A whole network in the task: steps lower the loss, every parameter learns, checkpointing changes nothing."""
    network = build(name, scale=scale)
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if key.endswith('lambda_dw'):  # zero at first: nothing would reach the kernel network
                parameter.fill_(0.1)
    task = Restorer(backbone=network, head=OwnRestorer(scale=scale, pearson=1.0)).train()
    images = torch.rand(2, 3, 16, 24)
    targets = [{'clean': torch.rand(3, 16 * scale, 24 * scale)}, {'clean': torch.rand(3, 10 * scale, 24 * scale)}]
    losses = task(images, targets, mode='loss')
    assert losses.keys() == {'loss_l1', 'loss_pearson', 'psnr'}
    first, _ = task.parse_losses(losses)
    first.backward()
    gradients = {key: parameter.grad for key, parameter in task.named_parameters()}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    assert all(g.abs().sum() > 0 for key, g in gradients.items() if g.ndim > 1 and not key.endswith('temperature'))
    network.set_grad_checkpointing()
    again, _ = task.parse_losses(task(images, targets, mode='loss'))
    torch.testing.assert_close(again, first)
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        total, _ = task.parse_losses(task(images, targets, mode='loss'))
        total.backward()
        optimizer.step()
    assert total < first
    results = task.eval().results(task.extract_features(images)[1], images, [{'size': (16, 24)}, {'size': (10, 7)}])
    assert [tuple(r['image'].shape[1:]) for r in results] == [(16 * scale, 24 * scale), (10 * scale, 7 * scale)]


def test_published_files_load(tmp_path):
    """BasicSR keeps the weights under 'params'."""
    model = build('restormer')
    torch.save({'params': model.state_dict()}, tmp_path / 'deraining.pth')
    with torch.no_grad():
        other = load_checkpoint(Restormer(**Restormer.reduced), tmp_path / 'deraining.pth').eval()
        images = torch.rand(1, 3, 16, 16)
        assert torch.equal(other(images), model(images))


@torch.no_grad()
def test_dual_pixels():
    model = build('restormer', in_chans=6, dual_pixel=True)
    images = torch.rand(1, 6, 16, 16)
    model.output.weight.zero_()
    assert (model(images) == 0).all()  # no picture is added


@pytest.mark.parametrize('block', ['restormer', 'histoformer'])
@pytest.mark.parametrize('backbone', ['poolformer_s12', 'swin_tiny_patch4_window7_224', 'deit_tiny_patch16_224'])
def test_blocks_on_pooling_window_and_plain_backbones(block, backbone):
    torch.manual_seed(0)
    body = create_model(backbone, features_only=True, **type(create_model(backbone)).reduced)
    head = {'type': UNetRestorer, 'channels': 8, 'block': block, 'scale': 2}
    task = Restorer(backbone=body, head=head).train()
    torch.nn.init.normal_(task.head.last.weight, std=0.01)
    images = torch.rand(2, 3, 40, 56)
    total, _ = task.parse_losses(task(images, [{'clean': torch.rand(3, 80, 112)}] * 2, mode='loss'))
    total.backward()
    weights = [p for p in task.parameters() if p.ndim > 1 and p.requires_grad]
    assert sum(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in weights) > 0.9 * len(weights)


def test_unet_starts_as_the_bicubic_enlargement():
    info = PyramidInfo([6, 8], [4, 8])
    head = UNetRestorer(feature_info=info, channels=8, scale=4, block='restormer')
    images, maps = torch.rand(1, 3, 9, 12), [torch.randn(1, 6, 3, 3), torch.randn(1, 8, 2, 2)]
    enlarged = F.interpolate(images, scale_factor=4, mode='bicubic').clamp(0, 1)
    torch.testing.assert_close(head.predict(maps, images, [(9, 12)])[0]['image'], enlarged[0])


def test_known_pixels_come_back():
    info = PyramidInfo([6], [4])
    head = UNetRestorer(feature_info=info, channels=8, holes=True)
    torch.nn.init.normal_(head.last.weight)
    images = torch.rand(2, 4, 12, 16)
    images[:, 3] = (images[:, 3] > 0.5).float()
    images[1, 3] = 0  # nothing is known
    restored = head.restore([torch.randn(2, 6, 3, 4)], images)
    known = images[:, 3:].expand(-1, 3, -1, -1) > 0
    assert torch.equal(restored[known], images[:, :3][known]) and not torch.equal(restored[1], images[1, :3])


@torch.no_grad()
def test_mat_fills_holes_alone_at_any_size():
    model = small_mat()
    for size in [(128, 100), (70, 60)]:
        images = torch.rand(2, 4, *size)
        images[:, 3] = (torch.rand(2, *size) > 0.5).float()
        images[1, 3] = 0  # all hole
        out = model(images)
        known = images[:, 3:].expand(-1, 3, -1, -1) > 0
        assert out.isfinite().all() and torch.equal(out[known], images[:, :3][known])
        hidden = images.clone()
        hidden[:, :3] *= images[:, 3:]  # what lies in a hole is not seen
        torch.testing.assert_close(model(hidden)[~known], out[~known], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(images[:1])[0], out[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(model(images), out)
    drawn = small_mat(draw=True)
    assert not torch.equal(drawn(images), drawn(images))


def test_mat_learns():
    model = small_mat().train()
    task = Restorer(backbone=model, head=OwnRestorer(holes=True)).train()
    images = torch.rand(1, 4, 128, 128)
    images[:, 3] = (images[:, 3] > 0.3).float()
    before = model.mapping.w_avg.clone()
    total, _ = task.parse_losses(task(images, [{'clean': torch.rand(3, 128, 128)}], mode='loss'))
    total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.parameters())
    assert not torch.equal(model.mapping.w_avg, before)


def test_holes_close_from_their_rims():
    conv = PartialConv(2, 2)
    mask = torch.zeros(1, 1, 9, 9)
    mask[..., 0] = 1
    x = torch.rand(1, 2, 9, 9)
    for step in range(1, 9):
        x, mask = conv(x, mask)
        assert mask[0, 0, 0].tolist() == [1.0] * (step + 1) + [0.0] * (8 - step)
        assert (x[..., step + 1 :] == 0).all()


def test_shifted_windows_do_not_mix_distant_tokens():
    """Token (y, x) may attend to another only where they lie in one window of the shifted, unrolled grid."""
    size, window, shift = 8, 4, 2
    allowed = between(size, size, window, shift, torch.zeros(1)) == 0
    block = MATBlock(4, 1, window=window, shift=shift)
    place = torch.arange(size * size).view(1, size, size, 1)
    tokens = block._cut(place)[0, :, :, 0]
    for number, cells in enumerate(tokens):
        y, x = cells // size, cells % size
        near = ((y + shift) // window)[:, None] == ((y + shift) // window)
        near &= ((x + shift) // window)[:, None] == ((x + shift) // window)
        assert torch.equal(allowed[number], near)
    assert torch.equal(block._join(block._cut(place.float()), size, size), place.float())


@torch.no_grad()
def test_tat_attends_in_overlapping_windows():
    assert (
        starts(10, 10) == [0] and starts(11, 10) == [0, 1] and starts(200, 96) == [0, 52, 104] and starts(3, 9) == [0]
    )
    torch.manual_seed(0)
    attention = LocalChannelAttention(8, 4)
    attention.window = 6
    qkv = torch.rand(1, 24, 6, 10)
    out = attention.attend(qkv)
    left, right = (attention.attend(qkv[..., part].contiguous()) for part in (slice(0, 6), slice(4, 10)))
    torch.testing.assert_close(out[..., :4], left[..., :4])
    torch.testing.assert_close(out[..., 6:], right[..., 2:])
    torch.testing.assert_close(out[..., 4:6], (left[..., 4:] + right[..., :2]) / 2)


def test_kernels_of_each_picture():
    x, kernels = torch.rand(2, 3, 5, 6), torch.rand(2, 3, 1, 3, 3)
    out = depthwise(x, kernels)
    for i in range(2):
        torch.testing.assert_close(out[i : i + 1], F.conv2d(x[i : i + 1], kernels[i], padding=1, groups=3))


def test_task_balance_starts_as_half_the_loss_and_learns_weights():
    balance = TaskBalance()
    error = torch.tensor([0.1, 0.3], requires_grad=True)
    loss = balance(torch.tensor([0.2, 0.5]), torch.tensor([0.1, 0.2]), error)
    assert loss.item() == pytest.approx(0.5 * 0.2 + 0.5 * torch.log(torch.tensor(2.0)).item(), rel=1e-5)
    loss.backward()
    torch.testing.assert_close(error.grad, torch.tensor([0.25, 0.25]))
    assert balance.weight_estimator.fc_out.bias.grad.abs() > 0


def test_pearson_ignores_padding_and_constant_pictures():
    torch.manual_seed(0)
    a, b = torch.rand(2, 3, 6, 8), torch.rand(2, 3, 6, 8)
    inside = torch.zeros(2, 1, 6, 8)
    inside[0, :, :4, :5] = inside[1] = 1
    expected = (pearson(a[:1, :, :4, :5], b[:1, :, :4, :5]) + pearson(a[1:], b[1:])) / 2
    torch.testing.assert_close(pearson(a, b, inside), expected)
    flat = torch.full((1, 3, 6, 8), 0.3, requires_grad=True)
    loss = pearson(flat, b[:1])
    loss.backward()
    assert loss.item() == pytest.approx(0.5, abs=1e-4) and flat.grad.isfinite().all()
    assert pearson(a, a).item() == pytest.approx(0, abs=1e-4) and pearson(a, 1 - a).item() == pytest.approx(1, abs=1e-4)


INFO = PyramidInfo([4], [4])


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: Restormer(depths=(1, 1)), 'depths and num_heads need four entries'),
        (lambda: Restormer(dim=12, num_heads=(1, 5, 4, 8)), r'num_heads must divide the widths \[12, 24, 48, 96\]'),
        (lambda: Restormer(dim=10, num_heads=(1, 1, 1, 1)), 'dim must be a multiple of 4 .* got 10'),
        (lambda: Restormer(norm='biasfree'), "norm must be one of .* did you mean 'bias_free'"),
        (lambda: Restormer(out_chans=4), 'out_chans must not exceed in_chans=3, got 4'),
        (lambda: build('restormer')(torch.rand(1, 1, 8, 8)), r'images must be \(B, 3, H, W\), got \(1, 1, 8, 8\)'),
        (lambda: Histoformer(dim=16), r'int\(dim \* expansion\) must be a multiple of 4, got 42'),
        (lambda: MAT(resolution=100), 'resolution must be 128 times a power of two, got 100'),
        (lambda: small_mat()(torch.rand(1, 3, 8, 8)), r'images must be \(B, 4, H, W\), the last channel 1 where'),
        (lambda: MATBlock(4, 1, window=8)(torch.rand(1, 4, 8, 4)), 'the map must hold whole windows of 8, got 4x8'),
        (lambda: UNetRestorer(feature_info=INFO, block='histofromer'), "did you mean 'histoformer'"),
        (lambda: UNetRestorer(feature_info=INFO, channels=12, block='histoformer'), 'channels must be a multiple of 8'),
        (lambda: OwnRestorer(holes=True, scale=2), 'holes are filled at the size of the picture, got scale=2'),
        (lambda: OwnRestorer(pearson=-1.0), 'pearson must not be negative, got -1.0'),
        (
            lambda: OwnRestorer(scale=2)(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)),
            r'the network must return pictures \(1, 3, 16, 16\), got \(1, 3, 8, 8\)',
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert '\n' not in str(error.value)
