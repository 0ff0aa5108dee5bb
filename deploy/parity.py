"""Does an exported file compute what the model computes? Output by output, on the same inputs."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

from .export import evaluating
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


@dataclass(frozen=True)
class Matched:
    """How far the boxes of an exported detector are the model's.

    boxes: the model's; matched: those with a counterpart (same label, IoU at least 0.9, each counterpart once); pixels,
    score: the largest differences among them.
    """

    boxes: int
    matched: int
    pixels: float
    score: float


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
        self.path, self.metadata, self.device = Path(path), read_metadata(path), 'cpu'
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=list(providers or ['CPUExecutionProvider'])
        )
        entries = self.session.get_inputs()
        self.inputs = [entry.name for entry in entries]
        self.outputs = [entry.name for entry in self.session.get_outputs()]
        self._shapes = [[n if isinstance(n, int) else None for n in entry.shape] for entry in entries]

    @property
    def shapes(self) -> tuple[tuple[int | None, ...], tuple[int | None, ...]]:
        """Smallest and largest shape of the images; None where the graph sets no bound."""
        shape, lowest = self._shapes[0], self.metadata.get('min_size')
        smallest = [lowest if n is None and i >= 2 else n for i, n in enumerate(shape)]
        return tuple(smallest), tuple(shape)

    def __call__(self, *tensors: Tensor) -> Any:
        if len(tensors) != len(self.inputs):
            raise ValueError(f'{self.path.name} takes {self.inputs}, got {len(tensors)} tensors')
        for name, tensor, (smallest, largest) in zip(self.inputs, tensors, self._bounds()):
            got = tuple(tensor.shape)
            if len(got) != len(smallest) or any(
                (a is not None and n < a) or (b is not None and n > b) for n, a, b in zip(got, smallest, largest)
            ):
                least = tuple('any' if n is None else n for n in smallest)
                most = tuple('any' if n is None else n for n in largest)
                raise ValueError(f'{self.path.name} takes {name} from {least} to {most}, got {got}')
        arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in zip(self.inputs, tensors)}
        results = [torch.from_numpy(array) for array in self.session.run(None, arrays)]
        return results[0] if len(results) == 1 else results

    def _bounds(self) -> list[tuple[Sequence[int | None], Sequence[int | None]]]:
        return [self.shapes, *((shape, shape) for shape in self._shapes[1:])]


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


def match_boxes(ours: Sequence[Tensor], expected: Sequence[Tensor], *, above: float = 0.05) -> Matched:
    """Detections of the exported form against the model's: order and rows below a score or without area play no part.

    Args:
        ours, expected: boxes (B, M, 4), scores (B, M), labels (B, M).
        above: scores of the model's boxes that count; of ours half of that is enough.
    """
    boxes = matched = 0
    pixels = score = 0.0
    for i in range(len(expected[0])):
        a, b = (_above(picture, i, limit) for picture, limit in ((ours, above / 2), (expected, above)))
        boxes += len(b[0])
        if not len(a[0]) or not len(b[0]):
            continue
        overlap = box_iou(b[0], a[0]) * (b[2][:, None] == a[2][None])
        overlap = torch.where((b[1][:, None] - a[1][None]).abs() < 0.1, overlap, 0.0)
        for row in b[1].argsort(descending=True).tolist():
            best = int(overlap[row].argmax())
            if overlap[row, best] >= 0.9:
                matched += 1
                pixels = max(pixels, (a[0][best] - b[0][row]).abs().max().item())
                score = max(score, (a[1][best] - b[1][row]).abs().item())
                overlap[:, best] = 0
    return Matched(boxes, matched, pixels, score)


def _above(outputs: Sequence[Tensor], picture: int, limit: float) -> list[Tensor]:
    boxes, scores, labels = (x[picture].cpu() for x in outputs[:3])
    real = (scores > limit) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    return [boxes[real].float(), scores[real].float(), labels[real].long()]


def check_onnx(model: nn.Module, path: str | os.PathLike[str], *inputs: Tensor) -> list[Parity]:
    """The file's outputs in onnxruntime against the model's, on the same inputs."""
    exported = OnnxModel(path)
    with evaluating(model):
        expected = model(*inputs)
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
