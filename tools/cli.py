"""The `densezoo` command: `densezoo train ...` is `python tools/train.py ...`, and so on."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence

COMMANDS = {
    'train': 'train a model from a config',
    'test': 'evaluate a checkpoint and print its metrics',
    'predict': 'run a checkpoint on images: pictures and a JSON',
    'export': 'write a model as ONNX or a TensorRT engine',
    'benchmark': 'measure speed',
    'models': 'list the backbones',
}


def available() -> dict[str, str]:
    """The subcommands whose module is there."""
    return {name: text for name, text in COMMANDS.items() if importlib.util.find_spec(f'densezoo.tools.{name}')}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = available()
    if not arguments or arguments[0] in ('-h', '--help'):
        print('usage: densezoo COMMAND ...   (densezoo COMMAND --help for its options)\n')
        for name, text in commands.items():
            print(f'  {name:<10} {text}')
        return 0 if arguments else 2
    name = arguments[0]
    if name not in commands:
        print(f'error: no command {name!r}; there are: {", ".join(commands)}', file=sys.stderr)
        return 2
    return int(importlib.import_module(f'densezoo.tools.{name}').main(arguments[1:]) or 0)


if __name__ == '__main__':
    sys.exit(main())
