"""Names of backbones, their weights and the one door to them: `create_model`.

A model file declares each published variant with `register`. Names that timm does not know become timm's too; where
timm has the same name, timm's stays timm's there.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Format
from timm.models import PretrainedCfg, is_model
from torch import nn

from . import timm_entries
from .arguments import check_arguments
from .backbone import Backbone, normalise_indices
from .checkpoint import load_checkpoint, load_published
from .layers.lookup import nearest
from .reduction import reduce_tokens
from .skeleton import Hierarchical


@dataclass(frozen=True)
class Weights:
    """One published set of weights: timm's description of it and the published figures."""

    cfg: PretrainedCfg
    metadata: Mapping[str, Any]

    @property
    def published(self) -> bool:
        return bool(self.cfg.url or self.metadata.get('page'))


@dataclass(frozen=True)
class Entry:
    """A registered name: the class, the variant's constructor arguments and what the dense form changes in them."""

    name: str
    cls: type[Backbone]
    arguments: Mapping[str, Any]
    dense: Mapping[str, Any]
    weights: Mapping[str, Weights] = field(default_factory=dict)  # by tag; the first is the default
    recipe: Mapping[str, Any] = field(default_factory=dict)


_ENTRIES: dict[str, Entry] = {}

# create_model's own arguments, which every model takes
_COMMON = (
    'pretrained',
    'features_only',
    'out_indices',
    'in_chans',
    'num_classes',
    'img_size',
    'checkpoint_path',
    'reduction',
    'downsampling',
)


def weights(
    tag: str,
    url: str | None,
    *,
    top1: float | None,
    params: float,
    macs: float | None,
    paper: str,
    origin: str,
    size: int = 224,
    crop_pct: float = 0.9,
    num_classes: int = 1000,
    classifier: str | tuple[str, ...] = 'head',
    first_conv: str = 'downsample_layers.0.conv',
    licence: str = 'apache-2.0',
    page: str | None = None,
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
) -> Weights:
    """Describes published weights.

    Args:
        tag: what distinguishes them, as in `name.tag`; timm's tag where timm has the same ones.
        url: direct address of the file, or None if it lies on a drive; then `page` names the page. With neither, the
            description is of a model whose weights were never published.
        top1: published ImageNet-1k accuracy in percent.
        params: published parameters in 1e6 (a whole number if no decimals were published).
        macs: published multiply-adds in 1e9 at `size`, None if there is no such figure.
        classifier, first_conv: layers that depend on the number of classes and of the image's channels.
        mean, std: that images from 0 to 1 are normalised with.
    """
    cfg = PretrainedCfg(
        url=url,
        tag=tag,
        input_size=(3, size, size),
        num_classes=num_classes,
        crop_pct=crop_pct,
        interpolation='bicubic',
        mean=mean,
        std=std,
        classifier=classifier,  # type: ignore[arg-type]
        first_conv=first_conv,
        license=licence,
        origin_url=origin,
        paper_ids='arXiv:' + paper.rsplit('/', 1)[-1],
    )
    return Weights(
        cfg,
        {
            'top1': top1,
            'params': params,
            'macs': macs,
            'licence': licence,
            'paper': paper,
            'origin': origin,
            'page': page,
        },
    )


def register(
    name: str,
    cls: type[Backbone],
    *,
    weights: Sequence[Weights] = (),
    dense: Mapping[str, Any] | None = None,
    drop_path: float | None = None,
    drop: float | None = None,
    **arguments: Any,
) -> None:
    """Declares a model.

    Args:
        name: lower case, complete.
        weights: published sets, the default one first.
        dense: arguments that differ with features_only=True.
        drop_path, drop: rates of the published training recipe, kept in the model's `metadata`; models are built
            with the rates 0 unless told otherwise.
        arguments: the variant's arguments of `cls`.

    Raises:
        ValueError: the name is taken.  TypeError: `cls` has no such argument.
    """
    if name in _ENTRIES:
        raise ValueError(f'{name} is already registered by {_ENTRIES[name].cls.__module__}')
    accepted = inspect.signature(cls).parameters
    for argument in {**arguments, **(dense or {})}:
        if argument not in accepted:
            raise TypeError(f'{cls.__name__} has no argument {argument!r}')
    recipe = {key: rate for key, rate in {'drop_path_rate': drop_path, 'drop_rate': drop}.items() if rate is not None}
    _ENTRIES[name] = Entry(name, cls, arguments, dense or {}, {w.cfg.tag or '': w for w in weights}, recipe)
    if not is_model(name):
        timm_entries.add(name, [w.cfg for w in weights], build)


