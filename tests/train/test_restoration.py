"""Without this super-resolved or filled pictures could be measured against the wrong baseline, or be cut wrongly where
an exported file takes the network's place."""

from pathlib import Path

import numpy as np
import pytest
import tiny_tasks as tasks
import torch
import torch.nn.functional as F

from densezoo.heads import UNetRestorer
from densezoo.train import Preprocess, Restorer
from densezoo.train.deployable import Deployable, metadata
from densezoo.train.deployed import DeployedTask
from densezoo.train.evaluators import RestorationMetric, psnr
from densezoo.train.evaluators.restoration import to_pixels
from densezoo.train.visualize import draw


def task(**options):
    torch.manual_seed(0)
    backbone = {**tasks.PYRAMID, 'in_chans': 4 if options.get('holes') else 3}
    made = Restorer(backbone=backbone, head={'type': UNetRestorer, 'channels': 8, **options}, preprocess=Preprocess())
    torch.nn.init.normal_(made.head.last.weight, std=0.05)
    return made.eval()


def sample(channels, height, width):
    image = torch.rand(channels, height, width, generator=torch.Generator().manual_seed(1))
    if channels == 4:
        image[3] = (image[3] > 0.4).float()
    target = {'image_id': 0, 'index': 0, 'size': (height, width), 'original_size': (height, width), 'file': 'a.png'}
    return {'image': image, 'target': target}


@pytest.mark.parametrize(('options', 'channels', 'scale'), [({'scale': 2}, 3, 2), ({'holes': True}, 4, 1)])
def test_exported_files_give_the_task_s_pictures(options, channels, scale):
    class File:
        path, device = Path('tiny.onnx'), 'cpu'
        shapes = (1, channels, 64, 96), (None, channels, 64, 96)

        def __init__(self, made):
            self.model, self.metadata = Deployable(made).eval(), metadata(made)

        def __call__(self, images):
            assert tuple(images.shape[1:]) == (channels, 64, 96)
            return self.model(images)

    made = task(**options)
    one, small = sample(channels, 64, 96), sample(channels, 50, 70)
    with torch.no_grad():
        deployed = DeployedTask(File(made))
        assert deployed.holes == (channels == 4) and deployed.least_tile == 96
        results = deployed([one, small])
        padded = F.pad(small['image'], (0, 26, 0, 14))
        for result, image, size in ((results[0], one['image'], (64, 96)), (results[1], padded, (50, 70))):
            expected = made.head.predict(made.backbone(image[None]), image[None], [size])[0]['image']
            assert expected.shape == (3, size[0] * scale, size[1] * scale)
            torch.testing.assert_close(result['image'], expected, rtol=0, atol=1e-6)


def test_small_pictures_are_compared_with_their_enlargement():
    clean = torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(0))
    small = F.interpolate(clean[None], scale_factor=0.5, mode='bicubic', antialias=True)[0]
    metric = RestorationMetric(baselines=('input',))
    measured = metric.measure(small, {'clean': clean}, {'image': clean})
    enlarged = F.interpolate(small[None], size=(24, 32), mode='bicubic')[0]
    assert measured['psnr'] == float('inf')
    assert measured['input'] == [pytest.approx(psnr(to_pixels(enlarged), to_pixels(clean)))]


def test_holes_are_compared_with_a_simple_filling():
    clean = torch.linspace(0, 1, 40).expand(3, 30, 40).contiguous()
    known = torch.ones(1, 30, 40)
    known[:, 10:20, 15:25] = 0
    image = torch.cat([clean * known, known])
    metric = RestorationMetric(baselines=('input', 'blur', 'telea'))
    measured = metric.measure(image, {'clean': clean}, {'image': clean})
    # on a ramp the filling is good, the hole itself is not
    assert measured['telea'][0] > measured['input'][0] + 10 and len(measured['blur']) > 1
    with pytest.raises(ValueError, match=r"baseline 'telea' needs images whose last channel is a mask, got"):
        metric.measure(image[:3] * 0.9, {'clean': clean}, {'image': clean})
    panels = draw(image, {'image': clean}, {'clean': clean, 'original_size': (30, 40)})
    assert panels.dtype == np.uint8 and panels.shape[2] == 3
