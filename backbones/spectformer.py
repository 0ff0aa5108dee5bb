"""SpectFormer: Frequency and Attention is what you need in a Vision Transformer, arXiv 2304.06446; hierarchical models,
and plain ones, which are GFNet's with attention in the last blocks (`PlainGFNet`).

Written from the paper and the facts of the authors' code, https://github.com/badripatro/SpectFormers (no licence
stated; no weights published). Differs: other sizes than the one that filters were made for are taken, by interpolating
them as GFNet's authors do; training does not mix tokens and returns what evaluation returns. The authors' code gives
all plain models 6 heads, which runs for 384 channels alone, beside a remark of 4 for the tiny and 12 for the base one:
ours have 64 channels each, 4, 6 and 8 heads. The authors published no dense form: the hierarchical one has the
classifier's norms after stages 1 to 3 and a new one after the last.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gfnet import PlainGFNet
from .layers import (
    ConvDownsample,
    ConvMlp,
    MetaFormerBlock,
    Mlp,
    build_mixer,
    drop_path_schedule,
    mixer,
    norm_factory,
)
from .layers.grid import grid_of, to_last
from .layers.heads import NoHead
from .layers.linear import Linear
from .layers.norm import NormFactory
from .registry import register, weights
from .sizes import Resampled
from .skeleton import Hierarchical, check_stages, per_stage, rename


# B batch, C channels, H W size of the current stage, N = H * W, K classes, h heads, d head width
@mixer('biased_attention')
class Attention(nn.Module):
    """Self-attention between all positions, without position encoding; every layer has a bias."""

    def __init__(self, *, dim: int, num_heads: int | None = None):
        super().__init__()
        self.num_heads = max(dim // 32, 1) if num_heads is None else num_heads
        if self.num_heads < 1 or dim % self.num_heads:
            raise ValueError(f'num_heads must divide the channels, got {num_heads=}, {dim=}')
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, 2 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        return self.attend(x.reshape(B, H * W, C), x.reshape(B, H * W, C)).reshape(B, H, W, C)

    def attend(self, queries: Tensor, x: Tensor) -> Tensor:
        """Attention of (B, M, C) to (B, N, C)."""
        B, _, C = x.shape
        query = self.q(queries).reshape(B, -1, self.num_heads, C // self.num_heads).transpose(1, 2)
        key, value = self.kv(x).reshape(B, -1, 2, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).reshape(B, -1, C))


class Stem(nn.Module):
    """A 7x7 convolution with stride 2, two 3x3 ones, each with BatchNorm and ReLU, then one with stride 2."""

    def __init__(self, in_chans: int, hidden: int, dim: int, *, norm: NormFactory):
        super().__init__()
        self.conv = nn.Sequential()
        for kernel, stride, width in ((7, 2, in_chans), (3, 1, hidden), (3, 1, hidden)):
            self.conv.append(nn.Conv2d(width, hidden, kernel, stride, kernel // 2, bias=False))
            self.conv.append(nn.BatchNorm2d(hidden))
            self.conv.append(nn.ReLU(inplace=True))
        self.proj = nn.Conv2d(hidden, dim, 3, 2, 1)
        self.norm = norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(to_last(self.proj(self.conv(x))))


class ClassBlock(nn.Module):
    """A class token, at first the mean of (B, N, C), that attends to itself and them; (B, 1 + N, C)."""

    def __init__(self, *, dim: int, num_heads: int | None, norm: NormFactory, mlp_ratio: float):
        super().__init__()
        self.norm1, self.norm2 = norm(dim), norm(dim)
        self.attn = Attention(dim=dim, num_heads=num_heads)
        self.mlp = Mlp(dim=dim, ratio=mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        token = x.mean(1, keepdim=True)
        normed = self.norm1(torch.cat((token, x), 1))
        token = token + self.attn.attend(normed[:, :1], normed)
        token = token + self.mlp(self.norm2(token))
        return torch.cat((token, x), 1)


class TokenLabelHead(nn.Module):
    """Logits of the class token, plus half the largest logits of any position from a classifier of their own.

    Args:
        token_label: have the second classifier.
    """

    last: ClassVar[str] = 'cls'

    def __init__(self, dim: int, num_classes: int, drop_rate: float, *, token_label: bool):
        super().__init__()
        self.hidden_size = dim
        self.drop = nn.Dropout(drop_rate)
        self.cls = Linear(dim, num_classes)
        self.aux = Linear(dim, num_classes) if token_label else None

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Of (B, 1 + N, C), the class token first."""
        token = x[:, 0]
        if pre_logits:
            return token
        logits = self.cls(self.drop(token))
        return logits if self.aux is None else logits + 0.5 * self.aux(x[:, 1:]).amax(1)