def list_models(filter: str = '*', pretrained: bool = False) -> list[str]:
    """densezoo's own names in natural order.

    Args:
        filter: shell pattern; one with a dot is matched against `name.tag` and returns such names.
        pretrained: only models with published weights.
    """
    names = (
        [f'{entry.name}.{tag}' for entry in _ENTRIES.values() for tag in entry.weights]
        if '.' in filter
        else [
            entry.name
            for entry in _ENTRIES.values()
            if not pretrained or any(w.published for w in entry.weights.values())
        ]
    )
    return sorted((name for name in names if fnmatch(name, filter)), key=_natural)


def create_model(
    name: str,
    pretrained: bool = False,
    features_only: bool = False,
    out_indices: int | Sequence[int] = (0, 1, 2, 3),
    in_chans: int = 3,
    num_classes: int = 1000,
    img_size: int | tuple[int, int] | None = None,
    checkpoint_path: str = '',
    reduction: Mapping[str, Any] | None = None,
    downsampling: str | None = None,
    **overrides: Any,
) -> nn.Module:
    """Builds a backbone: a classifier, or with `features_only` the same class in its dense form.

    Args:
        name: one of `list_models()`, with `.tag` for a certain set of weights; or a name of timm's, built by timm.
        pretrained: load the published weights.
        features_only: forward returns a list of (B, C, ceil(H / s), ceil(W / s)) maps instead of logits.
        out_indices: stages of that list, 0 to 3 for the strides 4 to 32.
        in_chans: channels of the image; published weights of the first convolution are adapted.
        num_classes: 0 for pooled features.
        img_size: for models made for one size; None for the registered one.
        checkpoint_path: a file for `load_checkpoint`.
        reduction: dict(type=..., r=...), a method of `reduce_tokens` with its settings.
        downsampling: 'deformable' merges tokens between the stages of a hierarchical family as LIT does; None keeps the
            family's layers.
        overrides: arguments of the model's class, see `constructor_arguments`; timm's `pretrained_cfg_overlay` and
            `cache_dir`.

    Raises:
        ValueError: no such name or tag.  TypeError: no such override.  OSError: weights cannot be downloaded.
    """
    if pretrained and checkpoint_path:
        raise ValueError('pass pretrained=True or checkpoint_path=, not both')
    if pretrained and downsampling is not None:
        raise ValueError(
            f'published weights have the downsampling of their family, got pretrained=True, {downsampling=}'
        )
    base, _, tag = name.partition('.')
    if base not in _ENTRIES and is_model(base):
        if downsampling is not None:
            raise ValueError(f"{name} is timm's, whose downsampling stays, got {downsampling=}")
        early = checkpoint_path if reduction is None else ''
        model = _from_timm(
            name, pretrained, features_only, out_indices, in_chans, num_classes, img_size, early, overrides
        )
        return model if reduction is None else _reduced(model, reduction, checkpoint_path)
    model = build(
        base,
        pretrained=pretrained,
        pretrained_cfg=tag or None,
        features_only=features_only,
        out_indices=out_indices,
        in_chans=in_chans,
        num_classes=num_classes,
        **(overrides if img_size is None else {**overrides, 'img_size': img_size}),
    )
    if downsampling is not None:
        if not isinstance(model, Hierarchical):
            raise ValueError(f'{name} has one resolution and no downsampling, got {downsampling=}')
        model.set_downsampling(downsampling)
    return _reduced(model, reduction, checkpoint_path)


def _reduced(model: nn.Module, reduction: Mapping[str, Any] | None, checkpoint_path: str) -> nn.Module:
    """The model with fewer tokens where that is asked for, and with weights from a file."""
    if reduction is not None:
        if not isinstance(reduction, Mapping) or 'type' not in reduction:
            raise ValueError(f'reduction must be dict(type=..., ...) or None, got {reduction=}')
        settings = dict(reduction)
        model = reduce_tokens(model, settings.pop('type'), **settings)
    if checkpoint_path:
        load_checkpoint(model, checkpoint_path)
    return model


