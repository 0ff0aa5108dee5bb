"""Weights from files, state dicts and addresses into our backbones, under our names or the authors'.

Files are read with weights_only=True; argparse.Namespace is the one foreign class allowed in them.
"""

import argparse
import logging
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlparse

import torch
from timm.models import PretrainedCfg, adapt_input_conv
from timm.models._hub import download_cached_file
from torch import Tensor, nn

from .backbone import Backbone

_log = logging.getLogger('densezoo')
_Model = TypeVar('_Model', bound=nn.Module)

# last parts of keys whose values constructors compute: index tables, attention masks, counters
_COMPUTED = re.compile(
    r'(relative_position_index|relative_coords_table|rel_pos_idx|biases_idx|attention_bias_idxs|'
    r'bias_idxs|position_index|attn_mask|num_batches_tracked|out_zero_mask|total_step|\bwarm|\biter)$'
)
# names under which training programs keep the model, averaged weights first
_CONTAINERS = ('state_dict_ema', 'model_ema', 'state_dict', 'model')


def load_checkpoint(
    model: _Model, path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any], strict: bool = True
) -> _Model:
    """Loads weights into a backbone, in place.

    Accepts our own names and the authors'; a state dict, a file, or a training checkpoint that holds one (under
    'state_dict' or 'model'; keys with the prefix 'backbone.' are taken from a whole detector or segmentor). Weights
    for another number of classes or of image channels are handled as timm does for pretrained weights: the
    classifier's last layer stays as it is, the first convolution is adapted; one log line says so.
    Weights of a classifier load into the dense form: what is left over and what is new there is named in one log line.

    Args:
        model: from `create_model`.
        path_or_state_dict: .pth, .pt, .tar or .safetensors file, or a mapping.
        strict: every key must find its place; if False, what fits is loaded and the rest is named in one log line.

    Returns:
        The model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a checkpoint or holds a foreign class; keys are missing, left over, or of another
            shape.
    """
    if isinstance(path_or_state_dict, Mapping):
        content, source = path_or_state_dict, 'the state dict'
    else:
        content, source = read(path_or_state_dict), os.fspath(path_or_state_dict)
    state = _state_dict(content, source, model.beside_backbone if isinstance(model, Backbone) else ())
    if isinstance(model, Backbone):
        state = model.resample(model.convert(state))
    own = model.state_dict()
    state = {key: _fit(key, value, own) for key, value in state.items() if not _COMPUTED.search(key)}
    notes = _adapt(model, state, own)
    misfits = [
        f'{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}'
        for key, value in state.items()
        if key in own and value.shape != own[key].shape
    ]
    extra = [key for key in state if key not in own]
    missing = [key for key in own if key not in state and not _COMPUTED.search(key) and key not in notes]
    if isinstance(model, Backbone) and model.features_only:
        allowed_extra = (*model.classifier_keys, *model.absent_keys)
        left_over, extra = _split(extra, allowed_extra)
        new, missing = _split(missing, model.new_in_dense)
        if left_over or new:
            cut = [f'{prefix}*' for prefix in model.absent_keys if any(key.startswith(prefix) for key in left_over)]
            rest = _split(left_over, model.absent_keys)[1]
            notes[''] = f'left over from the classifier: {_list(rest + cut)}; new in the dense form: {_list(new)}'
    if getattr(model, 'reduction', None) is not None:
        new, missing = _split(missing, ('reduction.',))
        if new:
            notes['reduction'] = f'new with the reduction: {_list(new)}'
    problems = [
        f'{what}: {_list(keys, 6)}'
        for what, keys in (('missing', missing), ('unexpected', extra), ('of another shape', misfits))
        if keys
    ]
    if problems and strict:
        raise ValueError(f'{source} does not fit {_title(model)}: {"; ".join(problems)}')
    if problems:
        notes['strict'] = f'not loaded, {"; ".join(problems)}'
    fitting = {key: value for key, value in state.items() if key in own and value.shape == own[key].shape}
    model.load_state_dict(fitting, strict=False)
    if notes:
        _log.log(
            logging.WARNING if 'strict' in notes else logging.INFO,
            '%s from %s: %s',
            _title(model),
            source,
            '; '.join(filter(None, notes.values())),
        )
    return model


