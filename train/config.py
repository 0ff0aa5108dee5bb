"""Configs: find one by path or name, load it, override it, and name every misspelt key before anything is built.

A config is pure Python for mmengine's lazy mode: one import per line, classes only under `type=`, literals and plain
arithmetic elsewhere, bases by `with read_base(): from .._base_.x import *`. `load_config` says in one line which of
these a file breaks. Overrides are `a.b.0.c=value`: every step of the path must exist, or its last name be an argument
of the component there.
"""

import ast
import builtins
import difflib
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine import registry as mmengine_registry
from mmengine.config import Config, ConfigDict
from mmengine.registry import Registry
from mmengine.runner import Runner as MMEngineRunner
from mmengine.utils import get_object_from_string
from torch.utils.data import DataLoader

from ..backbones import create_model
from ..backbones.binary import create_binary
from ..backbones.registry import constructor_arguments
from .hooks import DEFAULT_HOOKS

# Keys at the top of a config beside mmengine's Runner's own.
TOP_LEVEL = ('check_data', 'compile', 'find_unused_parameters', 'model_wrapper_cfg', 'sync_bn', 'optim_wrapper')
# Keys that containers without a `type` may hold.
CONTAINERS: dict[str, tuple[str, ...]] = {
    'paramwise_cfg': ('layer_decay', 'min_scale', 'backbone_scale', 'decay_1d'),
    'clip_grad': ('type', 'max_norm', 'norm_type', 'error_if_nonfinite', 'foreach', 'clip_value'),
    'randomness': ('seed', 'diff_rank_seed', 'deterministic'),
    'env_cfg': ('cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'),
    'auto_scale_lr': ('enable', 'base_batch_size'),
    'compile': ('backend', 'mode', 'dynamic', 'fullgraph', 'options'),
    'default_hooks': tuple(DEFAULT_HOOKS),
}
_LOADER_KEYS = ('dataset', 'sampler', 'batch_sampler', 'collate_fn', 'num_batch_per_epoch', 'worker_init_fn')
_ALWAYS = ('type', '_delete_', '_scope_')


# ---- finding and loading


def config_folder() -> Path:
    """The folder of the configs that come with densezoo."""
    spec = importlib.util.find_spec('densezoo.configs')
    if spec is None or not spec.submodule_search_locations:
        raise ValueError('the package densezoo.configs is not installed')
    return Path(next(iter(spec.submodule_search_locations)))


def config_names() -> list[str]:
    """Names of the configs that come with densezoo: 'quickstart/detection', ..."""
    root = config_folder()
    files = (path.relative_to(root) for path in root.rglob('*.py'))
    return sorted(
        file.with_suffix('').as_posix()
        for file in files
        if file.name != '__init__.py' and not any(part.startswith('_') for part in file.parts)
    )


def find_config(name: str | Path) -> Path:
    """A config's file, from a path, or from a name inside the package ('quickstart/detection', with or without
    'configs/' and '.py')."""
    path = Path(name).expanduser()
    if path.is_file():
        return path.resolve()
    relative = path.as_posix().removeprefix('./').removeprefix('configs/').removesuffix('.py')
    packaged = config_folder() / f'{relative}.py'
    if packaged.is_file():
        return packaged
    raise FileNotFoundError(
        f"no config {str(name)!r}, neither a file nor one of densezoo's{_near(relative, config_names())}"
    )


def load_config(path: str | Path, overrides: Mapping[str, Any] | Iterable[str] = ()) -> Config:
    """Load a config, apply overrides, and check every component's arguments.

    Args:
        path: see `find_config`.
        overrides: 'a.b=c' strings, or a mapping of dotted paths to values.
    Raises:
        FileNotFoundError, ValueError: one line naming the file or the key, and the nearest valid one.
    """
    file = find_config(path)
    check_style(file)
    try:
        config = Config.fromfile(file)
    except (AssertionError, RuntimeError, SyntaxError) as error:
        raise ValueError(f'{file} is not a config that can be read: {str(error) or type(error).__name__}') from error
    if not isinstance(overrides, Mapping):
        overrides = parse_overrides(overrides)
    for key, value in overrides.items():
        _override(config, key, value)
    check_arguments(config)
    return config


