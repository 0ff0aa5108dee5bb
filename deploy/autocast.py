"""float16 or bfloat16 by NVIDIA ModelOpt's AutoCast, which chooses the precision of each node of an ONNX file."""

import importlib
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from .onnx import replacing

INSTALL = "pip install 'nvidia-modelopt[onnx]'"


def autocast(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    precision: str = 'fp16',
    image: Tensor | None = None,
) -> Path:
    """Writes a mixed-precision form of a float32 ONNX file; inputs and outputs stay float32.

    Args:
        source: the float32 file, of one input.
        path: of the new file.
        precision: 'fp16' or 'bf16'.
        image: an input to measure ranges on; ModelOpt takes random numbers if None.

    Returns:
        The path.

    Raises:
        ImportError: ModelOpt is not installed.  ValueError: an unknown precision.
    """
    if precision not in ('fp16', 'bf16'):
        raise ValueError(f'precision must be fp16 or bf16, got {precision=}')
    if importlib.util.find_spec('modelopt') is None:
        raise ImportError(f'AutoCast needs NVIDIA ModelOpt, which is not installed: {INSTALL}')
    import numpy as np
    import onnx

    convert = importlib.import_module('modelopt.onnx.autocast').convert_to_mixed_precision
    name = onnx.load(str(source), load_external_data=False).graph.input[0].name
    with tempfile.TemporaryDirectory() as scratch:
        measured = None
        if image is not None:
            measured = str(Path(scratch) / 'image.npz')
            arrays: dict[str, Any] = {name: image.detach().cpu().float().contiguous().numpy()}
            np.savez(measured, **arrays)
        model = convert(
            onnx_path=str(source), low_precision_type=precision, keep_io_types=True, calibration_data=measured
        )
    entries = {entry.key: entry.value for entry in onnx.load(str(source), load_external_data=False).metadata_props}
    onnx.helper.set_model_props(model, {**entries, 'precision': precision})
    with replacing(path) as unfinished:
        onnx.save(model, str(unfinished))
    return Path(path)
