"""What the command lines share: the config argument, and errors as one line instead of a trace."""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

# Modules of the extras -> the extra that brings them.
EXTRAS = {
    'mmengine': 'train',
    'cv2': 'train',
    'pycocotools': 'train',
    'tensorboard': 'train',
    'matplotlib': 'train',
    'rich': 'train',
    'skimage': 'demo',
    'sklearn': 'demo',
    'onnx': 'export',
    'onnxscript': 'export',
    'onnxruntime': 'export',
}


def add_config(parser: argparse.ArgumentParser) -> None:
    """The CONFIG argument and --cfg-options."""
    parser.add_argument(
        'config', help='a config file, or the name of one that comes with densezoo: quickstart/detection'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='override anything in the config: train_cfg.max_iters=500 model.head.num_classes=3',
    )


def open_deployed(file: str) -> Any:
    """The exported task of a FILE.onnx or FILE.engine; None for any other file, such as a checkpoint."""
    ending = os.path.splitext(file)[1]
    if ending not in ('.onnx', '.engine'):
        return None
    from densezoo.deploy import Engine, OnnxModel
    from densezoo.train.deployed import DeployedTask

    return DeployedTask(Engine(file) if ending == '.engine' else OnnxModel(file))


def explain(error: BaseException) -> str | None:
    """One line for an error that is the user's to mend, None for one that is ours."""
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or '').split('.')[0]
        extra = EXTRAS.get(module)
        return f'{module} is not installed: pip install densezoo[{extra}]' if extra else None
    if isinstance(error, ImportError) and any(
        name in str(error) for name in ('libGL', 'libgthread', 'libglib', 'libxcb')
    ):
        return f'OpenCV lacks a system library ({error}): apt-get install libgl1 libglib2.0-0'
    message = ' '.join(str(error).split())
    if type(error).__name__ in ('DataError', 'NonFiniteError'):
        return message
    if isinstance(error, ImportError | RuntimeError) and _raised_by_us(error):
        return message  # what is to be installed, or why a compiler refuses
    if isinstance(error, ValueError | TypeError | OSError) and message:
        return message if _raised_by_us(error) else f'{message} (DENSEZOO_TRACEBACK=1 shows where)'
    return None


def _raised_by_us(error: BaseException) -> bool:
    """Whether the innermost frame is densezoo's: such a message is complete by itself."""
    name, trace = 'densezoo', error.__traceback__
    while trace is not None:
        name, trace = trace.tb_frame.f_globals.get('__name__', ''), trace.tb_next
    return name.split('.')[0] in ('densezoo', '__main__')


def report_errors(main: Callable[..., int]) -> Callable[..., int]:
    """Print `error: ...` and return 1 instead of raising; DENSEZOO_TRACEBACK=1 shows the whole trace."""

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> int:
        try:
            return main(*args, **kwargs)
        except KeyboardInterrupt:
            print('interrupted', file=sys.stderr)
            return 130
        except Exception as error:
            line = explain(error)
            if line is None or os.environ.get('DENSEZOO_TRACEBACK'):
                raise
            print(f'error: {line}', file=sys.stderr)
            return 1

    return wrapped
