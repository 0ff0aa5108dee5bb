"""Small plain models whose tokens are reduced, by every method that does more than merging."""

from typing import Any

import torch

from densezoo.backbones import create_model, reduce_tokens

# every method of these files, with settings for three blocks
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    'ats': ('ats', {'layers': (1, 2)}),
    'ats_capped': ('ats', {'r': 6, 'layers': (0, 1)}),
    'ats_fixed': ('ats', {'layers': (0, 1), 'drop_tokens': False}),
    'stvit': ('stvit', {'tokens': 4, 'first': 0}),
    'stvit_learned': ('stvit', {'tokens': (2, 3), 'first': 1, 'learned': True}),
    'stvit_r': ('stvit_r', {'window': 4, 'sample': 2, 'group': 4}),
    'stvit_r_short': ('stvit_r', {'window': 3, 'sample': 1, 'group': 3}),
    'sparsifiner': ('sparsifiner', {'keep': 0.3}),
    'sparsifiner_blocks': ('sparsifiner', {'keep': 0.3, 'block': 16}),
    'pyra': ('pyra', {'r': 4}),
    'pyra_bottleneck': ('pyra', {'r': 4, 'adapter': 'bottleneck'}),
}


def small(name: str = 'deit_tiny_distilled_patch16_224', **arguments: Any) -> Any:
    """Few blocks, with weights so large that patches differ in significance."""
    shape = dict(
        depth=4, dim=32, num_heads=2, img_size=96, **({} if arguments.get('features_only') else {'num_classes': 7})
    )
    model = create_model(name, **{**shape, **arguments}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return model


def reduced_by(key: str, **arguments: Any) -> Any:
    method, settings = SETTINGS[key]
    model = reduce_tokens(small(**arguments), method, **settings)
    with torch.no_grad():  # what starts at 0 shows nothing
        for name, parameter in model.reduction.named_parameters():
            if 'pyra_b' in name or '.up.' in name:
                parameter.normal_(std=0.3)
    return model


def images(batch: int = 3, height: int = 96, width: int = 96) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def as_list(x: Any) -> list[torch.Tensor]:
    return list(x) if isinstance(x, list | tuple) else [x]


def close(ours: Any, expected: Any, relative: float = 1e-4) -> None:
    for a, b in zip(as_list(ours), as_list(expected), strict=True):
        b = b.detach()
        torch.testing.assert_close(a.detach(), b, rtol=0, atol=relative * max(float(b.abs().max()), 1e-6))
