"""The package as users install it. Without these tests a forgotten sub-package works in editable mode and is absent
from the wheel, and a config that reads its base files works in the checkout alone."""

import configparser
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ('backbones', 'heads', 'kernels', 'data', 'train', 'deploy', 'configs', 'tools')


def declared() -> tuple[dict[str, str], set[str]]:
    """setup.cfg's package_dir and packages."""
    options = configparser.ConfigParser()
    options.read(ROOT / 'setup.cfg')
    pairs = (line.split('=') for line in options['options']['package_dir'].split('\n') if line)
    return {name.strip(): folder.strip() for name, folder in pairs}, set(options['options']['packages'].split())


def test_setup_cfg_lists_every_package_on_disk():
    directories, packages = declared()
    assert directories == {f'densezoo.{folder}': folder for folder in FOLDERS}
    on_disk = {
        'densezoo.' + '.'.join(path.relative_to(ROOT).parts)
        for folder in FOLDERS
        for path in [ROOT / folder, *(ROOT / folder).rglob('*')]
        if path.is_dir() and any(path.glob('*.py'))
    }
    assert packages == on_disk


def test_every_package_has_an_init():
    _, packages = declared()
    for name in packages:
        folder = ROOT.joinpath(*name.split('.')[1:])
        assert (folder / '__init__.py').is_file(), f'{folder} has no __init__.py'


def test_typing_link_points_at_the_root():
    assert (ROOT / '.typing' / 'densezoo').resolve() == ROOT.resolve()


@pytest.fixture(scope='module')
def wheel_site(tmp_path_factory) -> Path:
    """A folder holding the unpacked wheel of this tree, built from a copy: a stale build/ would hide missing files."""
    scratch = tmp_path_factory.mktemp('wheel')
    ignore = shutil.ignore_patterns(
        '.git', '.typing', 'build', 'dist', '*.egg-info', '__pycache__', '.venv', 'work_dirs'
    )
    shutil.copytree(ROOT, scratch / 'tree', ignore=ignore)
    pip = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check']
    subprocess.run([*pip, 'wheel', '--no-deps', '--wheel-dir', scratch, scratch / 'tree'], check=True)
    wheel = next(scratch.glob('densezoo-*.whl'))
    subprocess.run([*pip, 'install', '--no-deps', '--target', scratch / 'site', wheel], check=True)
    return scratch / 'site'


def run_from_wheel(wheel_site: Path, code: str, cwd: Path) -> str:
    """What `code` prints with the wheel's densezoo; -S keeps the editable install's import hook out."""
    paths = [str(wheel_site), *site.getsitepackages()]
    prelude = f'import sys; sys.path[:0] = {paths!r}\n'
    done = subprocess.run([sys.executable, '-S', '-c', prelude + code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_has_no_stray_top_level_module(wheel_site):
    entries = {path.name for path in wheel_site.iterdir()} - {'bin'}
    assert {name for name in entries if not name.endswith('.dist-info')} == {'densezoo'}
    assert (wheel_site / 'densezoo' / 'backbones' / 'py.typed').is_file()


def test_wheel_imports_and_reads_a_quickstart_from_anywhere(wheel_site, tmp_path):
    printed = run_from_wheel(wheel_site, WHEEL_CHECK, tmp_path)
    assert printed.split() == [str(wheel_site / 'densezoo' / 'backbones' / '__init__.py'), 'Detector']


WHEEL_CHECK = """
import densezoo.backbones, densezoo.data, densezoo.deploy, densezoo.heads, densezoo.kernels, densezoo.tools.cli
from densezoo.train.config import load_config
print(densezoo.backbones.__file__, load_config('quickstart/detection').model.type.__name__)
"""
