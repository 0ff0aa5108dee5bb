"""Without this `densezoo predict` could leave seams in tiled pictures, fill more than the holes, or fail on tiles."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from PIL import Image

from densezoo.tools import predict
from densezoo.train import load_config
from densezoo.train.inference import Predictor

SMALL = [
    'model.backbone.dims=(8,16,24,32)',
    'model.backbone.depths=(1,1,1,1)',
    'model.head.channels=8',
    'model.backbone.out_indices=(0,1)',
]


def trained(name: str, folder: Path) -> str:
    """A checkpoint whose last layer is not zero."""
    torch.manual_seed(0)
    model = MODELS.build(load_config(f'quickstart/{name}', SMALL).model)
    torch.nn.init.normal_(model.head.last.weight, std=0.01)
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, folder / 'best.pth')
    return str(folder / 'best.pth')


def picture(path: Path, size: tuple[int, ...] = (70, 101, 3)) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)).save(path)
    return path


def run(name: str, checkpoint: str, file: Path, out: Path, *more: str) -> int:
    argv = [f'quickstart/{name}', checkpoint, str(file), '--out', str(out), '--device', 'cpu', *more]
    return predict.main([*argv, '--cfg-options', *SMALL])


def restored(out: Path) -> np.ndarray:
    return np.asarray(Image.open(out / 'photo_restored.png')).astype(float)


@pytest.mark.parametrize(('name', 'scale'), [('restoration', 1), ('super_resolution', 2)])
def test_tiles_give_nearly_the_whole_picture(name, scale, tmp_path):
    """A U-shaped network looks far, so tiles differ a little, most at their seams; the picture must not be shifted."""
    checkpoint, file = trained(name, tmp_path), picture(tmp_path / 'photo.png')
    assert run(name, checkpoint, file, tmp_path / 'whole') == 0
    assert run(name, checkpoint, file, tmp_path / 'tiled', '--tile', '48', '--overlap', '16') == 0
    whole, tiled = restored(tmp_path / 'whole'), restored(tmp_path / 'tiled')
    assert whole.shape == tiled.shape == (70 * scale, 101 * scale, 3)
    error = np.abs(whole - tiled).mean()
    assert 0 < error < 0.1 * np.abs(whole - np.roll(whole, 1, 1)).mean()
    assert run(name, checkpoint, file, tmp_path / 'one', '--tile', '128') == 0
    np.testing.assert_array_equal(restored(tmp_path / 'one'), whole)  # a tile that holds it all


def test_transparent_pixels_are_filled_and_others_kept(tmp_path, capsys):
    checkpoint, file = trained('inpainting', tmp_path), tmp_path / 'photo.png'
    pixels = np.random.default_rng(1).integers(0, 256, (60, 64, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    pixels[20:40, 10:50, 3] = 0
    Image.fromarray(pixels).save(file)
    for more in ([], ['--tile', '48']):
        assert run('inpainting', checkpoint, file, tmp_path / 'out', *more) == 0
        out, known = restored(tmp_path / 'out'), pixels[..., 3] > 0
        assert (out[known] == pixels[known][:, :3]).all() and (out[~known] != pixels[~known][:, :3]).mean() > 0.9
    picture(file)
    assert run('inpainting', checkpoint, file, tmp_path / 'out') == 1
    assert 'photo.png: has no transparency' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('tile', 'message'),
    [
        (['--tile', '16'], 'error: tile must be at least 32 pixels, the least this model works on, got 16'),
        (['--tile', '64', '--overlap', '40'], 'error: overlap must be in 0..32, at most half of tile=64, got 40'),
    ],
)
def test_tiles_too_small_are_one_line(tile, message, tmp_path, capsys):
    assert run('restoration', trained('restoration', tmp_path), picture(tmp_path / 'photo.png'), tmp_path, *tile) == 1
    assert capsys.readouterr().err.strip() == message


def test_tiles_are_for_restoration(tmp_path):
    config = load_config('quickstart/segmentation')
    torch.save({'state_dict': MODELS.build(config.model).state_dict(), 'meta': {}}, tmp_path / 'best.pth')
    with pytest.raises(ValueError, match='tile is for restoration; other tasks look at the whole picture'):
        Predictor(config, tmp_path / 'best.pth', tile=64)


@pytest.mark.slow
def test_a_4k_picture_in_4_gib(tmp_path):
    checkpoint, file = trained('restoration', tmp_path), picture(tmp_path / 'photo.png', (2160, 3840, 3))
    argv = ['quickstart/restoration', checkpoint, str(file), '--out', str(tmp_path / 'out'), '--tile', '256']
    code = (
        'import resource, sys; from densezoo.tools import predict; status = predict.main(sys.argv[1:]); '
        'print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(status)'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, *argv, '--cfg-options', *SMALL],
        capture_output=True,
        text=True,
        env=os.environ,
        check=True,
    )
    assert restored(tmp_path / 'out').shape == (2160, 3840, 3)
    assert int(done.stdout.split()[-1]) < 4 * 2**20  # KiB
