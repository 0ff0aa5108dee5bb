"""Maps, targets and small set-prediction detectors for their tests."""

from typing import Any

import torch
from torch import nn

from densezoo.heads import DETR, RTDETR, DeformableDETR, PyramidInfo

INFO = PyramidInfo([16, 16, 16], [8, 16, 32])
SIZE = (96, 128)
SMALL = {'channels': 16, 'num_heads': 2, 'hidden': 16, 'decoder_layers': 2, 'num_queries': 20, 'dropout': 0.0}
KINDS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    'detr': (DETR, {'encoder_layers': 1}),
    'deformable_detr': (DeformableDETR, {'encoder_layers': 1}),
    'deformable_detr_two_stages': (
        DeformableDETR,
        {'encoder_layers': 1, 'num_levels': 3, 'refine': True, 'two_stages': True},
    ),
    'rtdetr': (RTDETR, {'num_denoising': 10, 'eval_layers': 1}),
}


def build(name: str, **options: Any) -> Any:
    """A detector of 5 classes whose outputs are spread: published initialisations are nearly constant."""
    torch.manual_seed(0)
    kind, own = KINDS[name]
    head = kind(feature_info=INFO, num_classes=5, **{**SMALL, **own, **options})
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return head


def maps(info: PyramidInfo, size: tuple[int, int] = SIZE, batch: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, c, -(-size[0] // s), -(-size[1] // s), generator=generator)
        for c, s in zip(info.channels(), info.reduction())
    ]


def target(*boxes: list[float]) -> dict[str, Any]:
    return {
        'boxes': torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        'labels': torch.arange(len(boxes)) % 5,
        'size': SIZE,
    }


def backward(head: nn.Module, losses: dict[str, torch.Tensor]) -> dict[str, float]:
    """The losses as numbers; every parameter got a finite gradient."""
    head.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    for key, parameter in head.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
    return {key: value.item() for key, value in losses.items()}