def load_published(model: Backbone, cfg: PretrainedCfg, *, page: str | None = None, cache_dir: Any = None) -> None:
    """Loads the weights that `cfg` describes: its file, or its url through timm's download cache.

    Raises:
        OSError: they cannot be downloaded; the message names the file and what to do.
        ValueError: there are none.
    """
    name = f'{cfg.architecture}.{cfg.tag}' if cfg.tag else str(cfg.architecture)
    if cfg.state_dict:
        load_checkpoint(model, cfg.state_dict)
    elif cfg.file:
        load_checkpoint(model, cfg.file)
    elif cfg.url:
        address = cfg.url if isinstance(cfg.url, str) else cfg.url[0]
        file = os.path.basename(urlparse(address).path)
        try:
            path = download_cached_file(cfg.url, cache_dir=cache_dir)  # type: ignore[arg-type]
        except (OSError, RuntimeError) as error:
            reason = ' '.join(str(error).split()) or type(error).__name__
            raise OSError(
                f'cannot download the weights of {name} from {address} ({reason}); fetch {file} by other '
                f"means and pass checkpoint_path='/path/to/{file}'"
            ) from None
        load_checkpoint(model, path)
    elif page:
        raise ValueError(
            f'the weights of {name} have no direct address; download them from {page} and pass checkpoint_path='
        )
    else:
        raise ValueError(f'{name} has no published weights; leave pretrained=False or pass checkpoint_path=')


def read(path: str | os.PathLike[str]) -> Any:
    """The content of a checkpoint file, on the CPU, without executing code from it.

    Raises:
        FileNotFoundError: no such file.  ValueError: not a checkpoint, or one that holds a foreign class.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f'no such checkpoint file: {os.fspath(path)}')
    if file.suffix == '.safetensors':
        from safetensors.torch import load_file

        return load_file(file)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r'(?:GLOBAL|global|class) [`\'"]?([\w.]+)', str(error))
        what = f'holds the class {found[1]}' if found else 'is not a PyTorch checkpoint'
        raise ValueError(
            f'{os.fspath(path)} {what}; only tensors, plain containers and argparse.Namespace are read'
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = ' '.join(str(error).split())[:200]
        raise ValueError(f'{os.fspath(path)} is not a PyTorch checkpoint or is damaged ({reason})') from None


def _state_dict(content: Any, source: str, beside: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of a backbone out of whatever a training program saved; of a whole model also those `beside` it."""
    for name in _CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f'{source} holds no state dict')
    state = {str(key).removeprefix('module.'): value for key, value in content.items() if isinstance(value, Tensor)}
    prefix = 'backbone.'
    if any(key.startswith(prefix) for key in state):
        kept = (prefix, *beside)
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(kept)}
    return state


def _fit(key: str, value: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    """Weights of 1x1 convolutions for linear layers and the reverse."""
    target = own.get(key)
    if target is None or value.shape == target.shape:
        return value
    same = [n for n in value.shape if n != 1] == [n for n in target.shape if n != 1]
    trailing = min(value.ndim, target.ndim)
    return value.reshape(target.shape) if same and value.shape[:trailing] == target.shape[:trailing] else value


def _adapt(model: nn.Module, state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, str]:
    """Adapts the first convolution and takes out a classifier for other classes, in place; what was done, by key."""
    cfg = getattr(model, 'default_cfg', None) or {}
    notes: dict[str, str] = {}
    first = f'{cfg.get("first_conv")}.weight'
    if first in state and first in own and state[first].shape != own[first].shape:
        before, after = state[first].shape[1], own[first].shape[1]
        if state[first].ndim == 4 and before == 3 and state[first].shape[2:] == own[first].shape[2:]:
            state[first] = adapt_input_conv(after, state[first])
            notes['first_conv'] = f'{first} adapted from {before} to {after} channels'
    layers = cfg.get('classifier')
    for layer in (layers,) if isinstance(layers, str) else layers or ():
        weight, bias = f'{layer}.weight', f'{layer}.bias'
        if weight not in state or weight not in own or state[weight].shape[0] == own[weight].shape[0]:
            continue
        if state[weight].shape[1:] == own[weight].shape[1:]:
            theirs, ours = state[weight].shape[0], own[weight].shape[0]
            notes[weight] = f'{layer} not loaded: {theirs} classes instead of {ours}'
            notes[bias] = ''
            del state[weight]
            state.pop(bias, None)
    return notes


def _split(keys: list[str], prefixes: tuple[str, ...]) -> tuple[list[str], list[str]]:
    return [k for k in keys if k.startswith(prefixes)], [k for k in keys if not k.startswith(prefixes)]


def _list(keys: list[str], limit: int = 12) -> str:
    more = f' and {len(keys) - limit} more' if len(keys) > limit else ''
    return ', '.join(keys[:limit]) + more if keys else 'none'


def _title(model: nn.Module) -> str:
    name = (getattr(model, 'default_cfg', None) or {}).get('architecture') or type(model).__name__
    return f'{name} (dense form)' if getattr(model, 'features_only', False) else name
