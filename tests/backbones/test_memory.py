"""Without this a backbone could need more memory for a picture of a detection dataset than an edge device has."""

import os
import platform
import re
import subprocess
import sys

import pytest

from densezoo.backbones import list_models
from densezoo.backbones.registry import model_class

SMALL = re.compile(r'_(tiny|small|ti|t|s|s\d+|pp_small|5m|b0|b1)(_|$)')
# not of pictures of 32 pixels: their patches of 2 to 4 pixels make 266,000 tokens, whose attention takes days
TINY_PICTURES = re.compile(r'_cifar_|_28$')
NAMES = [
    name
    for name in list_models()
    if SMALL.search(name) and not TINY_PICTURES.search(name) and model_class(name).sizes.dynamic
]
PROGRAM = """
import resource, sys, torch
from densezoo.backbones import create_model
model = create_model(sys.argv[1], features_only=True).eval()
with torch.inference_mode():
    maps = model(torch.randn(1, 3, 800, 1333))
assert [m.shape[-2:] for m in maps] == [(200, 334), (100, 167), (50, 84), (25, 42)], [m.shape for m in maps]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""

FREED = """
import resource, sys, torch
from densezoo.backbones import create_model
create_model('poolformer_s12', depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffers = [torch.ones(3 * 2**20) for _ in range(4)]
    del buffers
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='limits of glibc')
def test_freed_pages_are_not_fetched_again():
    """Without the limits that a model raises four buffers of 12 MiB cost 12,000 page faults each time."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith('MALLOC_')}
    result = subprocess.run([sys.executable, '-c', FREED], capture_output=True, text=True, check=True, env=environment)
    assert int(result.stdout) < 100


def test_small_models_are_found():
    assert {'swin_tiny_patch4_window7_224', 'litv2_s', 'tiny_vit_5m_224', 'crossformer_pp_small'} <= set(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_pyramid_of_a_large_picture_fits_into_four_gib(name):
    result = subprocess.run([sys.executable, '-c', PROGRAM, name], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-500:]
    gib = float(result.stdout)
    assert gib < 4, f'{gib:.2f} GiB'
