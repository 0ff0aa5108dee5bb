"""Post-training quantization of hybrids of convolutions and attention: Q-HyViT, and blockwise without any search.

Written from the papers. Q-HyViT, arXiv 2303.12557: hybrids lose accuracy where convolutions and transformer blocks
meet, at the *bridge blocks*, whose channels differ in range and whose asymmetric zero points leave the range of the
integers. So each layer's input gets the granularity (one scale for the layer, or one for each channel) and the scheme
(symmetric, or with a zero point) that reconstruct best, and in bridge blocks what is reconstructed is the output of the
block rather than that of the layer. The error of an output z is weighted by the diagonal of the Hessian,

    E = mean over images and positions of sum_c h_c (z_c - z'_c) ** 2,     h_c = mean of (dL / dz_c) ** 2

Differs: L is the product of the model's outputs with random signs, which makes h the diagonal of J^T J for any task,
pyramids too (the paper's is that of a classification loss); h is per channel; scales of single channels are taken over
by the weights, so that the integers run in an integer product; weights are symmetric, one scale per output.

`mode='block'` is blockwise compression without retraining, BCT, arXiv 2304.01483: rows of weights and channels of
inputs are cut into blocks, each with a power of two as its scale, a shift, from its largest magnitude; nothing is
searched. Products of two activations (attention) stay in floating point in both.
"""

# N outputs, C input channels
import copy
import difflib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones.layers.linear import is_plain_linear
from .export import evaluating
from .quantized_layers import SCHEMES, QuantizedLayer, limits, round_weight

MODES = ('search', 'block')
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # shares of a range that are tried as its end


@dataclass(frozen=True)
class Setting:
    """What a layer got. error: E of the last search it took part in, of its block's output in bridges."""

    name: str
    bridge: bool
    granularity: str
    scheme: str
    error: float