class SpectFormer(Hierarchical):
    """Global filters in the first stages, attention in the last ones, MLPs with a depthwise convolution.

    Args:
        depths, dims: blocks and channels of each stage.
        mixers: token mixer by name or dict(name=..., option=...), one for all stages or one per stage.
        num_heads: of attention, one number for all stages or one per stage; None for 32 channels each.
        mlp_ratios: width of the MLPs over that of the stage, one for all stages or one per stage.
        norm, embedding_norm: normalisation of the blocks and after them, and after the embeddings, by name.
        stem_dim: channels inside the stem.
        token_label: a second classifier, of positions, that was trained by token labelling.
        img_size: height and width that filters are made for, 224 if None.
        The others: see `Hierarchical.assemble`.
    """

    sizes = Resampled(how='filters bicubically between frequencies')
    classifier_keys = ('norm.', 'head.', 'class_block.')
    reduced = {**Hierarchical.reduced, 'num_heads': (1, 2, 3, 4), 'stem_dim': 16}

    def __init__(
        self,
        *,
        depths: Sequence[int] = (3, 4, 6, 3),
        dims: Sequence[int] = (64, 128, 320, 448),
        mixers: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] = (
            'global_filter',
            'global_filter',
            'biased_attention',
            'biased_attention',
        ),
        num_heads: int | Sequence[int] | None = None,
        mlp_ratios: float | Sequence[float] = (8.0, 8.0, 4.0, 4.0),
        norm: str = 'layer',
        embedding_norm: str = 'layer_eps5',
        stem_dim: int = 32,
        token_label: bool = True,
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
        heads, ratios = per_stage('num_heads', num_heads), per_stage('mlp_ratios', mlp_ratios)
        make_norm, make_embedding_norm = norm_factory(norm), norm_factory(embedding_norm)
        stages: list[list[nn.Module]] = []
        for s, (dim, stride, spec, rates) in enumerate(
            zip(dims, self.strides, per_stage('mixers', mixers), drop_path_schedule(depths, drop_path_rate))
        ):
            if spec == 'biased_attention':
                spec = dict(name=spec, num_heads=heads[s])
            grid = grid_of(img_size, stride)
            stages.append(
                [
                    MetaFormerBlock(
                        dim=dim,
                        norm=make_norm,
                        mixer=build_mixer(spec, dim=dim, grid=grid),
                        mlp=ConvMlp(dim=dim, ratio=ratios[s]),
                        drop_path=rate,
                    )
                    for rate in rates
                ]
            )
            if s < 3:
                stages[s].append(make_norm(dim))
        self.assemble(
            dims=dims,
            downsamplings=[
                Stem(in_chans, stem_dim, dims[0], norm=make_embedding_norm),
                *(
                    ConvDownsample(a, b, kernel=3, stride=2, padding=1, post_norm=make_embedding_norm)
                    for a, b in itertools.pairwise(dims)
                ),
            ],
            stages=stages,
            output_norm=None,
            norm=make_norm,
            head=lambda dim, num_classes, drop: TokenLabelHead(dim, num_classes, drop, token_label=token_label),
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            features_only=features_only,
            out_indices=out_indices,
        )
        if not features_only:
            self.class_block = ClassBlock(dim=dims[-1], num_heads=heads[-1], norm=make_norm, mlp_ratio=ratios[-1])
        elif 3 in self.out_indices:
            self.output_norms = nn.ModuleDict({'3': make_norm(dims[-1])})
        else:
            self.absent_keys += ('output_norms.3.',)
        self.apply(self.init_weights)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K) of `forward_features`' map; with `pre_logits` the class token."""
        self._require_classifier('forward_head')
        x = self.norm(self.class_block(x.flatten(2).transpose(1, 2)))
        return x[:, 0] if isinstance(self.head, NoHead) else self.head(x, pre_logits=pre_logits)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """As the skeleton's; the class block learns with the last block."""
        groups = super().group_matcher(coarse)
        groups['blocks'].append((r'^class_block\.', (99999,)))
        return groups

    def init_weights(self, module: nn.Module) -> None:
        """Linear layers as usual; convolutions normal with the variance 2 / fan_out, as the authors'."""
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:
            super().init_weights(module)

    @classmethod
    def convert(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' names; a stage's norm is the last of its modules here."""
        depths = [len({key.split('.')[1] for key in state if key.startswith(f'block{s + 1}.')}) for s in range(4)]
        if not any(depths):
            return state
        norms = [(rf'norm{s + 1}\.', f'stages.{s}.{depths[s]}.') for s in range(3)]
        return rename(state, [*norms, *_RENAMES])


_RENAMES = [
    (r'norm4\.', 'norm.'),
    (r'head\.', 'head.cls.'),
    (r'aux_head\.', 'head.aux.'),
    (r'post_network\.0\.', 'class_block.'),
    (r'patch_embed1\.', 'downsample_layers.0.'),
    *((rf'patch_embed{s + 1}\.proj\.', f'downsample_layers.{s}.conv.') for s in range(1, 4)),
    *((rf'patch_embed{s + 1}\.norm\.', f'downsample_layers.{s}.post_norm.') for s in range(1, 4)),
    *((rf'block{s + 1}\.(\d+)\.attn\.', rf'stages.{s}.\1.token_mixer.') for s in range(4)),
    *((rf'block{s + 1}\.(\d+)\.mlp\.dwconv\.dwconv\.', rf'stages.{s}.\1.mlp.dwconv.') for s in range(4)),
    *((rf'block{s + 1}\.', f'stages.{s}.') for s in range(4)),
]

_PAPER: dict[str, Any] = {
    'paper': 'https://arxiv.org/abs/2304.06446',
    'origin': 'https://github.com/badripatro/SpectFormers',
    'licence': 'none stated',
    'crop_pct': 0.875,
    'classifier': 'head.cls',
    'first_conv': 'downsample_layers.0.conv.0',
}

_PLAIN: dict[str, Any] = {**_PAPER, 'classifier': 'head', 'first_conv': 'patch_embed.conv'}

# the README gives xs 22 million parameters, the authors' log and code 20.0; tiny and xs train without stochastic depth
register(
    'spectformer_ti',
    PlainGFNet,
    dim=256,
    filter_blocks=4,
    num_heads=4,
    weights=[weights('in1k', None, top1=76.9, params=9, macs=1.8, **_PLAIN)],
)
register(
    'spectformer_xs',
    PlainGFNet,
    dim=384,
    filter_blocks=4,
    num_heads=6,
    weights=[weights('in1k', None, top1=80.2, params=20.0, macs=4.0, **_PLAIN)],
)
register(
    'spectformer_s',
    PlainGFNet,
    depth=19,
    dim=384,
    filter_blocks=4,
    num_heads=6,
    drop_path=0.15,
    weights=[weights('in1k', None, top1=81.7, params=32, macs=6.6, **_PLAIN)],
)
register(
    'spectformer_b',
    PlainGFNet,
    depth=19,
    dim=512,
    filter_blocks=4,
    num_heads=8,
    drop_path=0.25,
    weights=[weights('in1k', None, top1=82.1, params=57, macs=11.5, **_PLAIN)],
)
register(
    'spectformer_h_s',
    SpectFormer,
    depths=(3, 4, 6, 3),
    dims=(64, 128, 320, 448),
    num_heads=(2, 4, 10, 14),
    drop_path=0.1,
    weights=[weights('in1k', None, top1=84.3, params=22.2, macs=3.9, **_PAPER)],
)
register(
    'spectformer_h_b',
    SpectFormer,
    depths=(3, 4, 12, 3),
    dims=(64, 128, 320, 512),
    num_heads=(2, 4, 10, 16),
    stem_dim=64,
    drop_path=0.1,
    weights=[weights('in1k', None, top1=85.0, params=33.1, macs=6.3, **_PAPER)],
)
register(
    'spectformer_h_l',
    SpectFormer,
    depths=(3, 6, 18, 3),
    dims=(96, 192, 384, 512),
    num_heads=(3, 6, 12, 16),
    stem_dim=64,
    drop_path=0.3,
    weights=[weights('in1k', None, top1=85.7, params=54.7, macs=12.7, **_PAPER)],
)
