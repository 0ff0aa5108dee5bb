"""One folder of pictures and one config for all tests of the command lines."""

from pathlib import Path

import pytest
import tiny_run


@pytest.fixture(scope='session')
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_pictures(tmp_path_factory.mktemp('pictures'))


@pytest.fixture
def config_file(tmp_path: Path, pictures: Path) -> Path:
    return tiny_run.write_config(tmp_path, pictures)
