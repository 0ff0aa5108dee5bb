"""Train a model: `python tools/train.py CONFIG`, or `densezoo train CONFIG`.

python tools/train.py quickstart/detection --work-dir work_dirs/try
python tools/train.py CONFIG --resume                                   # go on where the last run stopped
python tools/train.py CONFIG --cfg-options train_cfg.max_iters=500 optim_wrapper.optimizer.lr=2e-4
torchrun --nproc_per_node=2 tools/train.py CONFIG --launcher pytorch    # GPUs by NCCL, CPUs by gloo
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from densezoo.tools.common import add_config, report_errors


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog='densezoo train', description='Train a model from a config.')
    add_config(arguments)
    arguments.add_argument('--work-dir', help="where the run's files go (default: work_dirs/<config's name>)")
    arguments.add_argument('--resume', action='store_true', help='continue from last.pth in the work directory')
    arguments.add_argument(
        '--amp', nargs='?', const='bf16', choices=('bf16', 'fp16'), help='mixed precision (fp16 on GPUs only)'
    )
    arguments.add_argument('--seed', type=int, help="seed of weights, order and augmentation (default: the config's)")
    arguments.add_argument(
        '--launcher', choices=('none', 'pytorch'), default='none', help="'pytorch' when started by torchrun"
    )
    return arguments


@report_errors
def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    from densezoo.train import build_runner, launch, load_config

    config = load_config(options.config, options.cfg_options)
    if options.seed is not None:
        config.randomness = {**config.get('randomness', {}), 'seed': options.seed}
    if options.amp is not None:
        config.optim_wrapper['amp'] = options.amp
    work_dir = Path(options.work_dir or config.get('work_dir') or f'work_dirs/{Path(config.filename).stem}')
    resume_from = work_dir / 'last.pth' if options.resume else None
    if resume_from is not None and not resume_from.is_file():
        print(f'nothing to resume in {work_dir}: starting from the beginning', file=sys.stderr)
        resume_from = None
    launch.start(options.launcher)
    try:
        build_runner(config, work_dir=work_dir, resume_from=resume_from, launcher=options.launcher).train()
    finally:
        launch.stop()
    return 0


if __name__ == '__main__':
    sys.exit(main())
