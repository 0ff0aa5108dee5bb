"""Binary codes of queries and keys by hash functions that are learned from the attention map, without labels.

Kernelised hashing as in EcoFormer, arXiv 2209.09004; authors' code https://github.com/ziplab/EcoFormer (Apache-2.0).
With m anchors a_j, d_ij = |x_i - a_j|^2, sigma the mean of d over the tokens and anchors of an image and head:

    k_i = exp(-d_i / (2 sigma)) - mean kernel,    y_i = A k_i,    code_i = sign(y_i)   (EcoFormer; sign(0) = 0)
                                                               or code_i = [y_i > 0]   (ShiftAddViT)

Gradients pass a code where -1 < y < 1, or 0 < y < 1 for the second kind, and never reach A, anchors and mean.
"""

# B batch, h heads, N tokens, d head width, m anchors, b bits
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...kernels.precision import full_precision
from ..layers.lookup import choose
from .estimators import sign, step

CODES = ('sign', 'step')


class KernelHash(nn.Module):
    """b hash functions per head, (B, h, N, d) of norm 1 -> codes (B, h, N, b).

    The first batch in training mode, and the first after `forget`, learns them: `fit`.

    Args:
        heads, width: h and d.
        bits: b.
        anchors: m; they are tokens of the batch.
        codes: 'sign' or 'step'.
        topk: tokens per row of the attention map that are called alike, and as many that are called unlike.
        iterations, lr: of gradient descent (Nesterov's, momentum 0.9) for each bit.

    Attributes:
        A (h, b, m), mvec (1, h, 1, m), anchor (1, h, m, d): buffers, under the authors' names.
        trained: whether they were learned; state dicts of the authors do not say, and loading one sets it.
    """

    A: Tensor
    mvec: Tensor
    anchor: Tensor
    trained: Tensor

    def __init__(
        self,
        heads: int,
        width: int,
        *,
        bits: int = 16,
        anchors: int = 25,
        codes: str = 'sign',
        topk: int = 10,
        iterations: int = 100,
        lr: float = 5e-4,
    ):
        super().__init__()
        for name, value in (('bits', bits), ('anchors', anchors), ('topk', topk)):
            if value < 1:
                raise ValueError(f'{name} must be at least 1, got {name}={value}')
        self.codes = choose('codes', codes, {name: name for name in CODES})
        self.bits, self.topk, self.iterations, self.lr = bits, topk, iterations, lr
        self.register_buffer('A', torch.randn(heads, bits, anchors))
        self.register_buffer('mvec', torch.zeros(1, heads, 1, anchors))
        self.register_buffer('anchor', torch.zeros(1, heads, anchors, width))
        self.register_buffer('trained', torch.zeros((), dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and not self.trained:
            if not self.training:
                raise ValueError(
                    'the hash functions are not learned yet; run a batch through the model in training mode, or load '
                    'weights that have them'
                )
            with full_precision(x):
                self.fit(x.detach().to(self.A.dtype))
        with full_precision(x):
            y = self.project(x.to(self.A.dtype))
        codes = sign(y) if self.codes == 'sign' else step(y, 0.0)
        return codes.to(x.dtype)

    def project(self, x: Tensor) -> Tensor:
        """y, (B, h, N, b)."""
        return self.kernel(x) @ self.A.transpose(1, 2)

    def kernel(self, x: Tensor) -> Tensor:
        """k, (B, h, N, m)."""
        return self._similarity(x) - self.mvec

    def distances(self, x: Tensor) -> Tensor:
        """Squared distances to the anchors, (B, h, N, m)."""
        norms = x.square().sum(-1, keepdim=True) + self.anchor.square().sum(-1).unsqueeze(-2)
        return norms - 2 * (x @ self.anchor.transpose(-2, -1))

    def _similarity(self, x: Tensor) -> Tensor:
        d = self.distances(x)
        return torch.exp(d / (-2 * d.mean((-2, -1), keepdim=True)))

    def forget(self) -> None:
        """The next batch in training mode learns the functions anew, from where they are."""
        self.trained.fill_(False)

    @torch.no_grad()
    def fit(self, x: Tensor, anchor: Tensor | None = None) -> None:
        """Learns A, anchors and mean from a batch, in place.

        Bit by bit, y y^T is drawn to what is left of b S, where S is 1 for the `topk` tokens most alike (by cosine), -1
        for those least alike, else 0. A bit changes only where that makes its codes better, over all heads together.

        Args:
            x: (B, h, N, d) of norm 1.
            anchor: (1, h, m, d); tokens of the first image drawn at random if None, and where there are fewer than m,
                of the next ones.
        """
        self.anchor.copy_(self._draw(x) if anchor is None else anchor)
        kernel = self._similarity(x)
        self.mvec.copy_(kernel.mean((0, 2), keepdim=True))
        kernel = kernel - self.mvec
        left = self.bits * self.labels(x)

        def loss(y: Tensor) -> Tensor:
            return -((y.mT @ left).mT * y).sum((2, 3)).mean()

        for bit in range(self.bits):
            start = self.A[:, bit, :, None]  # (h, m, 1)
            found = self._descend(kernel, left + left.mT, start)
            before, after = (torch.where(kernel @ a > 0, 1.0, -1.0).to(x.dtype) for a in (start, found))
            better = loss(after) < loss(before)
            self.A[:, bit] = torch.where(better, found, start).squeeze(-1)
            chosen = torch.where(better, after, before)
            left = left - chosen @ chosen.mT
        self.trained.fill_(True)
        if dist.is_available() and dist.is_initialized():
            for buffer in (self.A, self.anchor, self.mvec):
                dist.broadcast(buffer, 0)

    def labels(self, x: Tensor) -> Tensor:
        """S, (B, h, N, N)."""
        attention = x @ x.mT
        k = min(self.topk, x.shape[2])
        labels = torch.zeros_like(attention)
        labels.scatter_(3, attention.topk(k, 3).indices, 1.0)
        return labels.scatter_(3, attention.topk(k, 3, largest=False).indices, -1.0)

    def _descend(self, kernel: Tensor, twice: Tensor, a: Tensor) -> Tensor:
        """Gradient descent on -y^T S y / (N b), the mean over images and heads, y = 2 sigmoid(k a) - 1 for the sign.

        Args:
            twice: S + S^T, (B, h, N, N).
            a: where it starts, (h, m, 1).
        """
        B, heads, N, _ = kernel.shape
        velocity: Tensor | None = None
        for _ in range(self.iterations):
            y = torch.tanh(kernel @ a / 2)  # (B, h, N, 1)
            slope = twice @ y * (1 - y.square())
            gradient = (kernel.mT @ slope).sum(0) * (-0.5 / (N * self.bits * B * heads))
            velocity = gradient if velocity is None else 0.9 * velocity + gradient
            a = a - self.lr * (gradient + 0.9 * velocity)
        return a

    def _draw(self, x: Tensor) -> Tensor:
        wanted, N = self.anchor.shape[2], x.shape[2]
        images = min(-(-wanted // N), len(x))
        tokens = x[:images].transpose(0, 1).flatten(1, 2)  # (h, images * N, d)
        order = torch.randperm(tokens.shape[1], device=x.device)
        order = order.repeat(-(-wanted // len(order)))[:wanted]
        return tokens[:, order][None]

    def resample(self, state: dict[str, Tensor], prefix: str) -> None:
        """Completes a state dict in place: the authors' has no `trained`, that of a floating-point model nothing."""
        state.pop(f'{prefix.removesuffix("ksh.")}projection_matrix', None)  # unused in the authors' code
        if f'{prefix}A' in state:
            state.setdefault(f'{prefix}trained', torch.ones((), dtype=torch.bool))
        else:
            state.update({f'{prefix}{key}': value for key, value in self.state_dict().items()})

    def extra_repr(self) -> str:
        heads, bits, anchors = self.A.shape
        return f'heads={heads}, bits={bits}, anchors={anchors}, codes={self.codes!r}'


def normalised(x: Tensor) -> Tensor:
    """Tokens of norm 1, without an epsilon, as the authors have it."""
    return x / x.norm(dim=-1, keepdim=True)


def hashes_of(model: nn.Module) -> list[KernelHash]:
    """The hash functions of a model."""
    return [module for module in model.modules() if isinstance(module, KernelHash)]
