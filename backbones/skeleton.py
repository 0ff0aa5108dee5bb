"""The hierarchical skeleton: everything that families of backbones share at the level of stages.

A family builds its downsampling layers, blocks, norms and head, hands them to `assemble`, and inherits the feature
pyramid, the classifier, any-size padding, activation checkpointing, parameter groups and timm's interface. Blocks
belong to the family: anything that maps (B, H, W, C) to (B, H, W, C). Maps at stage borders are contiguous (B, H, W,
C) tensors, whose (B, C, H, W) view has channels_last strides, so convolutions read them without a copy.
"""

# B batch, C channels, H W size of the current stage, K classes
import itertools
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from timm.models import FeatureInfo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers.fold_norm import fold_into_next
from .layers.grid import to_first
from .layers.heads import HeadFactory, build_head
from .layers.norm import NormFactory
from .sizes import AnySize, FixedSize

Stage = Sequence[nn.Module]


class Hierarchical(nn.Module):
    """Stem -> 4 x (blocks, output norm) with a downsampling layer before each stage after the first.

    Modules: `downsample_layers.{0..3}` (the first is the stem, (B, C, H, W) -> (B, H, W, C)), `stages.{s}.{b}`; as
    classifier `norm` and `head`; in dense form `output_norms.{s}`, where the family has them.
    """

    sizes: AnySize | FixedSize = AnySize()
    strides: ClassVar[tuple[int, ...]] = (4, 8, 16, 32)
    min_dynamic_size: ClassVar[int] = 33  # smallest height and width of an export with dynamic sizes
    new_in_dense: ClassVar[tuple[str, ...]] = ('output_norms.',)  # keys that classifier weights lack
    # prefixes of the authors' keys that are this model's though they lie beside those that start with 'backbone.'
    beside_backbone: ClassVar[tuple[str, ...]] = ()
    classifier_keys: ClassVar[tuple[str, ...]] = ('norm.', 'head.')  # keys that the dense form lacks
    # arguments of a small copy, for tests and dry runs
    reduced: ClassVar[dict[str, Any]] = {'depths': (1, 1, 2, 1), 'dims': (32, 64, 96, 128)}
    same_maps_in_dense = True  # the dense form's raw maps are the classifier's
    has_golden: ClassVar[bool] = True  # the authors published code, whose outputs were recorded
    norm_first = False  # the classifier's norm acts on the map, before pooling

    default_cfg: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    metadata: dict[str, Any]

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
        if output_fmt not in ('NCHW', 'NHWC'):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt=}")
        self._check_image(x)
        wanted = normalise_indices(len(self.stages) if indices is None else indices, len(self.stages))
        norms: Any = self.output_norms if norm and hasattr(self, 'output_norms') else {}
        x = x.contiguous(memory_format=torch.channels_last)
        maps = []
        for s, (downsample, blocks) in enumerate(zip(self.downsample_layers, self.stages)):
            x = self._run(blocks, downsample(x))
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

    def _run(self, blocks: nn.Module, x: Tensor) -> Tensor:
        for block in blocks:  # type: ignore[attr-defined]
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def _check_image(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f'images must be (B, {self.in_chans}, H, W), got {tuple(x.shape)=}')
        self.sizes.check(x.shape[2], x.shape[3])

    # ---- timm's interface

    def get_classifier(self) -> nn.Module:
        """The last layer of the classifier."""
        self._require_classifier('get_classifier')
        return self.head.get_submodule(self.classifier.removeprefix('head').removeprefix('.'))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, freshly initialised head for `num_classes` classes (0: pooled features)."""
        self._require_classifier('reset_classifier')
        if global_pool not in (None, 'avg'):
            raise ValueError(f"global_pool must be 'avg', got {global_pool=}")
        self._set_head(num_classes)
        self.head.apply(self.init_weights)

    @property
    def classifier(self) -> str:
        """Name of the last layer of the classifier."""
        return f'head.{self.head.last}'.removesuffix('.')

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs while training and compute the rest again in the backward pass."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that order the parameters by depth, for layer-wise learning rates: by block or by stage."""
        with_last_block = (r'^norm\.', (99999,))
        if coarse:
            blocks = [(r'^(?:downsample_layers|stages)\.(\d+)', None), with_last_block]
        else:
            blocks = [(r'^downsample_layers\.(\d+)', (0,)), (r'^stages\.(\d+)\.(\d+)', None), with_last_block]
        return {'stem': r'^downsample_layers\.0\.', 'blocks': blocks, 'head': r'^(?:head|output_norms)\.'}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters with two or more dimensions that take no weight decay (those with one never should)."""
        return set()

    def init_weights(self, module: nn.Module) -> None:
        """Initialises one module, truncated normal with deviation 0.02; families apply theirs to all modules."""
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def for_deploy(self) -> nn.Module:
        """The same model in evaluation mode, with a classifier's norm that is affine inside its last layer.

        Pooling is a mean, so either order of the two gives the same.
        """
        if not self.features_only:
            self.norm = fold_into_next(self.norm, self.head)
        return self

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict under our names from one under the authors' names; ours pass unchanged."""
        return state

    def resample(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same with what was made for another image size resized for this model.

        Modules that hold such tables do it by a method `resample(state, prefix)`, in place, for their own keys.
        """
        for name, module in self.named_modules():
            if module is not self and hasattr(module, 'resample'):
                module.resample(state, f'{name}.')  # type: ignore[operator]
        return state

    def _set_head(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.head = build_head(self.head_kind, self.num_features, num_classes, self.drop_rate)
        self.head_hidden_size = self.head.hidden_size

    def _require_classifier(self, method: str) -> None:
        if self.features_only:
            raise ValueError(f'{method} needs a classifier; this model was built with features_only=True')


def normalise_indices(indices: int | Sequence[int], count: int) -> tuple[int, ...]:
    """Stages named by numbers (negative ones count from the end) or by n for the last n, as increasing numbers.

    Raises:
        ValueError: an index is out of range, or they do not increase.
    """
    if isinstance(indices, int):
        chosen: tuple[int, ...] = tuple(range(count - indices, count))
    else:
        chosen = tuple(i + count if i < 0 else i for i in indices)
    if not chosen or min(chosen) < 0 or max(chosen) >= count or any(b <= a for a, b in itertools.pairwise(chosen)):
        raise ValueError(f'out_indices must be increasing stage numbers from 0 to {count - 1}, got {indices}')
    return chosen


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


def rename(state: dict[str, Tensor], rules: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Renames the keys of a state dict by the first rule (pattern, replacement) that matches at their start."""

    def new_name(key: str) -> str:
        for pattern, replacement in rules:
            if re.match(pattern, key):
                return re.sub('^' + pattern.removeprefix('^'), replacement, key, count=1)
        return key

    return {new_name(key): value for key, value in state.items()}
