"""Parts of a computation that stay in the precision of their inputs, whatever autocast says."""

from contextlib import nullcontext

import torch
from torch import Tensor


def full_precision(x: Tensor) -> torch.autocast | nullcontext[None]:
    """A block without autocast on the device of x; entered only where autocast is on, so that graphs show no trace."""
    if x.device.type != 'meta' and torch.is_autocast_enabled(x.device.type):  # 'meta' has no autocast to ask for
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()
