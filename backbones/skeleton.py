"""The hierarchical skeleton: everything that families of backbones share at the level of stages.

A family builds its downsampling layers, blocks, norms and head, hands them to `assemble`, and inherits the feature
pyramid, the classifier, any-size padding, activation checkpointing, parameter groups and timm's interface. Blocks
belong to the family: anything that maps (B, H, W, C) to (B, H, W, C). Maps at stage borders are contiguous (B, H, W,
C) tensors, whose (B, C, H, W) view has channels_last strides, so convolutions read them without a copy. Linear layers
are `layers.linear.Linear`, convolutions with norm and activation `layers.conv.ConvNorm`: the same values in less time.
"""

# B batch, C channels, H W size of the current stage, K classes
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from timm.models import FeatureInfo
from torch import Tensor, nn

from .backbone import Backbone, check_format, normalise_indices, rename
from .layers.deform import OFFSET_LR_SCALE, DeformableMerging
from .layers.fold_norm import fold_into_next
from .layers.grid import ceil_div, to_first
from .layers.heads import HeadFactory
from .layers.lookup import choose
from .layers.norm import NormFactory

Stage = Sequence[nn.Module]

# layers between stages that any family may take instead of its own, by name, for numbers of channels
DOWNSAMPLINGS: dict[str, Callable[[int, int], nn.Module]] = {'deformable': DeformableMerging}

# Elements of a stage's maps that a CPU computes at once, as many images as that is. What blocks make of them, four
# times as much in an MLP, then stays in the cache and comes from memory that was just freed instead of from new pages.
_AT_ONCE = 900_000

__all__ = ['Hierarchical', 'check_stages', 'normalise_indices', 'per_stage', 'rename']


