"""Attention in which a mask says, for each block of queries, which blocks of keys it sees.

    out[i] = sum over j with mask[i // block, j // block] of softmax_j(scale * q[i] . k[j]) * v[j]     (per image, head)

Queries that see no block give zeros. The last blocks may be shorter. Layout: q (B, h, N, d), k and v (B, h, M, d), mask
(B, h, ceil(N / block), ceil(M / block)), both sizes of axes B and h may be 1. For learned masks: Sparsifiner,
arXiv 2303.13755; routing of regions: BiFormer, arXiv 2303.08810.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import refuse_triton, select

# Share of the blocks of keys that the fullest row sees, up to which it is faster on a CPU to gather them than to mask
# all (measured, see BENCHMARKS.md).
CROSSOVER = 0.4


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    block: int = 64,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention to the blocks of keys that a mask lists.

    Args:
        q: (B, h, N, d) floating point.
        k, v: (B, h, M, d).
        mask: bool, (nq, nk), (h or 1, nq, nk) or (B or 1, h or 1, nq, nk), with nq = ceil(N / block) and
            nk = ceil(M / block): True where a block of queries sees a block of keys.
        block: tokens of a block.
        scale: of the products; d ** -0.5 if None.
        backend: None chooses; 'torch' or 'triton' insist.

    Returns:
        (B, h, N, d) of the type of q.

    Raises:
        TypeError: the mask is not bool.
        ValueError: a shape, device or type does not fit, or the backend cannot take the call.
    """
    mask = _check(q, k, v, mask, block)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    refusals = {
        'triton': can_run_triton(q, k, v, block),
        'gather': _can_gather(mask) if backend is None else 'backend= names another',
        'torch': None,
    }
    chosen = select('block_sparse_attention', backend, refusals)
    if chosen == 'triton':
        return _triton(q, k, v, mask, block, scale)
    compute = block_sparse_attention_gathered if chosen == 'gather' else block_sparse_attention_reference
    return compute(q, k, v, mask, block=block, scale=scale)


def block_sparse_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, block: int, scale: float
) -> Tensor:
    """The definition: all products, masked."""
    seen = mask.repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, : q.shape[2], : k.shape[2]]
    some = mask.any(3).repeat_interleave(block, 2)[:, :, : q.shape[2], None]
    # rows that see nothing see all, and are dropped: no row of the softmax is empty
    out = F.scaled_dot_product_attention(q, k, v, seen | ~some, scale=scale)
    return out.masked_fill(~some, 0)


def block_sparse_attention_gathered(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, block: int, scale: float
) -> Tensor:
    """The blocks that each block of queries sees side by side, as many as the fullest row has."""
    B, h, N, d = q.shape
    nq, nk = mask.shape[2:]
    most = max(int(mask.sum(3).max()), 1) if mask.numel() else 1
    mask = mask.expand(B, h, nq, nk)
    number = mask.to(torch.int8).argsort(dim=3, descending=True, stable=True)[..., :most]
    seen = mask.gather(3, number)[..., None]
    within = torch.arange(block, device=q.device)
    exists = number[..., None] * block + within < k.shape[2]
    seen = (seen & exists).flatten(3)[..., None, :]
    some = seen.any(-1, keepdim=True)

    def blocks(x: Tensor, count: int) -> Tensor:
        return F.pad(x, (0, 0, 0, count * block - x.shape[2])).unflatten(2, (count, block))

    query = blocks(q, nq)
    index = number.flatten(2)[..., None, None].expand(-1, -1, -1, block, d)
    key, value = (blocks(x, nk).gather(2, index).view(B, h, nq, most * block, d) for x in (k, v))
    out = F.scaled_dot_product_attention(query, key, value, seen | ~some, scale=scale).masked_fill(~some, 0)
    return out.flatten(2, 3)[:, :, :N]


def can_run_triton(q: Tensor, k: Tensor, v: Tensor, block: int) -> str | None:
    """Why Triton cannot take this call."""
    if block < 16 or block & (block - 1):
        return f'blocks have {block} tokens, and the kernels take powers of two from 16'
    return refuse_triton({'q': q, 'k': k, 'v': v}, width=q.shape[-1])


def _can_gather(mask: Tensor) -> str | None:
    """Why gathering blocks does not take this call."""
    if torch.compiler.is_compiling() or torch.compiler.is_exporting() or mask.device.type != 'cpu':
        return 'how much is gathered depends on the mask, which only an eager call on a CPU knows'
    if mask.numel() and mask.sum(3).max().item() > CROSSOVER * mask.shape[3]:
        return f'a row sees more than {CROSSOVER:.0%} of the blocks, so that masking all is faster'
    return None


def _triton(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block: int, scale: float) -> Tensor:
    from .triton_ragged import ragged_attention  # Triton is imported where it is used

    mask = mask.expand(q.shape[0], q.shape[1], -1, -1)

    def listed(rows: Tensor) -> tuple[Tensor, Tensor]:
        order = rows.to(torch.int8).argsort(dim=3, descending=True, stable=True)
        return order.int().contiguous(), rows.sum(3).int().contiguous()

    def ends(count: int, length: int) -> Tensor:
        return (torch.arange(count + 1, device=q.device) * block).clamp(max=length)

    out = ragged_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        ends(mask.shape[2], q.shape[2]),
        ends(mask.shape[3], k.shape[2]),
        longest=(block, block),
        scale=scale,
        lists=(listed(mask), listed(mask.mT)),
        unit=block,
    )
    return out.transpose(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block: int) -> Tensor:
    """The mask with four axes."""
    if (
        any(t.ndim != 4 for t in (q, k, v))
        or k.shape != v.shape
        or q.shape[:2] + q.shape[3:] != k.shape[:2] + k.shape[3:]
    ):
        raise ValueError(
            f'q must be (B, h, N, d), k and v (B, h, M, d), got {tuple(q.shape)=}, {tuple(k.shape)=}, {tuple(v.shape)=}'
        )
    if any(t.dtype != q.dtype or t.device != q.device for t in (k, v)) or mask.device != q.device:
        raise ValueError(
            'q, k and v must be of one type, all on one device, got '
            f'{q.dtype} on {q.device}, {k.dtype} on {k.device}, {v.dtype} on {v.device}, mask on {mask.device}'
        )
    if mask.dtype != torch.bool:
        raise TypeError(f'mask must be bool, got {mask.dtype}')
    if block < 1:
        raise ValueError(f'block must be positive, got {block=}')
    B, h, N, _ = q.shape
    expected = (B, h, (N + block - 1) // block, (k.shape[2] + block - 1) // block)
    full = mask[(None,) * (4 - mask.ndim)] if mask.ndim < 4 else mask
    if (
        full.ndim != 4
        or full.shape[2:] != expected[2:]
        or any(a not in (1, b) for a, b in zip(full.shape, expected[:2]))
    ):
        raise ValueError(
            f'mask must be {expected}, one value per block of {block}, or 1 in place of {B} or {h}, '
            f'got {tuple(mask.shape)=}'
        )
    return full
