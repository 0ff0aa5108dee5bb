"""Mixers of maps as token mixers of plain backbones: pooling, global filters, linear attention and all the others."""

# B batch, N tokens, C channels, H W size of the grid
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .mixers import MIXERS, build_mixer
from .token_attention import TOKEN_MIXERS


class MapMixer(nn.Module):
    """A mixer of `mixers.MIXERS` on tokens without prefix tokens; (B, N, C) -> (B, N, C).

    Args:
        dim: channels.
        mixer: by name or dict(name=..., option=...).
        num_heads, qkv_bias: for mixers that have these options and do not state them.
        prefix: must be 0.
        window_size: must be None; mixers with windows state theirs as an option.
        grid: (H, W) of the map, for mixers whose parameters depend on it.
    """

    def __init__(
        self,
        *,
        dim: int,
        mixer: str | Mapping[str, Any] = 'pool',
        num_heads: int | None = None,
        qkv_bias: bool = True,
        prefix: int = 0,
        window_size: int | None = None,
        grid: tuple[int, int] | None = None,
    ):
        super().__init__()
        if prefix or window_size is not None:
            raise ValueError(
                f'mixers of maps take neither prefix tokens nor window_size, got {prefix=}, {window_size=}; pass '
                'class_token=False to the model and windows as options of the mixer'
            )
        spec = {'name': mixer} if isinstance(mixer, str) else dict(mixer)
        if spec.get('name') in MIXERS:
            accepted = inspect.signature(MIXERS[spec['name']]).parameters
            context = {'num_heads': num_heads, 'qkv_bias': qkv_bias}
            spec = {**{key: value for key, value in context.items() if key in accepted}, **spec}
        self.mixer = build_mixer(spec, dim=dim, grid=grid)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.mixer(x.unflatten(1, grid)).flatten(1, 2)

    @property
    def first_linears(self) -> tuple[str, ...]:
        """The layers that read the input; none in windows, whose padding a folded norm would change."""
        if getattr(self.mixer, 'window_size', None) is not None:
            return ()
        return tuple(f'mixer.{name}' for name in getattr(self.mixer, 'first_linears', ()))

    @property
    def last_linear(self) -> str | None:
        """The layer that gives the output."""
        name = getattr(self.mixer, 'last_linear', None)
        return None if name is None else f'mixer.{name}'


TOKEN_MIXERS['map'] = MapMixer