def check_style(path: Path) -> None:
    """Name what mmengine's lazy configs cannot carry, with its line (mmengine itself fails without a message)."""
    try:
        tree = ast.parse(path.read_text(encoding='utf-8'))
    except SyntaxError as error:
        raise ValueError(f'{path}, line {error.lineno}: {error.msg}') from None
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and len(node.names) > 1:
            raise ValueError(f'{path}, line {node.lineno}: one import per line in a config')
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            bases = isinstance(node, ast.ImportFrom) and node.level > 0
            if (not bases and module and module.split('.')[0] not in (*sys.stdlib_module_names, 'mmengine')) or (
                module and module.startswith('mmengine') and module != 'mmengine.config'
            ):
                imported.update(alias.asname or alias.name for alias in node.names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in imported:
            raise ValueError(
                f'{path}, line {node.lineno}: a config describes calls, it does not make them: '
                f'dict(type={node.func.id}, ...)'
            )
        values: list[tuple[str | None, ast.expr]] = []
        if isinstance(node, ast.keyword):
            values = [(node.arg, node.value)]
        elif isinstance(node, ast.Dict):
            values = [
                (str(key.value) if isinstance(key, ast.Constant) else None, value)
                for key, value in zip(node.keys, node.values, strict=True)
            ]
        elif isinstance(node, ast.Assign):
            values = [(None, node.value)]
        for name, value in values:
            if name != 'type' and isinstance(value, ast.Name) and value.id in imported:
                raise ValueError(
                    f'{path}, line {value.lineno}: {value.id} may only stand under type= '
                    '(as a plain value it does not survive being written down with the run)'
                )


# ---- overrides


def parse_overrides(options: Iterable[str]) -> dict[str, Any]:
    """'a.b=c' strings -> {dotted path: value}. Values are Python literals, true, false, none; anything else is text."""
    parsed: dict[str, Any] = {}
    for option in options:
        key, equals, text = option.partition('=')
        if not equals or not key.strip():
            raise ValueError(f'an override is KEY=VALUE, got {option!r}')
        parsed[key.strip()] = _value(text.strip())
    return parsed


def _value(text: str) -> Any:
    words = {'true': True, 'false': False, 'none': None, 'null': None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _override(config: Config, dotted: str, value: Any) -> None:
    root = config._cfg_dict
    keys = dotted.split('.')
    allowed = accepted_keys(root, ())
    if len(keys) == 1 and keys[0] in dict.keys(root) and allowed is not None and keys[0] not in allowed:
        uses = [path for path, found in _leaves(root) if '.' in path and found == dict.get(root, keys[0])]
        hint = f': override {" and ".join(uses[:5])}' if uses else ''
        raise ValueError(
            f'{dotted} is a variable of the config file, and what was computed from it does not follow{hint}'
        )
    _set(root, keys, value, dotted, ())


def _leaves(node: Any, path: str = '') -> Iterator[tuple[str, Any]]:
    """Dotted paths and values of everything in nested dicts and lists."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(node, dict):
        items = dict.items(node)
    elif isinstance(node, list | tuple):
        items = enumerate(node)
    for key, value in items:
        below = f'{path}.{key}' if path else str(key)
        yield below, value
        yield from _leaves(value, below)


def _set(node: Any, keys: list[str], value: Any, dotted: str, parents: tuple[str, ...]) -> Any:
    """Set the value below `node`, checking each step; returns the node (tuples come back as new ones)."""
    key, rest = keys[0], keys[1:]
    if isinstance(node, list | tuple):
        items = list(node)
        if not key.lstrip('-').isdigit() or not -len(items) <= int(key) < len(items):
            raise ValueError(
                f'{dotted}: {".".join(parents)} is a list, its indices are 0..{len(items) - 1}, got {key!r}'
            )
        index = int(key)
        items[index] = _set(items[index], rest, value, dotted, (*parents, key)) if rest else value
        if isinstance(node, list):
            node[:] = items
            return node
        return tuple(items)
    if not isinstance(node, dict):
        raise ValueError(f'{dotted}: {".".join(parents)} is {node!r}, nothing lies below it')
    allowed = accepted_keys(node, parents)
    known = dict.__contains__(node, key)
    if not known and allowed is not None and key not in allowed:
        place = '.'.join(parents) or 'the config'
        raise ValueError(f'{dotted}: {place} has no key {key!r}{_near(key, [*dict.keys(node), *allowed])}')
    if rest:
        child = dict.get(node, key)
        if not known or child is None:
            child = ConfigDict()
        node[key] = _set(child, rest, value, dotted, (*parents, key))
    else:
        node[key] = ConfigDict(value) if isinstance(value, dict) else value
    return node


# ---- arguments


def check_arguments(config: Config) -> None:
    """Every `dict(type=X, ...)` in the config holds only arguments of X, every container only known keys."""
    root = config._cfg_dict
    for key in dict.keys(root):
        value = dict.get(root, key)
        if isinstance(value, dict | list | tuple):
            _check(value, (key,))


def _check(node: Any, parents: tuple[str, ...]) -> None:
    if isinstance(node, dict):
        allowed = accepted_keys(node, parents)
        for key in dict.keys(node):
            if allowed is not None and key not in allowed:
                owner = f'an argument of {_name(node["type"])}' if dict.get(node, 'type') else 'known here'
                raise ValueError(f'{".".join((*parents, str(key)))} is not {owner}{_near(key, allowed)}')
            _check(dict.get(node, key), (*parents, str(key)))
    elif isinstance(node, list | tuple):
        for index, item in enumerate(node):
            _check(item, (*parents, str(index)))


def accepted_keys(node: Mapping[str, Any], parents: tuple[str, ...]) -> list[str] | None:
    """Keys that a dict at this place may hold; None where anything goes."""
    place = parents[-1] if parents else ''
    if not parents:
        return [*inspect.signature(MMEngineRunner.__init__).parameters, *TOP_LEVEL]
    if 'type' in node and place != 'clip_grad':
        component = resolve(node['type'])
        names = None if component is None else arguments(component, node)
        if names is None:
            return None
        extra = {'optim_wrapper': ['constructor', 'paramwise_cfg']}.get(parents[0] if len(parents) == 1 else '', [])
        hooks = ['priority'] if parents[0] in ('default_hooks', 'custom_hooks') else []
        # Read by the Runner, which then calls the scheduler's build_iter_from_epoch instead of its constructor.
        schedules = ['convert_to_iter_based'] if parents[0] == 'param_scheduler' else []
        return [*names, *extra, *hooks, *schedules, *_ALWAYS]
    if len(parents) == 2 and parents[0] == 'default_hooks' and place in DEFAULT_HOOKS:
        return [*(arguments(DEFAULT_HOOKS[place], node) or ()), 'priority', *_ALWAYS]
    if place.endswith('_dataloader'):
        return [*inspect.signature(DataLoader.__init__).parameters, *_LOADER_KEYS]
    if place == 'optim_wrapper':
        return ['type', 'optimizer', 'accumulative_counts', 'clip_grad', 'amp', 'constructor', 'paramwise_cfg']
    return list(CONTAINERS[place]) if place in CONTAINERS else None


def resolve(kind: Any) -> Any:
    """What a `type` stands for: a class or function, or None for a name that no registry knows."""
    if not isinstance(kind, str):
        return kind
    if '.' in kind:
        try:
            return get_object_from_string(kind)
        except (ImportError, AttributeError):
            return None
    for registry in vars(mmengine_registry).values():
        if isinstance(registry, Registry):
            registry.import_from_location()
            if kind in registry.module_dict:
                return registry.module_dict[kind]
    return None


def arguments(component: Any, node: Mapping[str, Any]) -> list[str] | None:
    """Names of the arguments that a class or function takes; None if it takes any."""
    if component in (create_model, create_binary):
        name = node.get('name')
        named = [n for n, p in inspect.signature(component).parameters.items() if p.kind is not p.VAR_KEYWORD]
        return [*named, *constructor_arguments(name)] if isinstance(name, str) else None
    if not inspect.isclass(component):
        return _signature(component)
    names = _signature(component)
    if names is not None:
        return names
    # **kwargs: they go to the parents' constructors, so the names of all of these together.
    collected: list[str] = []
    for parent in component.__mro__:
        if '__init__' in vars(parent) and parent is not object:
            parameters = inspect.signature(vars(parent)['__init__']).parameters.values()
            collected += [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)][1:]
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                return collected
    return None


def _signature(component: Any) -> list[str] | None:
    try:
        parameters = inspect.signature(component).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters]


def _name(kind: Any) -> str:
    return kind if isinstance(kind, str) else getattr(kind, '__name__', str(kind))


def _near(name: Any, known: Iterable[str]) -> str:
    known = [str(k) for k in dict.fromkeys(known) if k not in (*_ALWAYS[1:], 'self') and k not in vars(builtins)]
    near = difflib.get_close_matches(str(name), known, 3, 0.5)
    return f'; did you mean {" or ".join(map(repr, near))}?' if near else f'; known: {", ".join(sorted(known)[:20])}'
