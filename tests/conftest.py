"""Two workers run the suite (`-n 2` in setup.cfg; `-n 0` runs it in one process, for a debugger)."""

import os
from typing import Any

if 'PYTEST_XDIST_WORKER' in os.environ:
    # Two workers of one thread each are faster than two that fight for the cores; torch reads it when it is imported.
    os.environ.setdefault('OMP_NUM_THREADS', '1')
else:
    # In a fresh environment yapf, which mmengine imports, writes its grammar to a cache: one worker could read what the
    # other has half written.
    import mmengine.config  # noqa: F401


def pytest_make_parametrize_id(config: Any, val: Any, argname: str) -> str | None:
    """Functions by name: their addresses, which pytest may print, differ between workers."""
    return val.__name__ if callable(val) and hasattr(val, '__name__') else None
