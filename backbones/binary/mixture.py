"""A mixture of multiplication primitives: each token goes through a linear layer, or through one of shifts.

ShiftAddViT, arXiv 2306.06446; authors' code https://github.com/GATECH-EIC/ShiftAddViT (Apache-2.0). Gates choose an
expert per token. The latency-aware load-balancing loss is the paper's: with the latency l_e of each expert, its sum of
the gates' values (importance) and the number of its tokens, counted smoothly (load),

    loss = SCV(l_e importance_e) + SCV(l_e load_e),    SCV = variance / mean^2,

so that tokens are spread in inverse proportion to latency. The authors' default gate, 'naive', has no gradient and no
loss; 'noisy' and 'soft' have both.
"""

# T tokens, C channels, I and O input and output features, E = 2 experts
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers.linear import Linear
from ..layers.lookup import choose
from .sums import shift_layer

# what the authors add before a logarithm
_LOG_EPS = math.log(2.0**-52)


class NaiveGate(nn.Module):
    """The expert with the larger output of a linear layer, with the value 1. The layer gets no gradient."""

    def __init__(self, dim: int, latencies: Sequence[float]):
        super().__init__()
        self.gate = Linear(dim, 2)
        self.loss: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(..., C) -> whether expert 1 is chosen, (..., 1), and the logarithm of the gate's value, or None for 1."""
        logits = self.gate(x)
        return logits[..., 1:] > logits[..., :1], None


class NoisyGate(nn.Module):
    """The same with learned noise on the logits while training, and the balancing loss."""

    def __init__(self, dim: int, latencies: Sequence[float]):
        super().__init__()
        self.latencies = tuple(latencies)
        self.w_gate = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(dim, 2), a=math.sqrt(5)))
        self.w_noise = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(dim, 2), a=math.sqrt(5)))
        self.loss: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        clean = x @ self.w_gate
        if not self.training:
            return clean[..., 1:] > clean[..., :1], None
        deviation = self.deviation(x)
        noisy = clean + torch.randn_like(clean) * deviation
        self.loss = balance(self.importance(clean, noisy), clean, noisy, deviation, self.latencies)
        return self.choose(noisy)

    def deviation(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(x @ self.w_noise) + 1e-2

    def importance(self, clean: Tensor, noisy: Tensor) -> Tensor:
        """(..., 2); a softmax over the one expert that is chosen is 1, so the noisy logits' softmax stands for it."""
        return noisy.softmax(-1)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        return logits[..., 1:] > logits[..., :1], None


class SoftGate(NoisyGate):
    """Noise of deviation 1/2, and the softmax of the chosen expert as its value (the authors' NoisyGate_V2)."""

    def __init__(self, dim: int, latencies: Sequence[float]):
        super().__init__(dim, latencies)
        del self.w_noise

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return super().forward(x) if self.training else self.choose(x @ self.w_gate)

    def deviation(self, x: Tensor) -> Tensor:
        return x.new_full((), 0.5)

    def importance(self, clean: Tensor, noisy: Tensor) -> Tensor:
        return clean.softmax(-1)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        return logits[..., 1:] > logits[..., :1], logits.log_softmax(-1).amax(-1, keepdim=True)


GATES: dict[str, type[nn.Module]] = {'naive': NaiveGate, 'noisy': NoisyGate, 'soft': SoftGate}


class MixtureLinear(nn.Module):
    """log(gate * exp(expert(x)) + eps) of the expert that the gate chooses for a token, on (..., I) -> (..., O).

    The logarithm is the authors': outputs below about -36 are cut off, and where the gate's value is not 1 its
    logarithm is added. Simulated: both experts compute all tokens.

    Args:
        linear: the trained layer; expert 0 is the same, expert 1 has the nearest powers of two, or sums of them.
        gate: 'naive', 'noisy' or 'soft'.
        latencies: of the two experts, in any unit; the authors' are 6 and 4.
        form, weight_bits: of expert 1, see `shift_layer`.
    """

    def __init__(
        self,
        linear: nn.Linear,
        *,
        gate: str = 'naive',
        latencies: Sequence[float] = (6.0, 4.0),
        form: str = 'ps',
        weight_bits: int = 5,
    ):
        super().__init__()
        if len(latencies) != 2 or min(latencies) <= 0:
            raise ValueError(f'latencies must be two positive numbers, got {latencies=}')
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight
        make = choose('gate', gate, GATES)
        self.gate = make(linear.in_features, latencies).to(weight.device, weight.dtype)
        dense = Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        dense.to(weight.device, weight.dtype).load_state_dict(linear.state_dict())
        shift = shift_layer(linear, form=form, weight_bits=weight_bits)
        self.experts = nn.ModuleList([dense, shift])

    def forward(self, x: Tensor) -> Tensor:
        second, log_value = self.gate(x)
        out = torch.where(second, self.experts[1](x), self.experts[0](x))
        if log_value is not None:
            out = out + log_value
        return torch.logaddexp(out, out.new_full((), _LOG_EPS))

    def shares(self, x: Tensor) -> Tensor:
        """The share of tokens that each expert gets, (2,)."""
        second = self.gate(x)[0].float().mean()
        return torch.stack([1 - second, second])

    def resample(self, state: dict[str, Tensor], prefix: str) -> None:
        """A linear layer's weights become both experts', in place; the gate starts as it is here."""
        if f'{prefix}weight' not in state:
            return
        for name in ('weight', 'bias'):
            value = state.pop(f'{prefix}{name}', None)
            if value is not None:
                state[f'{prefix}experts.0.{name}'] = value
                state[f'{prefix}experts.1.{name}'] = value.clone()
        state.update({f'{prefix}gate.{key}': value for key, value in self.gate.state_dict().items()})


def balance(importance: Tensor, clean: Tensor, noisy: Tensor, deviation: Tensor, latencies: Sequence[float]) -> Tensor:
    """The loss above, of (..., 2) gate values and logits without and with noise.

    The load of an expert is the sum over tokens of the probability that it is chosen, were its own noise drawn again.
    """
    other = noisy.flip(-1).detach()
    chosen = torch.special.ndtr((clean - other) / deviation)
    factors = importance.new_tensor(latencies)
    return sum((_scv(part.flatten(0, -2).sum(0) * factors) for part in (importance, chosen)), start=clean.new_zeros(()))


def balance_loss(model: nn.Module) -> Tensor | None:
    """The sum of the balancing losses of the last training forward; None if no gate has one. Reading it clears it."""
    losses = []
    for module in model.modules():
        if isinstance(module, NaiveGate | NoisyGate) and module.loss is not None:
            losses.append(module.loss)
            module.loss = None
    return torch.stack(losses).sum() if losses else None


def _scv(x: Tensor) -> Tensor:
    return x.float().var() / (x.float().mean().square() + 1e-10)
