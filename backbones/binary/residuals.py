"""Low-rank estimates of what binary attention loses. BiPFT, arXiv 2312.08937.

With q = sign(q) + r_q and so on, q k^T = sign(q) sign(k)^T + r_q r_k^T + q r_k^T-like terms; each factor is estimated
by a linear layer of a few outputs, the same for all heads:

    products += P_q P_k^T + M_q P_k^T + P_q M_k^T,    values += P_v

with P_q, P_k, M_q, M_k (N, r) and P_v (N, 1). Authors' code: https://github.com/Xingrun-Xing/BiPFT (r = 1).
"""

# B batch, N tokens, C channels, r rank
import torch
from torch import Tensor, nn

from ..layers.linear import Linear


class ResidualEstimator(nn.Module):
    """The factors of the terms above, from the layer's input.

    Those of q_p, k_p and v_p start at zero, so that nothing is added at first, and gradients reach them.

    Args:
        dim: channels.
        rank: r.
    """

    def __init__(self, dim: int, rank: int = 1):
        super().__init__()
        if rank < 1:
            raise ValueError(f'rank must be at least 1, got {rank=}')
        self.rank = rank
        self.q_p, self.k_p, self.q_m, self.k_m = (Linear(dim, rank) for _ in range(4))
        self.v_p = Linear(dim, 1)
        for layer in (self.q_p, self.k_p, self.v_p):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def layers(self) -> tuple[nn.Linear, ...]:
        return self.q_p, self.k_p, self.q_m, self.k_m, self.v_p

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., 4 r + 1)."""
        return torch.cat([layer(x) for layer in self.layers], -1)

    def outside(self) -> Tensor:
        """(4 r + 1,), what positions of zeros give."""
        return torch.cat([layer.bias for layer in self.layers])

    def terms(self, factors: Tensor) -> tuple[Tensor, Tensor]:
        """(..., N, 4 r + 1) -> what is added to the products (..., 1, N, N) and to the values (..., 1, N, 1)."""
        q_p, k_p, q_m, k_m, v_p = factors.unsqueeze(-3).split([self.rank] * 4 + [1], -1)
        return (q_p + q_m) @ k_p.transpose(-2, -1) + q_p @ k_m.transpose(-2, -1), v_p
