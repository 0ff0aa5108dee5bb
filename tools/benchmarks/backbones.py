"""Throughput of our backbones against timm's of the same name, or against the authors' models out of a checkout of
their repository: eval, float32, channels_last input, equal threads."""

from collections.abc import Sequence

import timm
import torch

from densezoo.backbones import create_model, load_checkpoint

from . import authors as authors_models
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
    'deit_tiny_patch16_224',
    'cait_xxs24_224',
    'tnt_s_patch16_224',
)


def run(
    models: Sequence[str] | None = None,
    *,
    batch: int = 8,
    size: int = 224,
    repeats: int = 8,
    device: str = 'cpu',
    authors: str | None = None,
) -> list[Comparison]:
    """Classifier forward passes of `batch` images of size x size, densezoo and its peer in turn.

    Args:
        models: names; by default one of each family that timm has, or the first that the checkout has.
        authors: a checkout of an authors' repository instead of timm; both sides get the authors' weights.
    """
    if models is None:
        models = DEFAULT_MODELS if authors is None else authors_models.default_models(authors)
    images = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    synchronize = torch.cuda.synchronize if device.startswith('cuda') else lambda: None
    rows = []
    for name in models:
        ours = create_model(name)
        if authors is None:
            peer = timm.create_model(name.replace('_cls_', '_'))  # EfficientViT's
        else:
            peer = authors_models.build(name, authors)
            load_checkpoint(ours, peer.state_dict())
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
                peer_name='timm' if authors is None else 'authors',
                repeats=repeats,
            )
        )
    return rows