class Hierarchical(Backbone):
    """Stem -> 4 x (blocks, output norm) with a downsampling layer before each stage after the first.

    Modules: `downsample_layers.{0..3}` (the first is the stem, (B, C, H, W) -> (B, H, W, C)), `stages.{s}.{b}`; as
    classifier `norm` and `head`; in dense form `output_norms.{s}`, where the family has them.
    """

    new_in_dense: ClassVar[tuple[str, ...]] = ('output_norms.',)
    reduced: ClassVar[dict[str, Any]] = {'depths': (1, 1, 2, 1), 'dims': (32, 64, 96, 128)}

    def assemble(
        self,
        *,
        dims: Sequence[int],
        downsamplings: Sequence[nn.Module],
        stages: Sequence[Stage],
        output_norm: NormFactory | None,
        norm: NormFactory,
        head: str | HeadFactory,
        in_chans: int,
        num_classes: int,
        drop_rate: float,
        features_only: bool,
        out_indices: int | Sequence[int],
    ) -> None:
        """Puts the parts in place; called once, at the end of a family's constructor.

        Args:
            dims: channels of each stage.
            downsamplings: the stem and the layers before stages 1, 2, ...
            stages: the blocks of each stage.
            output_norm: makes the norm of each output map in dense form; None returns raw maps.
            norm: makes the classifier's norm.
            head: 'linear', 'mlp', or what makes the family's own (see `layers.heads`).
            in_chans: channels of the image.
            num_classes: classes of the classifier; 0 returns pooled features.
            drop_rate: dropout before the classifier's last layer.
            features_only: dense form: a pyramid instead of logits.
            out_indices: stages whose maps are returned in dense form; a number n means the last n. Later stages
                are not built.
        """
        count = len(stages)
        self.features_only = features_only
        self.out_indices = normalise_indices(out_indices, count) if features_only else tuple(range(count))
        kept = self.out_indices[-1] + 1
        self.in_chans, self.num_features, self.drop_rate = in_chans, dims[-1], drop_rate
        self.head_kind = head
        self.grad_checkpointing = False
        self.downsample_layers = nn.ModuleList(downsamplings[:kept])
        self.stages = nn.ModuleList(nn.ModuleList(blocks) for blocks in stages[:kept])
        self.feature_info = FeatureInfo(
            [{'num_chs': dims[s], 'reduction': self.strides[s], 'module': f'stages.{s}'} for s in range(count)],
            self.out_indices,
        )
        if features_only:
            self.num_classes = 0
            self.absent_keys = tuple(
                f'{part}.{s}.' for s in range(kept, count) for part in ('downsample_layers', 'stages')
            )
            if output_norm is not None:
                self.output_norms = nn.ModuleDict({str(s): output_norm(dims[s]) for s in self.out_indices})
                self.absent_keys += tuple(f'output_norms.{s}.' for s in range(count) if s not in self.out_indices)
        else:
            self.absent_keys = ()
            self.norm = norm(dims[-1])
            self._set_head(num_classes)

    # ---- forward

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits, or in dense form a pyramid.

        Args:
            x: float (B, in_chans, H, W), normalised with `default_cfg`'s mean and std; sizes as `self.sizes` says.

        Returns:
            Logits (B, K); in dense form a list of (B, C, ceil(H / s), ceil(W / s)) maps for the strides s of
            `feature_info.reduction()`, with channels_last strides.
        """
        if self.features_only:
            return self.forward_intermediates(x, self.out_indices, norm=True, intermediates_only=True)
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's map (B, C, ceil(H / 32), ceil(W / 32)), after `norm` where that comes before pooling."""
        return self.forward_intermediates(x, 1)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K) of `forward_features`' map; with `pre_logits` what enters the last layer."""
        self._require_classifier('forward_head')
        x = x.mean((2, 3))
        if not self.norm_first:
            x = self.norm(x)
        return self.head(x, pre_logits=pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Any:
        """Maps of stages, as timm defines it.

        Args:
            x: as in `forward`.
            indices: stages to return; a number n means the last n, None all.
            norm: apply the dense form's output norms; without, and for classifiers, maps are the stages' raw output.
            stop_early: leave out stages after the last one wanted.
            output_fmt: 'NCHW' or 'NHWC'.
            intermediates_only: return the list alone.

        Returns:
            (result of forward_features, list of maps), or the list of maps.

        Raises:
            ValueError: an index or the format is not valid, or the image's shape is not one this backbone takes.
        """
        check_format(output_fmt)
        self._check_image(x)
        wanted = normalise_indices(len(self.stages) if indices is None else indices, len(self.stages))
        norms: Any = self.output_norms if norm and hasattr(self, 'output_norms') else {}
        maps = []
        state: Any = x.contiguous(memory_format=torch.channels_last)
        for s in range(len(self.stages)):
            state = self._stage(s, state)
            x = self._map(state)
            if s in wanted:
                out = norms[str(s)](x) if str(s) in norms else x
                maps.append(to_first(out) if output_fmt == 'NCHW' else out)
            if s == wanted[-1] and (stop_early or intermediates_only):
                break
        if intermediates_only:
            return maps
        if self.norm_first and not self.features_only and len(self.stages) == s + 1:
            x = self.norm(x)
        return to_first(x), maps

    def _stage(self, s: int, x: Any) -> Any:
        """Downsampling and blocks of stage s; for inference on a CPU some images at a time, see `_AT_ONCE`."""
        x, blocks = self.downsample_layers[s](x), self.stages[s]
        step = self._images_at_once(x)
        if step is None:
            return self._run(blocks, x)
        return torch.cat([self._run(blocks, images) for images in x.split(step)])

    def _map(self, state: Any) -> Tensor:
        """The map (B, H, W, C) in what a stage gives; more than that flows in families that override both."""
        return state

    def _images_at_once(self, x: Tensor) -> int | None:
        """So many of (B, H, W, C) that the parts are alike and within `_AT_ONCE`; None for all."""
        if torch.compiler.is_compiling() or x.device.type != 'cpu' or self.training or torch.is_grad_enabled():
            return None
        parts = ceil_div(x.shape[0], max(_AT_ONCE // x.shape[1:].numel(), 1))
        return ceil_div(x.shape[0], parts) if parts > 1 else None

    def _run(self, blocks: nn.Module, x: Tensor) -> Tensor:
        for block in blocks:  # type: ignore[attr-defined]
            x = self._call(block, x)
        return x

    def set_downsampling(self, name: str) -> None:
        """Other layers before stages 1, 2, ..., freshly initialised.

        Args:
            name: 'deformable', LIT's merging of 2 x 2 positions at learned places.

        Raises:
            ValueError: there is no such layer, or the family's layers do more than downsampling.
        """
        make = choose('downsampling', name, DOWNSAMPLINGS)
        layers: Any = self.downsample_layers[1:]
        for s, layer in enumerate(layers, 1):
            if not vars(type(layer)).get('replaceable', False):  # subclasses do more
                raise ValueError(
                    f'{type(self).__name__} keeps its own downsampling, got downsampling={name!r}: its '
                    f'{type(layer).__name__} before stage {s} is more than that, or is deformable already'
                )
        dims = [info['num_chs'] for info in self.feature_info.info]
        for s in range(1, len(self.downsample_layers)):
            self.downsample_layers[s] = make(dims[s - 1], dims[s])

    def lr_scales(self) -> dict[str, float]:
        """Patterns of parameter names that learn at another rate, and its factor."""
        if not any(isinstance(module, DeformableMerging) for module in self.downsample_layers.modules()):
            return {}
        return {'downsample_layers.*.conv_offset.weight': OFFSET_LR_SCALE}

    # ---- timm's interface and deployment

    def block_names(self) -> list[list[str]]:
        return [[f'stages.{s}.{b}' for b in range(len(blocks))] for s, blocks in enumerate(self.stages)]  # type: ignore[arg-type]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        with_last_block = (r'^norm\.', (99999,))
        if coarse:
            blocks = [(r'^(?:downsample_layers|stages)\.(\d+)', None), with_last_block]
        else:
            blocks = [(r'^downsample_layers\.(\d+)', (0,)), (r'^stages\.(\d+)\.(\d+)', None), with_last_block]
        return {'stem': r'^downsample_layers\.0\.', 'blocks': blocks, 'head': r'^(?:head|output_norms)\.'}

    def for_deploy(self) -> nn.Module:
        """The same model in evaluation mode, with a classifier's norm that is affine inside its last layer.

        Pooling is a mean, so either order of the two gives the same.
        """
        if not self.features_only:
            self.norm = fold_into_next(self.norm, self.head)
        return self


def check_stages(
    depths: Sequence[int], dims: Sequence[int], stages: int = 4
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`depths` and `dims` as tuples of positive numbers, one per stage.

    Raises:
        ValueError: they are not.
    """
    for name, values in (('depths', depths), ('dims', dims)):
        if len(values) != stages or any(not isinstance(v, int) or v < 1 for v in values):
            raise ValueError(f'{name} must be {stages} positive numbers, one per stage, got {name}={tuple(values)}')
    return tuple(depths), tuple(dims)


def per_stage(name: str, value: Any, stages: int = 4) -> tuple[Any, ...]:
    """One value for all stages, or a list or tuple of one per stage.

    Raises:
        ValueError: a list or tuple has another length.
    """
    if not isinstance(value, list | tuple):
        return (value,) * stages
    if len(value) != stages:
        raise ValueError(f'{name} must be one value or {stages}, one per stage, got {name}={value}')
    return tuple(value)
