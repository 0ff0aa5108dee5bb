"""Without this the comparison with authors' code rots unseen, since no checkout of theirs is here."""

import json
import sys

import pytest
import torch

from densezoo.tools.benchmark import main
from densezoo.tools.benchmarks import authors

# stand-ins for checkouts: files where the authors have them, with our models under the authors' names of functions
POOLFORMER = """
from timm.models.layers.helpers import to_2tuple
from timm.models.registry import register_model

from models.shared import build


@register_model
def poolformer_s12(pretrained=False):
    assert to_2tuple(3) == (3, 3)
    return build('poolformer_s12')
"""
SHARED = """
from densezoo.backbones import create_model as build
"""


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / 'models').mkdir()
    (tmp_path / 'models' / '__init__.py').write_text('')
    (tmp_path / 'models' / 'poolformer.py').write_text(POOLFORMER)
    (tmp_path / 'models' / 'shared.py').write_text(SHARED)
    return tmp_path


def test_both_sides_are_printed(capsys, checkout):
    before = dict(sys.modules)
    options = ['--batch', '1', '--size', '64', '--repeats', '1']
    assert main(['--json', 'backbones', '--authors', str(checkout), *options]) == 0
    printed = capsys.readouterr().out
    (row,) = json.loads(printed[printed.index('[\n') :])
    assert row['name'].startswith('poolformer_s12 ') and row['peer_name'] == 'authors'
    assert row['ours'] > 0 and row['peer'] > 0
    left = {name for name, module in sys.modules.items() if str(checkout) in str(getattr(module, '__file__', ''))}
    assert not left and str(checkout) not in sys.path
    assert all(sys.modules.get(name) is before.get(name) for name in authors.STAND_INS)


def test_what_a_checkout_lacks_is_one_line(capsys, checkout, tmp_path):
    with pytest.raises(
        ValueError, match=r"^authors='.*nowhere' is no checkout of a known repository: https://.*HorNet"
    ):
        authors.find(str(tmp_path / 'nowhere'))
    with pytest.raises(
        ValueError, match=r"sail-sg/poolformer has no model 'hornet_tiny_gf' .*; it has poolformer_s12,"
    ):
        authors.build('hornet_tiny_gf', str(checkout))
    (checkout / 'models' / 'shared.py').write_text('import a_package_that_nobody_has')
    assert main(['backbones', '--authors', str(checkout)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        'error: models/poolformer.py of https://github.com/sail-sg/poolformer does not load here: '
        "No module named 'a_package_that_nobody_has'"
    )


def test_deformable_convolutions_that_stand_in():
    torch.manual_seed(0)
    x = torch.randn(1, 4, 6, 8)
    conv = authors.DeformConv2dPackOfLIT(4, 8, 2, 2, 0)
    torch.nn.init.zeros_(conv.conv_offset.weight)
    torch.nn.init.zeros_(conv.conv_offset.bias)
    out, _ = conv(x)  # without offsets it is a convolution
    torch.testing.assert_close(out, torch.nn.functional.conv2d(x, conv.weight, conv.bias, 2))


def test_every_name_is_a_registered_model():
    from densezoo.backbones import list_models

    names = [name for repository in authors.REPOSITORIES for name in repository.models]
    assert len(names) == len(set(names)) and set(names) <= set(list_models())
