"""What a forward pass costs on hardware made for it: bit operations, shifts, additions, multiplications, energy, bytes.

`densezoo benchmark cost MODEL --methods bivit shiftadd`. Nothing is timed: the operations of one forward pass are
counted as they run, and sorted by the VALUES of their operands, whoever made them:

    both operands of a product are -1, 0 or 1      bit operations (32 of them are an XNOR and a popcount)
    one operand is -1, 0 or 1                      floating-point additions, no multiplications
    one operand is 0 or signed powers of two       shifts, and additions of int32
    one operand is sums of two such powers         two shifts, an addition of int32, and one more for the sum
    else                                           floating-point multiplications and additions

so that simulated and packed models report the same products; `run` packs what can be packed. Element-wise layers count
with the operations in `_POINTWISE`; exponentials and the like are listed and not priced, moving and comparing is
neither. Bytes: each operand and result of a product once, signs as 1 bit, powers of two and their sums as 5, all else
as 32, as if nothing stayed in a cache. A mixture of experts is counted as it runs here, where every token goes through
both.

Energy: M. Horowitz, Computing's energy problem, ISSCC 2014, figure 1.1.9 (45 nm, 0.9 V) for additions, multiplications
and DRAM. That figure has no shift: 0.13 pJ for one of 32 bits is what the authors of ShiftAddViT compute with, beside
the same 3.7 and 0.9 (`get_unit_energy` in pvt/hw_utils.py of https://github.com/GATECH-EIC/ShiftAddViT, commit 47671cf;
ShiftAddNAS has it too, ShiftAddLLM has 0.1). This was read in their code; the table of the paper that it goes back to
(ShiftAddNet, arXiv 2010.12785) was not at hand. They price a layer of shifts by its shifts alone, here its additions
are priced as well. A bit operation is in neither: a word's XNOR and popcount are priced as two int32 additions, our
assumption.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from densezoo.backbones import binarize, create_model, pack
from densezoo.backbones.binary import packable
from densezoo.backbones.binary.hashing import hashes_of

# picojoules
ENERGY = {
    'multiplications': 3.7,  # float32
    'additions': 0.9,  # float32
    'integer_additions': 0.1,  # int32
    'shifts': 0.13,  # of 32 bits
    'bit_operations': 2 * 0.1 / 32,
}
DRAM = 640 / 4  # of a byte, from 640 of a 32-bit word
BITS = {'signs': 1, 'powers': 5, 'sums': 5, 'numbers': 32}

_aten: Any = torch.ops.aten
# operators, in place or not -> multiplications, additions and special functions of each element
_POINTWISE: dict[str, tuple[int, int, int]] = {
    'add': (0, 1, 0),
    'sub': (0, 1, 0),
    'rsub': (0, 1, 0),
    'mul': (1, 0, 0),
    'div': (1, 0, 0),
    'pow': (1, 0, 0),  # squares
    'addcmul': (1, 1, 0),
    'sum': (0, 1, 0),
    'mean': (0, 1, 0),
    'native_layer_norm': (3, 4, 0),
    'native_group_norm': (3, 4, 0),
    'native_batch_norm': (1, 1, 0),
    '_native_batch_norm_legit_no_training': (1, 1, 0),
    '_softmax': (1, 2, 1),
    'gelu': (2, 1, 1),
    'silu': (1, 1, 1),
    'hardswish': (2, 1, 0),
    'sigmoid': (0, 1, 1),
    'tanh': (0, 0, 1),
    'exp': (0, 0, 1),
    'erf': (0, 0, 1),
    'rsqrt': (0, 0, 1),
    'sqrt': (0, 0, 1),
    'logaddexp': (0, 1, 2),
}
_ATTENTION = (
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
)


@dataclass(frozen=True)
class Cost:
    """Operations of a forward pass, energies in microjoules, bytes moved and bytes of the weights."""

    name: str
    bit_operations: int
    shifts: int
    integer_additions: int
    additions: int
    multiplications: int
    special: int
    moved_bytes: int
    weight_bytes: int

    @property
    def compute_energy(self) -> float:
        return sum(getattr(self, name) * price for name, price in ENERGY.items()) / 1e6

    @property
    def memory_energy(self) -> float:
        return self.moved_bytes * DRAM / 1e6

    def row(self) -> dict[str, Any]:
        return {**asdict(self), 'compute_energy': self.compute_energy, 'memory_energy': self.memory_energy}


class Counting(TorchDispatchMode):
    """A block in which the operations that run are counted, into `counts`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (_aten.mm.default, _aten.bmm.default, _aten._int_mm.default):
            self.product(args[0], args[1], out, out.numel() * args[0].shape[-1])
        elif func is _aten.addmm.default or func is _aten.baddbmm.default:
            self.product(args[1], args[2], out, out.numel() * args[1].shape[-1])
            self.counts['additions'] += out.numel()
        elif func is _aten.convolution.default:
            self.convolution(args, out)
        elif func in _ATTENTION:
            self.attention(*args[:3])
        elif name := _pointwise(func):
            first = out[0] if isinstance(out, tuple) else out
            tensors = [x for x in (first, *args) if isinstance(x, Tensor)]
            if first.is_floating_point():
                self.elements(name, max(x.numel() for x in tensors))
        return out

    def elements(self, name: str, count: int) -> None:
        for kind_of, each in zip(('multiplications', 'additions', 'special'), _POINTWISE[name]):
            self.counts[kind_of] += count * each

    def product(self, a: Tensor, b: Tensor, out: Tensor, count: int) -> None:
        """`count` products of elements of a and b, and as many sums."""
        kinds = kind(a), kind(b)
        if kinds == ('signs', 'signs'):
            self.counts['bit_operations'] += count
        elif 'signs' in kinds:
            self.counts['additions'] += count
        elif 'powers' in kinds:
            self.counts['shifts'] += count
            self.counts['integer_additions'] += count
        elif 'sums' in kinds:
            self.counts['shifts'] += 2 * count
            self.counts['integer_additions'] += 2 * count
        else:
            self.counts['multiplications'] += count
            self.counts['additions'] += count
        bits = sum(x.numel() * BITS[of] for x, of in zip((a, b), kinds)) + 32 * out.numel()
        self.counts['moved_bytes'] += bits // 8

    def convolution(self, args: Any, out: Tensor) -> None:
        x, weight, bias = args[:3]
        self.product(x, weight, out, out.numel() * weight[0].numel())
        if bias is not None:
            self.counts['additions'] += out.numel()

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Of softmax, the map kept on chip."""
        pairs = query.shape[:-1].numel() * key.shape[-2]
        self.elements('_softmax', pairs)
        for width in (query.shape[-1], value.shape[-1]):
            self.counts['multiplications'] += pairs * width
            self.counts['additions'] += pairs * width
        self.counts['moved_bytes'] += 4 * (query.numel() + key.numel() + value.numel() + query.shape[:-1].numel())


def _pointwise(func: Any) -> str | None:
    name = str(func._schema.name).partition('::')[2]
    name = name.removesuffix('_')
    return name if name in _POINTWISE else None


def kind(x: Tensor) -> str:
    """What its values are, by the first that fits.

    'signs': -1, 0 or 1. 'powers': 0 or signed powers of two from 2 ** -15 to 1. 'sums': 0, such powers, or signed sums
    of two different ones from 2 ** -15 to 1. 'numbers': anything else.
    """
    if not x.numel():
        return 'numbers'
    if bool(((x == 0) | (x.abs() == 1)).all()):
        return 'signs'
    if not x.is_floating_point():
        return 'numbers'
    size = x.abs().float()
    rest = _without_largest_power(size)
    if bool((rest == 0).all()):
        return 'powers'
    return 'sums' if bool((_without_largest_power(rest) == 0).all()) else 'numbers'


def _without_largest_power(size: Tensor) -> Tensor:
    """What is left of numbers from 0 on, their largest power of two taken off; inf where that is not allowed."""
    fraction, exponent = torch.frexp(size)
    allowed = (exponent <= 1) & (exponent >= -14)
    rest = torch.ldexp(fraction - 0.5, exponent)
    return torch.where(size == 0, 0, torch.where(allowed, rest, torch.inf))


def cost(model: nn.Module, *inputs: Tensor, name: str = '') -> Cost:
    """Counts one forward pass.

    Args:
        model: in evaluation mode.
        inputs: its arguments; with values as in use, since operands are sorted by theirs.
        name: for the table.
    """
    with torch.no_grad(), Counting() as counting:
        model(*inputs)
    numbers = {field: int(counting.counts[field]) for field in (*ENERGY, 'special', 'moved_bytes')}
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return Cost(name=name, **numbers, weight_bytes=weights)


def run(*, model: str, methods: Sequence[str] = ('bivit',), size: int = 224, batch: int = 1) -> list[Cost]:
    """The model as it is and binarized by each method, randomly initialised: operations do not depend on training.

    Args:
        model: name of a backbone.
        methods: of `binarize`.
        size, batch: of the images.
    """
    torch.manual_seed(0)
    parent = create_model(model).eval()
    images = torch.randn(batch, 3, size, size)
    rows = [cost(parent, images, name=f'{model}, float32')]
    for method in methods:
        network = binarize(parent, method).eval()
        for hash in hashes_of(network):
            hash.trained.fill_(True)
        network = pack(network) if packable(network) else network  # training's arithmetic on weights is not deployed
        rows.append(cost(network, images, name=f'{model}, {method}'))
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table; operations in millions, energies in microjoules."""
    names = ('bit_operations', 'shifts', 'integer_additions', 'additions', 'multiplications', 'special')
    heads = [f'{name.replace("_", " ")}, M' for name in names]
    heads += ['compute, uJ', 'of float32', 'moved, MB', 'DRAM, uJ', 'weights, MB']
    lines = [f'| model | {" | ".join(heads)} |', '|---|' + '---:|' * len(heads)]
    for row in rows:
        cells = [f'{row[name] / 1e6:.1f}' for name in names]
        cells += [f'{row["compute_energy"]:.0f}', f'{row["compute_energy"] / rows[0]["compute_energy"]:.1%}']
        cells += [f'{row["moved_bytes"] / 1e6:.1f}', f'{row["memory_energy"]:.0f}', f'{row["weight_bytes"] / 1e6:.2f}']
        lines.append(f'| {row["name"]} | {" | ".join(cells)} |')
    return '\n'.join(lines)
