"""Config -> Runner: mmengine's Runner with this project's defaults, checkpoints and data checks."""

import copy
import inspect
import itertools
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import master_only
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper as MMEngineOptimWrapper
from mmengine.registry import DATASETS
from mmengine.runner import Runner as MMEngineRunner
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from .checkpoint import load_checkpoint, plain, save_checkpoint
from .config import arguments, resolve
from .hooks import DEFAULT_HOOKS
from .loops import unwrapped

_run_numbers = itertools.count()


class Runner(MMEngineRunner):
    """mmengine's Runner, with

    - `DEFAULT_HOOKS` instead of mmengine's own;
    - checkpoints that are written atomically, hold plain values only and load with weights_only=True;
    - distributed training on CPUs;
    - `compile=` compiling the backbone and the neck rather than the whole training step;
    - the datasets checked before training starts (`check_data=False` in the config leaves that out);
    - a quiet console: environment, config and hook list go to the log file.
    """

    _train_loop: Any
    _val_loop: Any

    def build_logger(self, log_level: Any = 'INFO', log_file: str | None = None, **kwargs: Any) -> MMLogger:
        logger = super().build_logger(log_level, log_file, **kwargs)
        self._console_level(logger, logging.WARNING)
        return logger

    def register_default_hooks(self, hooks: Mapping[str, Any] | None = None) -> None:
        chosen: dict[str, Any] = {name: {'type': kind} for name, kind in DEFAULT_HOOKS.items()}
        for name, hook in (hooks or {}).items():
            chosen[name] = hook if not isinstance(hook, dict) or 'type' in hook else {**chosen.get(name, {}), **hook}
        for hook in chosen.values():
            if hook is not None:
                self.register_hook(hook)

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        if self.distributed and model_wrapper_cfg is None:
            # torch 2.14 renames an argument; loops.sync_buffers gives all ranks the same buffers where it matters.
            buffers = 'forward_sync_buffers'
            if buffers not in inspect.signature(DistributedDataParallel).parameters:
                buffers = 'broadcast_buffers'
            model_wrapper_cfg = {
                'type': 'MMDistributedDataParallel',
                'device_ids': [int(os.environ['LOCAL_RANK'])] if torch.cuda.is_available() else None,
                buffers: False,
                # A head may leave maps, and so their norms, unused; that must not stop a run.
                'find_unused_parameters': self.cfg.get('find_unused_parameters', True),
            }
        return super().wrap_model(model_wrapper_cfg, model)

    def _maybe_compile(self, target: str) -> None:
        options = self.cfg.get('compile') or None
        if options is not None:
            unwrapped(self.model).compile_parts(**({} if options is True else options))
            self.logger.info('backbone and neck are compiled: the first iterations take longer')

    def build_dataloader(  # type: ignore[override]
        self, dataloader: Any, seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        """mmengine's, with the dataset checked before a sampler asks for its length."""
        if isinstance(dataloader, dict) and isinstance(dataloader.get('dataset'), dict):
            check = self.cfg.get('check_data', True) and self._train_loop is not None
            dataloader = {
                **dataloader,
                'dataset': {'type': checked_dataset, 'config': dataloader['dataset'], 'check': check},
            }
        return MMEngineRunner.build_dataloader(dataloader, seed=seed, diff_rank_seed=diff_rank_seed)

    def train(self) -> nn.Module:
        self._console_level(self.logger, logging.INFO)
        try:
            # The data first: what is wrong with it is said before anything else starts.
            self._train_loop = self.build_train_loop(self._train_loop)
            if self._val_loop is not None:
                self._val_loop = self.build_val_loop(self._val_loop)
            self._check_classes()
            self._check_schedule()
            return super().train()
        finally:
            self.call_hook('close')

    def test(self) -> dict[str, float]:
        self._console_level(self.logger, logging.INFO)
        return super().test()

    def _check_schedule(self) -> None:
        schedules = self.cfg.get('param_scheduler') or []
        ends = [s.get('end') for s in schedules if isinstance(s, dict) and not s.get('by_epoch', True)]
        end = max((end for end in ends if end is not None), default=self.max_iters)
        if end > self.max_iters:
            self.logger.warning(
                f'training stops at iteration {self.max_iters}, its learning-rate schedule ends at {end}: '
                f'a shorter run needs param_scheduler.{ends.index(end)}.end={self.max_iters} too'
            )

    def _check_classes(self) -> None:
        head = getattr(unwrapped(self.model), 'head', None)
        expected = getattr(head, 'num_classes', None)
        loaders = [self.train_dataloader] + ([self.val_dataloader] if self._val_loop is not None else [])
        for dataset in (loader.dataset for loader in loaders):
            classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
            if classes and isinstance(expected, int) and len(classes) != expected:
                first = ', '.join(map(str, list(classes)[:5]))
                raise ValueError(
                    f'model.head.num_classes={expected}, but {type(dataset).__name__} has {len(classes)} classes '
                    f'({first}, ...): set model.head.num_classes={len(classes)}'
                )

    @master_only
    def dump_config(self) -> None:
        """Write `config.py` into the work directory: it stands alone and trains again (elsewhere, from the start)."""
        config = copy.deepcopy(self.cfg)
        for name in ('work_dir', 'launcher', 'experiment_name'):
            config._cfg_dict.pop(name, None)
        config.dump(Path(self.work_dir) / 'config.py')

    @master_only
    def save_checkpoint(  # type: ignore[override]
        self,
        out_dir: str,
        filename: str,
        *,
        save_optimizer: bool = True,
        meta: Mapping[str, Any] | None = None,
        **unused: Any,
    ) -> None:
        """Write a checkpoint atomically. mmengine's own holds pickled objects and can be cut short."""
        if not hasattr(self, '_config_text'):
            self._config_text = self.cfg.pretty_text  # formatting takes a second
        checkpoint: dict[str, Any] = {
            'meta': {
                'epoch': self.epoch,
                'iter': self.iter,
                **(meta or {}),
                'max_iters': self.max_iters,
                'cfg': self._config_text,
                'seed': self.seed,
                'time': time.strftime('%Y-%m-%d %H:%M:%S'),
                'dataset_meta': getattr(self.train_dataloader.dataset, 'metainfo', None),
            },
            'state_dict': unwrapped(self.model).state_dict(),
            'message_hub': {'log_scalars': {}, 'runtime_info': {}, 'resumed_keys': {}},
        }
        if save_optimizer:
            assert isinstance(self.optim_wrapper, MMEngineOptimWrapper)
            checkpoint['optimizer'] = self.optim_wrapper.state_dict()
            schedulers: Any = self.param_schedulers or []
            checkpoint['param_schedulers'] = [scheduler.state_dict() for scheduler in schedulers]
        self.call_hook('before_save_checkpoint', checkpoint=checkpoint)
        save_checkpoint(checkpoint, Path(out_dir) / filename)

    def load_checkpoint(
        self,
        filename: str,
        map_location: Any = 'cpu',
        strict: bool = False,
        revise_keys: list[tuple[str, str]] | None = None,
    ) -> dict[str, Any]:
        """Load weights into the model. Keys that do not fit are an error, unless a fine-tuning run loads them."""
        checkpoint = load_checkpoint(filename, map_location)
        meta = checkpoint.setdefault('meta', {})
        if self._resume:
            if 'iter' not in meta or 'optimizer' not in checkpoint:
                raise ValueError(f'{filename} holds weights only and a run cannot go on from it: pass load_from=')
            metainfo = getattr(self.train_dataloader.dataset, 'metainfo', None)
            if plain(metainfo) == meta.get('dataset_meta'):
                meta['dataset_meta'] = metainfo  # mmengine compares pickles, which differ between equal values
            if meta.get('max_iters', self.max_iters) != self.max_iters:
                self.logger.warning(
                    f'the checkpoint comes from a run of {meta["max_iters"]} iterations, '
                    f'this one has {self.max_iters}: the learning-rate schedules end where they did in the checkpoint'
                )
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        strict = strict or self._resume or self._train_loop is None
        load_weights(unwrapped(self.model), checkpoint['state_dict'], filename, strict, self.logger.warning)
        self._has_loaded = True
        self.logger.info(f'weights loaded from {filename}')
        return checkpoint

    @staticmethod
    def _console_level(logger: logging.Logger, level: int) -> None:
        for handler in logger.handlers:
            if (
                isinstance(handler, logging.StreamHandler)
                and not isinstance(handler, logging.FileHandler)
                and handler.level < logging.ERROR  # ranks other than the first stay silent
            ):
                handler.setLevel(level)
                handler.setFormatter(logging.Formatter('%(asctime)s %(levelname)s %(message)s', '%H:%M:%S'))


def checked_dataset(config: dict[str, Any], check: bool) -> Any:
    """Build a dataset; with `check`, let it look at all its files (it raises, or drops what is bad)."""
    dataset = DATASETS.build(config)
    if check and hasattr(dataset, 'check'):
        dataset.check()
    return dataset


def load_weights(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    source: str,
    strict: bool = True,
    warn: Callable[[str], None] | None = None,
) -> None:
    """Load a task's weights; what does not fit is one line: a ValueError if `strict`, else a warning."""
    state = {re.sub(r'^module\.', '', name): value for name, value in state_dict.items()}
    own = model.state_dict()
    shapes = [n for n in own if n in state and own[n].shape != state[n].shape]
    problems = [
        f'{what} {", ".join(names[:5])}{", ..." if len(names) > 5 else ""}'
        for what, names in (
            ('missing', [name for name in own if name not in state]),
            ('unexpected', [name for name in state if name not in own]),
            ('of another shape', shapes),
        )
        if names
    ]
    if problems and strict:
        raise ValueError(f'{source} does not fit the model: {"; ".join(problems)}')
    if problems and warn is not None:
        warn(f'{source}: {"; ".join(problems)}')
    model.load_state_dict({name: value for name, value in state.items() if name not in shapes}, strict=False)


def complete(config: Config) -> Config:
    """A copy with the defaults that a config may leave out: samplers, collate, loops' data, visualizer, seeds."""
    config = copy.deepcopy(config)
    spell_out(config._cfg_dict)
    config.setdefault('randomness', {'seed': 0})
    if config.randomness.get('seed') is None:
        config.randomness['seed'] = 0
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = config.get(name)
        if not isinstance(loader, dict):
            continue
        training = name == 'train_dataloader'
        # By name: the config is written down with the run, and a class would not survive that.
        sampler = 'RestartableSampler' if training else 'EvalSampler'
        loader.setdefault('sampler', {'type': f'densezoo.data.{sampler}'})
        loader.setdefault('collate_fn', {'type': 'densezoo.data.collate'})
        dataset = loader.get('dataset')
        if isinstance(dataset, dict):
            names = arguments(resolve(dataset['type']), dataset) or []
            if 'seed' in names and training:
                dataset.setdefault('seed', config.randomness['seed'])
    wrapper = config.get('optim_wrapper')
    if isinstance(wrapper, dict) and resolve(wrapper.get('type')) in (None, MMEngineOptimWrapper):
        wrapper['type'] = 'densezoo.train.OptimWrapper'
    if 'visualizer' not in config:
        config.visualizer = {'type': 'Visualizer', 'vis_backends': [{'type': 'TensorboardVisBackend'}]}
    return config


def spell_out(node: Any) -> None:
    """Replace classes and functions under `type`, put there by a program, by names that can be written down."""
    if isinstance(node, dict):
        kind = dict.get(node, 'type')
        if inspect.isclass(kind) or inspect.isfunction(kind):
            node['type'] = f'{kind.__module__}.{kind.__qualname__}'
    for value in dict.values(node) if isinstance(node, dict) else node if isinstance(node, list | tuple) else ():
        spell_out(value)


def build_runner(
    config: Config,
    *,
    work_dir: str | Path | None = None,
    resume_from: str | Path | None = None,
    launcher: str = 'none',
    test_only: bool = False,
) -> Runner:
    """Build the Runner of a config.

    Args:
        config: from `load_config`; it is not changed.
        work_dir: where the run's files go; default: the config's own, or work_dirs/<name of the config>.
        resume_from: a checkpoint (last.pth) to go on from: weights, optimizer, schedules, place in the data.
        launcher: 'pytorch' in a process that torchrun started (after `launch.start('pytorch')`).
        test_only: only what testing needs (validation data where there is no test data).
    """
    config = complete(config)
    config.launcher = launcher
    if work_dir is not None:
        config.work_dir = str(work_dir)
    config.setdefault('work_dir', f'work_dirs/{Path(config.filename or "run").stem}')
    stem = Path(config.filename or 'run').stem
    config.experiment_name = f'{stem}_{next(_run_numbers)}'  # mmengine keeps loggers by name: a second run has its own
    if test_only:
        for part in ('dataloader', 'evaluator', 'cfg'):
            if config.get(f'test_{part}') is None:
                config[f'test_{part}'] = config.get(f'val_{part}')
        if config.test_dataloader is None:
            raise ValueError(f'{config.filename} has neither test_dataloader nor val_dataloader')
        config.test_cfg = {'type': 'TestLoop'}
        for name in ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler', 'custom_hooks'):
            config[name] = None
        for part in ('dataloader', 'evaluator', 'cfg'):
            config[f'val_{part}'] = None
        config.default_hooks = {name: None for name in DEFAULT_HOOKS if name != 'summary'}
        config.visualizer = {'type': 'Visualizer', 'vis_backends': []}
    runner = Runner.from_cfg(config)
    if resume_from is not None:  # not through the config: it is written down, and would resume when used again
        runner._load_from, runner._resume = str(resume_from), True
    return runner
