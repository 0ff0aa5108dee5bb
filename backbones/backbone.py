"""What the backbones of both skeletons share: timm's interface, the image check, checkpointing, the classifier.

`Hierarchical` (skeleton.py) and `Plain` (plain.py) inherit from it; registry, checkpoints, exporters and tests know
this class alone. A model is a classifier, or with `features_only` the same class in its dense form: a pyramid.
"""

# B batch, C channels, H W size of a map, K classes
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .freed_pages import keep_freed_pages
from .layers.heads import HeadFactory, build_head
from .reduction.interface import TokenModel
from .sizes import AnySize, FixedSize


class Backbone(nn.Module):
    """Image -> logits, or in dense form -> pyramid. A skeleton defines `forward`, `forward_features`, `forward_head`,
    `forward_intermediates`, `block_names` and `group_matcher`; a family what its class attributes say.
    """

    sizes: AnySize | FixedSize = AnySize()
    strides: ClassVar[tuple[int, ...]] = (4, 8, 16, 32)  # of the dense form's maps
    min_dynamic_size: ClassVar[int] = 33  # smallest height and width of an export with dynamic sizes
    new_in_dense: ClassVar[tuple[str, ...]] = ()  # keys that classifier weights lack
    # prefixes of the authors' keys that are this model's though they lie beside those that start with 'backbone.'
    beside_backbone: ClassVar[tuple[str, ...]] = ()
    classifier_keys: ClassVar[tuple[str, ...]] = ('norm.', 'head.')  # keys that the dense form lacks
    reduced: ClassVar[dict[str, Any]] = {}  # arguments of a small copy, for tests and dry runs
    same_maps_in_dense = True  # the dense form's raw maps are the classifier's
    has_golden: ClassVar[bool] = True  # the authors published code, whose outputs were recorded
    staged: ClassVar[bool] = True  # arguments such as depths and window_size may be one per stage
    norm_first = False  # the classifier's norm acts on all positions, before pooling
    drop_path_rises = True  # stochastic depth rises from 0 over the blocks; otherwise it is constant

    default_cfg: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    metadata: dict[str, Any]

    # set by the skeletons
    features_only: bool
    out_indices: tuple[int, ...]
    absent_keys: tuple[str, ...]  # prefixes of keys that this model lacks because of its `out_indices`
    in_chans: int
    num_features: int
    drop_rate: float
    head_kind: str | HeadFactory
    grad_checkpointing: bool

    def __init__(self) -> None:
        super().__init__()
        keep_freed_pages()

    def block_names(self) -> list[list[str]]:
        """Names of the blocks, grouped as `group_matcher(coarse=True)` groups them, in the order they run."""
        raise NotImplementedError

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that order the parameters by depth, for layer-wise learning rates: by block or by stage."""
        raise NotImplementedError

    # ---- timm's interface

    def get_classifier(self) -> Any:
        """The last layer of the classifier; a tuple of them where there are several."""
        self._require_classifier('get_classifier')
        names = self.classifier
        if isinstance(names, str):
            return self.get_submodule(names)
        return tuple(self.get_submodule(name) for name in names)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, freshly initialised head for `num_classes` classes (0: pooled features)."""
        self._require_classifier('reset_classifier')
        if global_pool not in (None, 'avg'):
            raise ValueError(f"global_pool must be 'avg', got {global_pool=}")
        self._set_head(num_classes)
        self.head.apply(self.init_weights)

    @property
    def classifier(self) -> str | tuple[str, ...]:
        """Name of the last layer of the classifier, or names."""
        last = self.head.last
        if isinstance(last, str):
            return f'head.{last}'.removesuffix('.')
        return tuple(f'head.{name}' for name in last)  # type: ignore[union-attr]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs while training and compute the rest again in the backward pass."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters with two or more dimensions that take no weight decay (those with one never should)."""
        return set()

    def init_weights(self, module: nn.Module) -> None:
        """Initialises one module, truncated normal with deviation 0.02; families apply theirs to all modules."""
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def token_model(self) -> TokenModel:
        """What `reduce_tokens` needs to know; ValueError where there are no tokens that could be fewer."""
        raise ValueError(
            f'{self.title} has no sequence of tokens to reduce, its blocks see maps; '
            'reduce_tokens takes plain backbones'
        )

    @property
    def title(self) -> str:
        """The registered name, or the class's."""
        return (getattr(self, 'default_cfg', None) or {}).get('architecture') or type(self).__name__

    # ---- checkpoints

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

    # ---- for the skeletons

    def _call(self, block: Callable[..., Any], x: Any, *context: Any) -> Any:
        """block(x, *context), computed again in the backward pass where checkpointing is on."""
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, *context, use_reentrant=False)
        return block(x, *context)

    def _check_image(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f'images must be (B, {self.in_chans}, H, W), got {tuple(x.shape)=}')
        self.sizes.check(x.shape[2], x.shape[3])

    def _set_head(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.head = build_head(self.head_kind, self.num_features, num_classes, self.drop_rate)
        self.head_hidden_size = self.head.hidden_size

    def _require_classifier(self, method: str) -> None:
        if self.features_only:
            raise ValueError(f'{method} needs a classifier; this model was built with features_only=True')


def check_format(output_fmt: str, allowed: tuple[str, ...] = ('NCHW', 'NHWC')) -> None:
    """Raises ValueError unless the format of intermediate outputs is allowed."""
    if output_fmt not in allowed:
        raise ValueError(f'output_fmt must be {" or ".join(map(repr, allowed))}, got {output_fmt=}')


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


def rename(state: dict[str, Tensor], rules: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Renames the keys of a state dict by the first rule (pattern, replacement) that matches at their start."""

    def new_name(key: str) -> str:
        for pattern, replacement in rules:
            if re.match(pattern, key):
                return re.sub('^' + pattern.removeprefix('^'), replacement, key, count=1)
        return key

    return {new_name(key): value for key, value in state.items()}