def build(
    name: str,
    *,
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    cache_dir: Any = None,
    **overrides: Any,
) -> nn.Module:
    """What `create_model` and timm's door have in common.

    Args:
        pretrained_cfg: a tag, a dict or timm's PretrainedCfg; None for the default set of weights.
        pretrained_cfg_overlay: entries of it to replace, such as url= or file=.
        cache_dir: where downloads are kept.
    """
    entry = _entry(name)
    cfg, metadata = _resolve_cfg(entry, pretrained_cfg, pretrained_cfg_overlay or {})
    arguments = dict(entry.arguments)
    if overrides.get('features_only'):
        arguments.update(entry.dense)
    arguments.update((key, value) for key, value in overrides.items() if value is not None or key in arguments)
    accepted = inspect.signature(entry.cls).parameters
    for key in arguments:
        if key not in accepted:
            raise TypeError(
                f'{name} has no argument {key}={overrides[key]!r}{nearest(key, accepted)}; '
                f'it takes {", ".join(accepted)}'
            )
    check_arguments(
        arguments, given=overrides, image=cfg.input_size[-2:], strides=entry.cls.strides, staged=entry.cls.staged
    )
    model = entry.cls(**arguments)
    model.pretrained_cfg = model.default_cfg = cfg.to_dict()
    model.metadata = {**metadata, **({'recipe': dict(entry.recipe)} if entry.recipe else {})}
    if pretrained:
        load_published(model, cfg, page=metadata.get('page'), cache_dir=cache_dir)
    return model


def constructor_arguments(name: str) -> dict[str, inspect.Parameter]:
    """What `create_model` accepts for this model besides its name: its own arguments and those of the model's class.

    Raises:
        ValueError: no such name.
    """
    base = name.partition('.')[0]
    common = {key: parameter for key, parameter in inspect.signature(create_model).parameters.items() if key in _COMMON}
    if base not in _ENTRIES and is_model(base):
        return {**dict(inspect.signature(type(_timm_on_meta(name))).parameters), **common}
    return {**dict(inspect.signature(_entry(base).cls).parameters), **common}


def model_class(name: str) -> type[Backbone]:
    """The class that builds one of densezoo's own models.

    Raises:
        ValueError: no such name.
    """
    return _entry(name.partition('.')[0]).cls


def _entry(name: str) -> Entry:
    if name not in _ENTRIES:
        raise ValueError(
            f'no model is called {name!r}{nearest(name, [*_ENTRIES, *timm.list_models()])}; '
            'list_models() names them all'
        )
    return _ENTRIES[name]


def _resolve_cfg(entry: Entry, wanted: Any, overlay: Mapping[str, Any]) -> tuple[PretrainedCfg, Mapping[str, Any]]:
    if isinstance(wanted, str) and wanted not in entry.weights:
        known = ', '.join(entry.weights) or 'none'
        raise ValueError(
            f'{entry.name} has no weights called {wanted!r}{nearest(wanted, entry.weights)}; it has {known}'
        )
    if isinstance(wanted, str) or wanted is None:
        chosen = entry.weights[wanted] if wanted else next(iter(entry.weights.values()), Weights(PretrainedCfg(), {}))
        cfg, metadata = chosen.cfg, chosen.metadata
    else:
        cfg, metadata = (PretrainedCfg(**wanted) if isinstance(wanted, Mapping) else wanted), {}
    return replace(cfg, architecture=entry.name, **overlay), metadata


def _from_timm(
    name: str,
    pretrained: bool,
    features_only: bool,
    out_indices: int | Sequence[int],
    in_chans: int,
    num_classes: int,
    img_size: int | tuple[int, int] | None,
    checkpoint_path: str,
    overrides: Mapping[str, Any],
) -> nn.Module:
    """timm's model; in dense form our stages 0 to 3 are its maps with strides 4 to 32."""
    kwargs: dict[str, Any] = dict(overrides, in_chans=in_chans)
    if img_size is not None:
        kwargs['img_size'] = img_size
    if not features_only:
        return timm.create_model(name, pretrained, checkpoint_path=checkpoint_path, num_classes=num_classes, **kwargs)
    pyramid = _timm_on_meta(name)
    if getattr(pyramid, 'output_fmt', None) == Format.NHWC:
        kwargs['feature_cls'] = 'getter'  # timm's own way to (B, C, H, W) maps
    levels = {info['reduction']: i for i, info in enumerate(pyramid.feature_info.info)}
    chosen = [Backbone.strides[i] for i in normalise_indices(out_indices, 4)]
    if any(stride not in levels for stride in chosen):
        raise ValueError(
            f'{name} has maps with strides {", ".join(map(str, levels))}; '
            f'{out_indices=} asks for {", ".join(map(str, chosen))}'
        )
    return timm.create_model(
        name,
        pretrained,
        checkpoint_path=checkpoint_path,
        features_only=True,
        out_indices=[levels[stride] for stride in chosen],
        **kwargs,
    )


def _timm_on_meta(name: str) -> Any:
    with torch.device('meta'):
        return timm.create_model(name, features_only=True)


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r'(\d+)', name) if part]
