"""Degradations: a wrong formula trains restorers for another problem; a hidden random source makes runs differ."""

import math

import numpy as np
import pytest
import torch

from densezoo.data.degradations import (
    JPEG,
    Blur,
    Degrade,
    GaussianNoise,
    Haze,
    PoissonNoise,
    Rain,
    RandomDegrade,
    Snow,
    gaussian_blur,
)

EVERY = [
    GaussianNoise(),
    GaussianNoise(sigma=(5, 50)),
    PoissonNoise(peak=(5, 60)),
    Blur(),
    Blur(kind='motion'),
    JPEG(),
    Rain(),
    Snow(),
    Haze(),
    Degrade(steps=[Blur(), GaussianNoise(), JPEG()]),
    RandomDegrade(steps=[Rain(), Snow()]),
]
SIZES = [(3, 1, 1), (3, 5, 200), (1, 17, 9), (3, 64, 48)]


def photograph(*shape):
    y, x = torch.meshgrid(torch.linspace(0, 6, shape[1]), torch.linspace(0, 9, shape[2]), indexing='ij')
    return torch.stack([0.5 + 0.5 * torch.sin(x * (c + 1) + y) for c in range(shape[0])])


def seeded(degradation, image, seed=0):
    torch.manual_seed(seed)
    return degradation(image)


@pytest.mark.parametrize('degradation', EVERY, ids=repr)
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_shape_range_determinism(degradation, size):
    image = photograph(*size)
    before = image.clone()
    first = seeded(degradation, image)
    assert first.shape == image.shape and first.dtype == torch.float32 and first.is_contiguous()
    assert first.isfinite().all() and first.min() >= 0 and first.max() <= 1
    assert torch.equal(image, before)  # the argument is left alone
    assert torch.equal(first, seeded(degradation, image))


@pytest.mark.parametrize('degradation', EVERY, ids=repr)
def test_only_torchs_generator_matters(degradation):
    image = photograph(3, 40, 40)
    np.random.seed(1)
    first = seeded(degradation, image)
    np.random.seed(2)
    assert torch.equal(first, seeded(degradation, image))
    assert not torch.equal(first, image)
    if not isinstance(degradation, JPEG):
        assert not torch.equal(first, seeded(degradation, image, seed=1))


def test_gaussian_noise_has_the_stated_deviation():
    image = torch.full((3, 200, 200), 0.5)
    noise = seeded(GaussianNoise(sigma=25, clip=False), image) - image
    assert math.isclose(float(noise.std()) * 255, 25, rel_tol=0.02)
    assert abs(float(noise.mean())) < 1e-3
    assert torch.corrcoef(noise.flatten(1)).fill_diagonal_(0).abs().max() < 0.02  # channels are independent
    unclipped = seeded(GaussianNoise(sigma=25, clip=False), torch.zeros(3, 50, 50))
    assert unclipped.min() < 0
    assert torch.equal(seeded(GaussianNoise(sigma=0), image), image)


def test_ranges_are_drawn_uniformly():
    image = torch.full((3, 64, 64), 0.5)
    torch.manual_seed(0)
    deviations = [float((GaussianNoise(sigma=(10, 50), clip=False)(image) - image).std()) * 255 for _ in range(200)]
    assert 9 < min(deviations) < 12 and 48 < max(deviations) < 52
    assert abs(np.mean(deviations) - 30) < 3


def test_poisson_noise_grows_with_the_signal():
    for level in (0.1, 0.4):
        image = torch.full((3, 200, 200), level)
        noisy = seeded(PoissonNoise(peak=100), image)
        assert math.isclose(float(noisy.std()), math.sqrt(level / 100), rel_tol=0.03)
        assert math.isclose(float(noisy.mean()), level, rel_tol=0.01)
        assert torch.allclose(noisy * 100, (noisy * 100).round(), atol=1e-4)


