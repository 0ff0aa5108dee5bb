"""Deterministic weights, inputs and fingerprints shared with the recorded reference outputs in tests/goldens/.

Every recorded value was computed with the weights `values(key, shape)`, which depend on the authors' key and on the
shape alone, and with the inputs `image(seed, shape)`. So any implementation that can read the authors' keys has the
same weights.
"""

import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

GOLDENS = Path(__file__).parent / 'goldens'

# entries that constructors compute: index tables, masks, counters
COMPUTED = re.compile(
    r'.*(position_index|relative_coords|rel_pos_idx|biases_idx|bias_idxs|attn_mask|'
    r'num_batches_tracked|out_zero_mask)|warm|iter|total_step'
)


def load(name: str) -> dict[str, Any]:
    """The recorded reference called `name`."""
    return json.loads((GOLDENS / f'{name}.json').read_text())


def values(key: str, shape: Sequence[int]) -> torch.Tensor:
    """float32 values of one state-dict entry: fan-in scaled for matrices, near 1 for scales and variances."""
    shape = tuple(shape)
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    z = torch.from_numpy(np.asarray(rng.standard_normal(shape), dtype=np.float32).reshape(shape))
    last = key.rsplit('.', 1)[-1]
    if last == 'running_var':
        return 1 + 0.1 * z.abs()
    if last == 'running_mean':
        return 0.1 * z
    if len(shape) >= 2 and max(shape[1:]) > 0 and (shape[0] != 1 or last == 'weight'):
        return z / max(int(np.prod(shape[1:])), 1) ** 0.5
    if last == 'bias':
        return 0.1 * z
    return (1 if last == 'weight' else 0.5) + 0.1 * z


def image(seed: int, shape: Sequence[int]) -> torch.Tensor:
    """A float32 standard normal input."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(tuple(shape)).astype(np.float32))


def golden_state(golden: dict[str, Any], case: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """The state dict of a reference, or of one of its cases, under the authors' keys, with its stated adjustments."""
    config = {**(golden.get('config') or {}), **((case or {}).get('config') or {})}
    state = {}
    for key, shape in ((case or {}).get('state_dict') or golden['state_dict']).items():
        if COMPUTED.fullmatch(key.rsplit('.', 1)[-1]):
            continue
        value = values(key, shape)
        for suffix, factor in (config.get('fill_adjust') or {}).items():
            value = value * factor if key.endswith(suffix) else value
        factor = (config.get('post_fill_scale') or {}).get(key)
        state[key] = value * factor if isinstance(factor, int | float) else value
    return state


def compare(ours: torch.Tensor, stored: dict[str, Any], noise: float = 0.0, relative: float = 1e-4) -> None:
    """Asserts that `ours` agrees with a stored fingerprint.

    Args:
        noise: absolute float noise of the reference itself; 20 times as much is allowed.
        relative: allowed difference over the largest stored magnitude.
    """
    assert list(ours.shape) == stored['shape'], f'shape {list(ours.shape)}, recorded {stored["shape"]}'
    flat = ours.detach().double().flatten()
    sampled = flat[torch.tensor(stored['index'])]
    allowed = max(relative * stored['absmax'], 20 * noise)
    difference = (sampled - torch.tensor(stored['values'], dtype=torch.float64)).abs().max().item()
    assert difference <= allowed, f'differs by {difference:.3g}, allowed {allowed:.3g}'
    std = flat.std() if len(flat) > 1 else flat.new_zeros(())
    for name, value in (('mean', flat.mean()), ('std', std), ('absmax', flat.abs().max())):
        assert abs(value.item() - stored[name]) <= allowed, f'{name} {value.item():.6g}, recorded {stored[name]:.6g}'
