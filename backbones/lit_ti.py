"""LIT-Ti: the pyramid of Less is More: Pay Less Attention in Vision Transformers, arXiv 2105.14217, with absolute
positions and a class token, where the larger ones (see lit) have biases by offset and average.

Written from the paper and the facts of the authors' code, https://github.com/ziplab/LIT (Apache-2.0; the weights carry
the same licence). Differs: odd maps are padded where the authors' token merging drops the last row and column, and
images whose sides 4 does not divide where the authors' stem drops border pixels; the classifier takes every size by
resizing positions, as the authors' dense form does, where theirs takes one alone.
"""

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .layers import ConvDownsample, Mlp, norm_factory, resize
from .layers.deform import DeformableMerging
from .layers.grid import ceil_div, grid_of
from .lit import PAPER, URL, MergingPyramid, build_stages
from .pvt_v2 import resolve_heads
from .registry import register, weights
from .sizes import Resampled
from .skeleton import check_stages, normalise_indices, per_stage, rename

# B batch, C channels, H W size of the current stage, N = H * W positions


class Position(nn.Module):
    """Adds a learned embedding for each position of a map; (B, H, W, C) -> (B, H, W, C).

    Embeddings are made for maps of `grid`; for others they are resized, bilinearly, at every call.

    Args:
        class_slot: the first embedding is a class token's, not a position's.
        class_token: put a class token before the positions, in row order: (B, H, W, C) -> (B, 1, 1 + H * W, C).
    """

    def __init__(self, dim: int, grid: tuple[int, int], *, class_slot: bool = False, class_token: bool = False):
        super().__init__()
        self.grid, self.class_slot = grid, class_slot
        self.pos_embed = nn.Parameter(torch.empty(1, class_slot + grid[0] * grid[1], dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.cls_token: nn.Parameter | None = None
        if class_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        embedding = self.pos_embed[:, 1:] if self.class_slot else self.pos_embed
        x = x + resize_embedding(embedding, self.grid, (H, W)).reshape(1, H, W, C)
        if self.cls_token is None:
            return x
        token = (self.cls_token + self.pos_embed[:, :1]).expand(B, 1, C)
        return torch.cat((token.to(x.dtype), x.flatten(1, 2)), 1).unsqueeze(1)

    def resample(self, state: dict[str, Tensor], prefix: str) -> None:
        """Resizes embeddings made for another, square, map."""
        key = prefix + 'pos_embed'
        if key not in state or state[key].shape == self.pos_embed.shape:
            return
        slot, places = state[key][:, : self.class_slot], state[key][:, self.class_slot :]
        side = round(places.shape[1] ** 0.5)
        if places.shape[1] == side**2:
            state[key] = torch.cat((slot, resize_embedding(places, (side, side), self.grid)), 1)


def resize_embedding(embedding: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Embeddings (1, N, C) of the positions of `grid` as those of `size`."""
    if resize.same_size(size, grid):
        return embedding
    resized = resize.resize_table(embedding[0].unflatten(0, grid), size, 'bilinear')
    return resized.flatten(0, 1)[None].to(embedding.dtype)


class LITTi(MergingPyramid):
    """MLPs alone in two stages, attention before them in the next two; learned positions in each stage.

    The classifier reads a class token that joins the last stage. There the map is (B, 1, 1 + N, C): the class token,
    then the positions in row order; attention and MLPs do not care for its shape. The dense form has no class token, so
    its last map is not the classifier's.

    Args:
        depths, dims: blocks and channels of each stage.
        num_heads, mlp_ratios: attention heads and width of the MLPs over that of the stage, one for all stages or one
            per stage.
        norm: normalisation of blocks and classifier, by name.
        img_size: height and width that position embeddings are made for, 224 if None.
        The others: see `Hierarchical.assemble`.
    """

    sizes = Resampled(how='position embeddings are resized bilinearly')
    new_in_dense = ()
    classifier_keys = ('norm.', 'head.', 'downsample_layers.3.1.cls_token')
    same_maps_in_dense = False
    reduced: ClassVar[dict[str, Any]] = {
        'depths': (1, 1, 2, 1),
        'dims': (32, 64, 96, 128),
        'num_heads': (1, 2, 3, 4),
        'mlp_ratios': 2.0,
        'img_size': 64,
    }

    def __init__(
        self,
        *,
        depths: Sequence[int] = (3, 4, 6, 3),
        dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: int | Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: float | Sequence[float] = (8, 8, 4, 4),
        norm: str = 'layer',
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] | None = None,
        features_only: bool = False,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
    ):
        super().__init__()
        depths, dims = check_stages(depths, dims)
        ratios = per_stage('mlp_ratios', mlp_ratios)
        heads = [resolve_heads(dim, n) for dim, n in zip(dims, per_stage('num_heads', num_heads))]
        maps = [grid_of(img_size, stride) for stride in self.strides]
        make_norm, stem_norm = norm_factory(norm), norm_factory('layer_eps5')
        stem = ConvDownsample(in_chans, dims[0], kernel=4, stride=4, padding=0, post_norm=stem_norm, image=True)
        reductions = [stem, *(DeformableMerging(a, b) for a, b in itertools.pairwise(dims))]
        last = len(dims) - 1
        self.assemble(
            dims=dims,
            downsamplings=[
                nn.Sequential(
                    reduction,
                    Position(dim, grid, class_slot=s == last, class_token=s == last and not features_only),
                )
                for s, (reduction, dim, grid) in enumerate(zip(reductions, dims, maps))
            ],
            stages=build_stages(
                depths=depths,
                dims=dims,
                mixers=[None, None]
                + [dict(name='attention', head_dim=dims[s] // heads[s], bias=True) for s in range(2, last + 1)],
                grids=maps,
                norm=make_norm,
                mlp=lambda stage: Mlp(dim=dims[stage], ratio=ratios[stage]),
                drop_path_rate=drop_path_rate,
            ),
            output_norm=None,
            norm=make_norm,
            head='linear',
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            features_only=features_only,
            out_indices=out_indices,
        )
        self.apply(self.init_weights)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, 1, 1 + N): the last stage's class token, then its positions in row order; in dense form its map."""
        return super().forward_intermediates(x, 1)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K) of `forward_features`' class token; with `pre_logits` what enters the last layer."""
        self._require_classifier('forward_head')
        return self.head(self.norm(x[:, :, 0, 0]), pre_logits=pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Any:
        """As `Hierarchical.forward_intermediates`; the last stage's map is without the class token."""
        result = super().forward_intermediates(x, indices, norm, stop_early, output_fmt, intermediates_only)
        last = len(self.stages) - 1
        wanted = normalise_indices(last + 1 if indices is None else indices, last + 1)
        if not self.features_only and wanted[-1] == last:
            maps = result if intermediates_only else result[1]
            axis = 2 if output_fmt == 'NCHW' else 1  # of length 1, before the tokens
            size = [ceil_div(n, self.strides[-1]) for n in x.shape[-2:]]
            maps[-1] = maps[-1].squeeze(axis).narrow(axis, 1, size[0] * size[1]).unflatten(axis, size)
        return result

    def no_weight_decay(self) -> set[str]:
        """The class token."""
        return {name for name, _ in self.named_parameters() if name.endswith('.cls_token')}

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names, which number stages from 1."""
        return rename(state, _RENAMES)


_RENAMES = [
    (r'patch_embed1\.proj\.', 'downsample_layers.0.0.conv.'),
    (r'patch_embed1\.norm\.', 'downsample_layers.0.0.post_norm.'),
    *((rf'patch_embed{s + 1}\.', f'downsample_layers.{s}.0.') for s in range(1, 4)),
    *((rf'pos_embed{s + 1}$', f'downsample_layers.{s}.1.pos_embed') for s in range(4)),
    (r'cls_token$', 'downsample_layers.3.1.cls_token'),
    *((rf'block{s + 1}\.(\d+)\.attn\.', rf'stages.{s}.\1.token_mixer.') for s in range(4)),
    *((rf'block{s + 1}\.', f'stages.{s}.') for s in range(4)),
]


register(
    'lit_ti',
    LITTi,
    depths=(3, 4, 6, 3),
    dims=(64, 128, 320, 512),
    num_heads=(1, 2, 5, 8),
    mlp_ratios=(8, 8, 4, 4),
    drop_path=0.1,
    weights=[
        weights(
            'ziplab_in1k',
            URL + 'lit_ti.pth',
            top1=81.1,
            params=19.9,
            macs=3.6,
            first_conv='downsample_layers.0.0.conv',
            **PAPER,
        )
    ],
)
