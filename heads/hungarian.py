"""One-to-one assignment of predictions to ground truth (Kuhn 1955, Munkres 1957; Carion et al. 2020), batched.

Costs of a whole batch, and of all layers of a decoder, come as one tensor that is copied to the host once; scipy's
linear_sum_assignment solves each picture (its C++ takes some 20 microseconds at 100 x 10).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

try:
    from scipy.optimize import linear_sum_assignment
except ImportError:  # scipy comes with the extra `train`; networks are built and run without it
    linear_sum_assignment = None

NONE = -1
_WORST = 1e8  # replaces a cost that is no number: the loss, which is none either, will say so


@torch.no_grad()
def hungarian(costs: Tensor, counts: Sequence[int]) -> Tensor:
    """The assignment of least total cost for each picture.

    Args:
        costs: (..., B, Q, M) of Q predictions and M objects, M those of the fullest picture; columns from a picture's
            count on are padding and not looked at. Leading dimensions (layers) are matched one by one.
        counts: objects of each of the B pictures.

    Returns:
        (..., B, Q) int64 on the device of the costs: the object of each prediction, -1 for none. min(Q, count)
        predictions of a picture have one, each a different one.

    Raises:
        ValueError: counts do not fit the costs.
        ImportError: scipy is missing.
    """
    batch, queries, longest = costs.shape[-3:]
    if len(counts) != batch or max(counts, default=0) > longest or min(counts, default=0) < 0:
        raise ValueError(
            f'counts must be {batch} numbers in 0..{longest}, as costs {tuple(costs.shape)} are padded to, got '
            f'{list(counts)}'
        )
    if linear_sum_assignment is None:
        raise ImportError("matching needs scipy: pip install 'densezoo[train]'")
    matched = np.full((costs.shape[:-3].numel(), batch, queries), NONE)
    if any(counts):
        host = costs.float().nan_to_num(_WORST, _WORST, -_WORST).cpu().numpy()
        for layer, pictures in enumerate(host.reshape(-1, batch, queries, longest)):
            for picture, count in enumerate(counts):
                rows, columns = linear_sum_assignment(pictures[picture, :, :count])
                matched[layer, picture, rows] = columns
    return torch.from_numpy(matched).view(costs.shape[:-1]).to(costs.device)