class _Search:
    """One layer: its weights, the candidates for its input, and what was chosen."""

    def __init__(self, name: str, layer: nn.Linear | nn.Conv2d, bits: int, weight_bits: int):
        self.name, self.layer, self.bits, self.weight_bits = name, layer, bits, weight_bits
        self.axis = 1 if isinstance(layer, nn.Conv2d) else -1
        self.chosen: tuple[str, str, float] = ('layer', 'symmetric', 1.0)
        self.error = float('inf')
        self.lowest = self.highest = torch.zeros(0)
        self.importance = torch.ones(())

    def see(self, x: Tensor) -> None:
        """Notes the ranges of the input's channels."""
        rows = x.detach().movedim(self.axis, -1).flatten(0, -2)
        self.lowest, self.highest = rows.amin(0), rows.amax(0)

    def make(self, granularity: str, scheme: str, clip: float) -> QuantizedLayer:
        low, high = limits(self.bits)
        weight, channel = self.layer.weight.detach(), None
        lowest, highest = self.lowest, self.highest
        if granularity == 'channel':
            channel = torch.maximum(highest, -lowest).clamp(min=1e-8)
            lowest, highest = lowest / channel, highest / channel
            weight = weight * self._of_inputs(channel)
        start, end = clip * lowest.min(), clip * highest.max()
        zero = 0
        if scheme == 'symmetric':
            scale = torch.maximum(-start, end) / high
        else:
            scale = (end - start) / (high - low)
            # without 0 in the range the zero point would lie outside of the integers: it is clamped, and loses
            zero = int((low - start / scale.clamp(min=1e-12)).round().clamp(low, high))
        return QuantizedLayer(
            self.layer,
            weight=weight,
            weight_scale=self._weight_scale(weight),
            input_scale=scale.clamp(min=1e-8),
            input_zero=zero,
            bits=self.bits,
            weight_bits=self.weight_bits,
            channel_scale=channel,
        )

    def in_blocks(self, block: int) -> QuantizedLayer:
        """Shifts from the largest magnitudes of blocks."""
        rows = self.layer.weight.detach().flatten(1)
        each = min(block, rows.shape[1])
        rows = F.pad(rows, (0, -rows.shape[1] % each)).unflatten(1, (-1, each))
        largest = torch.maximum(self.highest, -self.lowest)
        channels = min(block, len(largest))
        blocks = F.pad(largest, (0, -len(largest) % channels)).view(-1, channels).amax(1)
        shifts = _shift(blocks, self.bits).repeat_interleave(channels)[: len(largest)]
        self.chosen = ('block', 'symmetric', 1.0)
        return QuantizedLayer(
            self.layer,
            weight=self.layer.weight,
            weight_scale=_shift(rows.abs().amax(2), self.weight_bits),
            input_scale=shifts,
            bits=self.bits,
            weight_bits=self.weight_bits,
            block=each,
        )

    def _of_inputs(self, channel: Tensor) -> Tensor:
        """A number of each input channel, in a shape that multiplies the weights."""
        if not isinstance(self.layer, nn.Conv2d):
            return channel
        groups = channel.view(self.layer.groups, 1, -1)
        each = groups.expand(-1, self.layer.out_channels // self.layer.groups, -1)
        return each.reshape(self.layer.out_channels, -1, 1, 1)

    def _weight_scale(self, weight: Tensor) -> Tensor:
        """Of each output, the end of the range that rounds its weights best."""
        rows = weight.flatten(1)
        largest = rows.abs().amax(1).clamp(min=1e-8) / limits(self.weight_bits)[1]
        scales = torch.stack([clip * largest for clip in CLIPS])
        errors = [((round_weight(rows, s, self.weight_bits) * s[:, None] - rows) ** 2).sum(1) for s in scales]
        return scales.gather(0, torch.stack(errors).argmin(0)[None])[0]


def quantize_hybrid(
    model: nn.Module,
    images: Tensor,
    *,
    bits: int = 8,
    weight_bits: int | None = None,
    mode: str = 'search',
    schemes: Sequence[str] = SCHEMES,
    bridges: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    block: int = 64,
) -> nn.Module:
    """A copy whose linear layers and convolutions compute on integers, simulated; it exports to ONNX with Q/DQ pairs.

    Args:
        model: takes images; not changed.
        images: (B, C, H, W) to calibrate on, 32 in the paper.
        bits: of inputs, 2 to 8.
        weight_bits: of weights; as `bits` if None.
        mode: 'search' for Q-HyViT, 'block' for shifts of blocks.
        schemes: of 'symmetric' and 'asymmetric'; TensorRT takes the first alone.
        bridges: names of the blocks to reconstruct as a whole; None: `find_bridges`.
        exclude: names of layers that stay as they are.
        block: width of blocks, with mode 'block'.

    Returns:
        The copy, in evaluation mode; its attribute `quantization` is a list of `Setting`.

    Raises:
        ValueError: an argument is not allowed, or the model has no layer to quantize.
    """
    weight_bits = bits if weight_bits is None else weight_bits
    _check(model, images, bits, weight_bits, mode, schemes, bridges, exclude, block)
    original = copy.deepcopy(model).eval().requires_grad_(False)
    quantized = copy.deepcopy(original)
    searches = {
        name: _Search(name, layer, bits, weight_bits)
        for name, layer in quantized.named_modules()
        if _known(layer) and name not in exclude
    }
    if not searches:
        raise ValueError(f'{type(model).__name__} has no linear layers or convolutions to quantize')
    order = [name for name in _order(original, images) if name in searches]
    found = find_bridges(original, images) if bridges is None else list(bridges)
    if mode == 'search':
        _weigh(original, images, searches)
    for name in order:
        search = searches[name]
        (x, *_), _, _ = _call(quantized, name, images)
        target = _call(original, name, images)[2]
        search.see(x)
        if mode == 'block':
            layer = search.in_blocks(block)
            search.error = _error(layer(x), target, search.importance, search.axis)
        else:
            layer = _best(search, schemes, x, target)
        _put(quantized, name, layer)
        for path in found if mode == 'search' else ():
            inside = [other for other in order if _inside(other, path)]
            if inside and name == inside[-1]:  # the block is complete, and what follows has not been looked at
                _reconstruct(quantized, original, path, images, [searches[other] for other in inside], schemes)
    quantized.quantization = [  # type: ignore[assignment]
        Setting(name, any(_inside(name, path) for path in found), *searches[name].chosen[:2], searches[name].error)
        for name in order
    ]
    return quantized


def find_bridges(model: nn.Module, images: Tensor) -> list[str]:
    """Names of the blocks where convolutions and attention meet, in the order in which they run.

    A block is the innermost entry of a list that holds several layers, or a layer's parent. One with heads is of
    attention, one with a spatial convolution and without heads of convolutions; where the next block is of the other
    kind, both are bridges.

    Args:
        model: in evaluation mode.
        images: (B, C, H, W).
    """
    blocks: list[str] = []
    for name in _order(model, images[:1]):
        block = _block(model, name)
        if block and block not in blocks:
            blocks.append(block)
    kinds = [(path, _kind(model.get_submodule(path))) for path in blocks]
    kinds = [(path, kind) for path, kind in kinds if kind is not None]
    found = [path for (a, first), (b, second) in itertools.pairwise(kinds) if first != second for path in (a, b)]
    return list(dict.fromkeys(found))


def _block(model: nn.Module, name: str) -> str:
    parts = name.split('.')
    for end in range(len(parts) - 1, 0, -1):
        path = '.'.join(parts[:end])
        if parts[end - 1].isdigit() and sum(_known(m) for m in model.get_submodule(path).modules()) > 2:
            return path
    return '.'.join(parts[:-1])


def _kind(block: nn.Module) -> str | None:
    if any(hasattr(module, 'num_heads') for module in block.modules()):
        return 'attention'
    spatial = any(isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1 for m in block.modules())
    return 'convolution' if spatial else None


def _known(layer: nn.Module) -> bool:
    return is_plain_linear(layer) or (type(layer) is nn.Conv2d and layer.padding_mode == 'zeros')


def _order(model: nn.Module, images: Tensor) -> list[str]:
    """Names of the layers that can be quantized, as they run; those that do not run are left out."""
    order: list[str] = []
    handles = [
        layer.register_forward_hook(lambda *_, name=name: order.append(name) if name not in order else None)  # type: ignore[misc]
        for name, layer in model.named_modules()
        if _known(layer)
    ]
    try:
        with evaluating(model):
            model(images[:1])
    finally:
        for handle in handles:
            handle.remove()
    return order


class _Reached(Exception):
    """Ends a forward pass of which one part is asked for."""


def _call(model: nn.Module, path: str, images: Tensor) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional and named arguments and the output of a part's first call in a forward pass."""
    found: list[Any] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        found.extend((args, kwargs, output))
        raise _Reached

    handle = model.get_submodule(path).register_forward_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            model(images)
    except _Reached:
        pass
    finally:
        handle.remove()
    if not found:
        raise ValueError(f'{path!r} is not called in a forward pass; leave it out of bridges')
    return found[0], found[1], found[2]


def _weigh(model: nn.Module, images: Tensor, searches: dict[str, _Search]) -> None:
    """The importance of each layer's output channels: squared gradients of outputs times random signs."""
    handles = []
    for name, search in searches.items():

        def keep(grad: Tensor, search: _Search = search) -> None:
            search.importance = grad.square().movedim(search.axis, -1).flatten(0, -2).mean(0)

        def note(module: nn.Module, args: Any, output: Tensor, keep: Callable[..., None] = keep) -> None:
            if output.requires_grad:
                output.register_hook(keep)

        handles.append(model.get_submodule(name).register_forward_hook(note))
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.enable_grad():
            outputs = model(images.detach().clone().requires_grad_())
            total = images.new_zeros(())
            for output in outputs if isinstance(outputs, list | tuple) else [outputs]:
                signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
                total = total + (output * signs).sum()
            total.backward()
    finally:
        for handle in handles:
            handle.remove()


def _error(ours: Tensor, target: Tensor, importance: Tensor, axis: int) -> float:
    return float(((ours - target).square().movedim(axis, -1) * importance).sum(-1).mean())


def _best(search: _Search, schemes: Sequence[str], x: Tensor, target: Tensor) -> QuantizedLayer:
    with torch.no_grad():
        for option in itertools.product(('layer', 'channel'), schemes, CLIPS):
            layer = search.make(*option)
            error = _error(layer(x), target, search.importance, search.axis)
            if error < search.error:
                search.error, search.chosen, best = error, option, layer
    return best


def _reconstruct(
    quantized: nn.Module,
    original: nn.Module,
    path: str,
    images: Tensor,
    searches: Sequence[_Search],
    schemes: Sequence[str],
) -> None:
    """Searches the layers of a block again, one after the other, by the error of the block's output."""
    args, kwargs, _ = _call(quantized, path, images)
    target = _call(original, path, images)[2]
    block, one = quantized.get_submodule(path), torch.ones(())

    def error() -> float:
        return _error(block(*args, **kwargs), target, one, -1)

    with torch.no_grad():
        least = error()
        for search in searches:
            best = quantized.get_submodule(search.name)
            for option in itertools.product(('layer', 'channel'), schemes, CLIPS[::2]):
                _put(quantized, search.name, search.make(*option))
                reached = error()
                if reached < least:
                    least, search.chosen, best = reached, option, quantized.get_submodule(search.name)
            _put(quantized, search.name, best)
            search.error = least


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition('.')
    setattr(model.get_submodule(parent), last, layer.eval())


def _inside(name: str, path: str) -> bool:
    return name == path or name.startswith(f'{path}.')


def _shift(largest: Tensor, bits: int) -> Tensor:
    """The smallest powers of two by which these magnitudes fit into the integers."""
    return torch.exp2((largest.clamp(min=2.0**-60) / limits(bits)[1]).log2().ceil())


def _check(
    model: nn.Module,
    images: Tensor,
    bits: int,
    weight_bits: int,
    mode: str,
    schemes: Sequence[str],
    bridges: Sequence[str] | None,
    exclude: Sequence[str],
    block: int,
) -> None:
    for name, value in (('bits', bits), ('weight_bits', weight_bits)):
        if not 2 <= value <= 8:
            raise ValueError(f'{name} must be from 2 to 8, got {name}={value}')
    if mode not in MODES:
        raise ValueError(f'mode must be one of {", ".join(MODES)}, got {mode=}')
    if not schemes or any(scheme not in SCHEMES for scheme in schemes):
        raise ValueError(f'schemes must be of {", ".join(SCHEMES)}, got {schemes=}')
    if images.ndim != 4 or not len(images):
        raise ValueError(f'images must be (B, C, H, W), at least one, got {tuple(images.shape)=}')
    if block < 1:
        raise ValueError(f'block must be positive, got {block=}')
    names = [name for name, _ in model.named_modules()]
    for argument, given in (('bridges', bridges or ()), ('exclude', exclude)):
        for name in given:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                hint = f'; did you mean {near[0]!r}?' if near else ''
                raise ValueError(f'{argument} must name parts of the model, got {name!r}{hint}')
