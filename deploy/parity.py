"""Does an exported file compute what the model computes? Output by output, on the same inputs."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .onnx import read_metadata, require


@dataclass(frozen=True)
class Parity:
    """How far an output of the exported file is from the model's.

    max_abs, mean_abs: of the difference; max_rel: max_abs over the largest magnitude of the model's output; cosine: of
    the two outputs as vectors.
    """

    output: str
    shape: tuple[int, ...]
    max_abs: float
    mean_abs: float
    max_rel: float
    cosine: float

    def row(self) -> dict[str, Any]:
        return asdict(self)


class OnnxModel:
    """An ONNX file on onnxruntime, called as the model was: tensors in, a tensor or a list of tensors out.

    Args:
        path: of the file.
        providers: of onnxruntime; the CPU if None.

    Raises:
        ImportError: onnxruntime is not installed.  FileNotFoundError, ValueError: no such file, or not ONNX.
    """

    def __init__(self, path: str | os.PathLike[str], *, providers: Sequence[str] | None = None):
        require('onnxruntime')
        import onnxruntime

        if not Path(path).is_file():
            raise FileNotFoundError(f'no such ONNX file: {os.fspath(path)}')
        self.path, self.metadata = Path(path), read_metadata(path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=list(providers or ['CPUExecutionProvider'])
        )
        self.inputs = [entry.name for entry in self.session.get_inputs()]
        self.outputs = [entry.name for entry in self.session.get_outputs()]

    def __call__(self, *tensors: Tensor) -> Any:
        if len(tensors) != len(self.inputs):
            raise ValueError(f'{self.path.name} takes {self.inputs}, got {len(tensors)} tensors')
        arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in zip(self.inputs, tensors)}
        results = [torch.from_numpy(array) for array in self.session.run(None, arrays)]
        return results[0] if len(results) == 1 else results


def compare(names: Sequence[str], ours: Any, expected: Any) -> list[Parity]:
    """One line per output.

    Args:
        names: of the outputs.
        ours: a tensor or a list of them, from the exported file.
        expected: the same from the model.

    Raises:
        ValueError: the numbers of outputs or their shapes differ.
    """
    pairs = list(zip(_listed(ours), _listed(expected), strict=False))
    if not len(names) == len(_listed(ours)) == len(_listed(expected)):
        raise ValueError(f'expected outputs {list(names)}, got {len(_listed(ours))} and {len(_listed(expected))}')
    rows: list[Parity] = []
    for name, (a, b) in zip(names, pairs):
        if a.shape != b.shape:
            raise ValueError(f'{name} has shape {tuple(a.shape)}, the model gives {tuple(b.shape)}')
        a, b = a.detach().cpu().double().flatten(), b.detach().cpu().double().flatten()
        difference = (a - b).abs()
        rows.append(
            Parity(
                output=name,
                shape=tuple(_listed(expected)[len(rows)].shape),
                max_abs=difference.max().item() if len(a) else 0.0,
                mean_abs=difference.mean().item() if len(a) else 0.0,
                max_rel=(difference.max() / b.abs().max().clamp(min=1e-12)).item() if len(a) else 0.0,
                cosine=F.cosine_similarity(a, b, dim=0).item() if a.any() or b.any() else 1.0,
            )
        )
    return rows


def check_onnx(model: nn.Module, path: str | os.PathLike[str], *inputs: Tensor) -> list[Parity]:
    """The file's outputs in onnxruntime against the model's, on the same inputs."""
    exported = OnnxModel(path)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = model(*inputs)
    finally:
        model.train(training)
    return compare(exported.outputs, exported(*inputs), expected)


def as_table(rows: Sequence[Parity]) -> str:
    """The rows as a Markdown table."""
    lines = ['| output | shape | max abs | mean abs | max rel | cosine |', '|---|---|---:|---:|---:|---:|']
    lines += [
        f'| {row.output} | {"x".join(map(str, row.shape))} | {row.max_abs:.2e} | {row.mean_abs:.2e} '
        f'| {row.max_rel:.2e} | {row.cosine:.6f} |'
        for row in rows
    ]
    return '\n'.join(lines)


def _listed(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]
