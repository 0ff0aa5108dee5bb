"""From a trained model to something that runs elsewhere. Takes any nn.Module; knows no training framework."""

from ..kernels import run_tiles
from .autocast import autocast
from .engine import Engine
from .export import export_program
from .fuse import fuse_for_deploy
from .hybrid_quant import Setting, find_bridges, quantize_hybrid
from .onnx import export_onnx, read_metadata
from .parity import OnnxModel, check_onnx, match_boxes
from .precision import Half, out_of_range
from .quantize import quantize, quantize_within
from .tensorrt import build_engine

__all__ = [
    'Engine',
    'Half',
    'OnnxModel',
    'Setting',
    'autocast',
    'build_engine',
    'check_onnx',
    'export_onnx',
    'export_program',
    'find_bridges',
    'fuse_for_deploy',
    'match_boxes',
    'out_of_range',
    'quantize',
    'quantize_hybrid',
    'quantize_within',
    'read_metadata',
    'run_tiles',
]
