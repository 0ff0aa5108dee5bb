"""Runs the Triton kernels for real, on this CPU, in Triton's interpreter; without it they are never executed.

Each file of tests/kernels/interpreted is run by a pytest of its own with TRITON_INTERPRET=1; what it printed is shown
when it fails. `TRITON_INTERPRET=1 pytest -n 0 tests/kernels/interpreted` runs them all by hand.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parent / 'interpreted').glob('test_*.py'))


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_kernels_in_the_interpreter(path):
    environment = {**os.environ, 'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1'}
    for name in [name for name in environment if name.startswith('PYTEST_') or name == 'DENSEZOO_KERNELS']:
        del environment[name]
    command = [sys.executable, '-P', '-m', 'pytest', '-n', '0', '-q', '-p', 'no:cacheprovider', str(path)]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert ' passed' in result.stdout and 'skipped' not in result.stdout, result.stdout


def test_no_file_is_forgotten():
    assert FILES
