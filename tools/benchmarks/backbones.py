"""Throughput of our backbones against timm's of the same name: eval, float32, channels_last input, equal threads."""

from collections.abc import Sequence

import timm
import torch

from densezoo.backbones import create_model

from .timing import Comparison, compare

# one small model of each family that timm has too
DEFAULT_MODELS = (
    'poolformer_s12',
    'poolformerv2_s12',
    'convformer_s18',
    'caformer_s18',
    'swin_tiny_patch4_window7_224',
    'pvt_v2_b0',
    'pvt_v2_b2',
    'pvt_v2_b2_li',
    'twins_pcpvt_small',
    'twins_svt_small',
    'davit_tiny',
    'tiny_vit_5m_224',
    'efficientvit_cls_b1',
    'efficientvit_cls_l1',
    'tnt_s_patch16_224',
)


def run(
    models: Sequence[str] = DEFAULT_MODELS, *, batch: int = 8, size: int = 224, repeats: int = 8, device: str = 'cpu'
) -> list[Comparison]:
    """Classifier forward passes of `batch` images of size x size, densezoo and timm in turn."""
    images = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    synchronize = torch.cuda.synchronize if device.startswith('cuda') else lambda: None
    rows = []
    for name in models:
        ours, peer = create_model(name), timm.create_model(name.replace('_cls_', '_'))  # EfficientViT's
        for model in (ours, peer):
            model.eval().to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]

        def call(model: torch.nn.Module) -> None:
            with torch.inference_mode():
                model(images)
            synchronize()

        rows.append(
            compare(
                f'{name} {batch}x{size}x{size}',
                lambda model=ours: call(model),  # type: ignore[misc]
                lambda model=peer: call(model),  # type: ignore[misc]
                peer_name='timm',
                repeats=repeats,
            )
        )
    return rows