def test_blurs_are_normalised_kernels():
    flat = torch.full((3, 30, 30), 0.7)
    point = torch.zeros(1, 61, 61)
    point[0, 30, 30] = 1
    axis = torch.arange(61) - 30.0
    for blur in (Blur(sigma=2.0), Blur(kind='motion', length=11, angle=0)):
        assert torch.allclose(seeded(blur, flat), flat, atol=1e-5)
        assert math.isclose(float(blur(point).sum()), 1, rel_tol=1e-4)
    spread = gaussian_blur(point, 2.0)[0]
    assert math.isclose(float((spread.sum(0) * axis**2).sum()), 4, rel_tol=0.01)
    assert torch.allclose(spread, spread.T, atol=1e-7)
    # a motion blur of angle a spreads along (cos a, -sin a) in (x, y): 0 = along the row, 90 = along the column
    for angle, column_spread, row_spread in ((0, 1, 0), (90, 0, 1), (45, 0.5, 0.5)):
        line = Blur(kind='motion', length=11, angle=angle)(point)[0]
        along_x, along_y = float((line.sum(0) * axis**2).sum()), float((line.sum(1) * axis**2).sum())
        assert abs(along_x / (along_x + along_y) - column_spread) < 0.05
        assert abs(along_y / (along_x + along_y) - row_spread) < 0.05
    rising = Blur(kind='motion', length=15, angle=45)(point)[0]
    assert rising[25, 35] > 0 and rising[35, 35] == 0  # counter-clockwise with y downwards


def test_jpeg_is_jpeg():
    image = photograph(3, 64, 64)
    errors = [float(((JPEG(quality=quality)(image) - image) ** 2).mean()) for quality in (5, 30, 95)]
    assert errors[0] > errors[1] > errors[2] > 0
    coarse = JPEG(quality=5)(photograph(1, 64, 64))[0]
    steps = (coarse[:, 1:] - coarse[:, :-1]).abs().mean(0)
    assert steps[7::8].mean() > 1.1 * steps[3::8].mean()  # edges of the 8x8 blocks


def test_rain_and_snow_only_brighten_dark_pictures_and_keep_their_direction():
    dark = torch.full((3, 128, 128), 0.2)
    for weather in (Rain(density=0.004), Snow()):
        fallen = seeded(weather, dark)
        assert (fallen >= dark - 1e-6).all()
        assert 0.01 < float((fallen > 0.25).float().mean()) < 0.8
        assert torch.allclose(fallen[0], fallen[2])  # grey
    straight = seeded(Rain(density=0.004, angle=90, length=15), dark)[0]
    across, down = straight.diff(dim=1).abs().mean(), straight.diff(dim=0).abs().mean()
    assert across > 2 * down
    assert torch.allclose(seeded(Rain(density=0), dark), dark)


def test_haze_follows_its_model():
    image = photograph(3, 64, 64)
    hazy = seeded(Haze(beta=1.0, airlight=0.9), image)
    # y - A = (x - A) t with one t in [exp(-beta), 1] for all channels
    transmission = (hazy - 0.9) / (image - 0.9)
    sure = (image - 0.9).abs() > 0.1
    assert transmission[sure].min() >= math.exp(-1) - 1e-3 and transmission[sure].max() <= 1 + 1e-3
    both = sure[0] & sure[1]
    assert torch.allclose(transmission[0][both], transmission[1][both], atol=1e-3)
    assert transmission[0, -16:][sure[0, -16:]].mean() > transmission[0, :16][sure[0, :16]].mean()  # far above
    assert torch.allclose(seeded(Haze(beta=0), image), image)


def test_steps_from_configs():
    image = photograph(3, 32, 32)
    built = Degrade(
        steps=[{'type': GaussianNoise, 'sigma': 10}, {'type': 'densezoo.data.degradations.JPEG', 'quality': 50}]
    )
    by_hand = Degrade(steps=[GaussianNoise(sigma=10), JPEG(quality=50)])
    assert torch.equal(seeded(built, image), seeded(by_hand, image))
    kinds = {type(RandomDegrade(steps=[Rain(), Snow()]).steps[i]) for i in range(2)}
    assert kinds == {Rain, Snow}


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: GaussianNoise(sigma=-1), r'sigma must be a number or a range .* within 0\.\.255, got sigma=-1'),
        (lambda: GaussianNoise(sigma=(30, 10)), r'got sigma=\(30, 10\)'),
        (lambda: GaussianNoise(sigma='25'), r"got sigma='25'"),
        (lambda: JPEG(quality=0), r'quality must be .* within 1\.\.100'),
        (lambda: Blur(kind='box'), r"kind must be 'gaussian' or 'motion', got kind='box'"),
        (lambda: Degrade(steps=[3]), r'steps\[0\] must be a callable'),
        (lambda: Haze()(torch.zeros(3, 4, 4, dtype=torch.uint8)), r'Haze takes a float \(C, H, W\) image'),
        (lambda: Rain()(torch.zeros(1, 3, 4, 4)), r'Rain takes a float \(C, H, W\) image'),
    ],
)
def test_errors_are_one_line(make, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        make()
    assert '\n' not in str(caught.value)
