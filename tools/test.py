"""Evaluate a checkpoint: `python tools/test.py CONFIG CHECKPOINT`, or `densezoo test CONFIG CHECKPOINT`.

FILE.onnx and FILE.engine, which `densezoo export` writes, take the place of the checkpoint.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from densezoo.tools.common import add_config, open_deployed, report_errors


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog='densezoo test', description='Evaluate a checkpoint, print its metrics.')
    add_config(arguments)
    arguments.add_argument('checkpoint', help='best.pth or last.pth of a run, FILE.onnx or FILE.engine')
    arguments.add_argument('--out', help='also write the metrics as JSON to this file')
    arguments.add_argument('--work-dir', help="where the log goes (default: 'test' beside the checkpoint)")
    arguments.add_argument(
        '--launcher', choices=('none', 'pytorch'), default='none', help="'pytorch' when started by torchrun"
    )
    return arguments


@report_errors
def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    from densezoo.train import build_runner, launch, load_config
    from densezoo.train.deployed import evaluate

    config = load_config(options.config, options.cfg_options)
    deployed = open_deployed(options.checkpoint)
    if deployed is not None:
        metrics = evaluate(config, deployed)
        print('\n'.join(f'{name} {value:.4g}' for name, value in metrics.items()))
        if options.out:
            Path(options.out).write_text(json.dumps(metrics, indent=2) + '\n')
        return 0
    config.load_from, config.resume = options.checkpoint, False
    launch.start(options.launcher)
    try:
        work_dir = options.work_dir or Path(options.checkpoint).expanduser().parent / 'test'
        runner = build_runner(config, work_dir=work_dir, launcher=options.launcher, test_only=True)
        metrics = {name: float(value) for name, value in runner.test().items()}
        if options.out and runner.rank == 0:
            Path(options.out).write_text(json.dumps(metrics, indent=2) + '\n')
    finally:
        launch.stop()
    return 0


if __name__ == '__main__':
    sys.exit(main())
