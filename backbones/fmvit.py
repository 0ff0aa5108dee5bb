"""FMViT: A multiple-frequency mixing Vision Transformer, arXiv 2311.05707.

The authors' repository, https://github.com/tany0699/FMViT (Apache-2.0), holds no code and there are no weights: this
is our reading of the paper, with no recorded outputs to compare with.

From the paper: a hybrid of convolutions and attention made for TensorRT and CoreML, in the sizes T, S, M, B and L; it
mixes features of high and low frequencies, of several frequencies each; its parts are convolutional multi-group
re-parameterization (gMLP), lightweight multi-head self-attention (RLMHSA) and the convolutional fusion block (CFB). Its
abstract reports 83.3 top-1 at ResNet-101's latency on TensorRT, EfficientNet-B5's accuracy 43% faster, and 78.5 top-1
at MobileOne's latency on CoreML, without naming the sizes.

Our reading:
- gMLP is a 1x1 convolution trained as a sum of 1x1 convolutions with 1, g and 2g groups, a batch norm each; it deploys
  as one dense 1x1 convolution. All channel mixing is made of it.
- CFB has two residual branches: a depthwise 5x5 convolution trained as the sum of 5x5, 3x3, 1x1 and the input,
  followed by gMLP; and an MLP of two gMLPs with a ReLU between them.
- FMB, the multiple-frequency block, splits the width into three bands: low frequencies by RLMHSA, middle ones by a
  depthwise convolution of the low band, high ones by a depthwise convolution of the input. Bands are concatenated and
  mixed by gMLP, then comes the MLP.
- RLMHSA attends on part of the width, to keys and values averaged over 4x4 (stride 8), 2x2 (stride 16) and 1x1
  (stride 32) positions; its projections are gMLPs, so no other norm is in it.
- The first stage has CFBs alone; later ones end in an FMB, the third has one after every few CFBs.
- Depths and widths, since the paper's table was not at hand: `params` are ours, not published ones.

Every norm stands behind a convolution, so `reparameterize` turns the whole network into plain convolutions, ReLU,
average pooling and attention.
"""

# B batch, C channels, H W size of the current stage, h heads, d head width
import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from .layers import BatchNorm, drop_path_schedule
from .layers.grid import to_first, to_last
from .layers.reparam import RepConv, merge_branches
from .registry import register, weights
from .skeleton import Hierarchical, check_stages, per_stage


def pointwise(in_dim: int, dim: int, groups: int) -> RepConv:
    """gMLP: a dense 1x1 convolution trained with `groups` and twice as many groups beside it, as far as they divide."""
    beside = [(1, g) for g in (groups, 2 * groups) if g > 1 and in_dim % g == 0 and dim % g == 0]
    return RepConv(in_dim, dim, branches=[(1, 1), *beside], identity=False)


def depthwise(dim: int, kernel: int) -> RepConv:
    """A depthwise convolution trained as the sum of all odd kernels up to `kernel` and the input."""
    return RepConv(dim, dim, branches=[(k, dim) for k in range(kernel, 0, -2)])


class GroupMlp(nn.Module):
    """Two gMLPs with a ReLU between them; (B, C, H, W)."""

    def __init__(self, dim: int, *, ratio: float, groups: int):
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1 = pointwise(dim, hidden, groups)
        self.fc2 = pointwise(hidden, dim, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


class RLMHSA(nn.Module):
    """Attention of all positions to keys and values averaged over `reduction` x `reduction`; (B, C, H, W).

    Args:
        in_dim: channels of the input.
        dim: channels of queries, keys, values and the output.
        num_heads: divides `dim`.
        reduction: side of the averaged squares; those at the border are cut, not padded.
        groups: of the gMLPs.
    """

    def __init__(self, in_dim: int, dim: int, *, num_heads: int, reduction: int, groups: int):
        super().__init__()
        self.num_heads, self.reduction = num_heads, reduction
        self.q = pointwise(in_dim, dim, groups)
        self.kv = pointwise(in_dim, 2 * dim, groups)
        self.proj = pointwise(dim, dim, groups)

    def forward(self, x: Tensor) -> Tensor:
        B, _, H, W = x.shape
        r, h = self.reduction, self.num_heads
        coarse = F.avg_pool2d(x, r, r, ceil_mode=True, count_include_pad=False) if r > 1 else x
        query = self.q(x).permute(0, 2, 3, 1).reshape(B, H * W, h, -1).transpose(1, 2)
        key, value = (
            self.kv(coarse).flatten(2).transpose(1, 2).unflatten(2, (2, h, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        )
        out = F.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).reshape(B, H, W, -1).permute(0, 3, 1, 2))


class FrequencyMixer(nn.Module):
    """Low, middle and high bands, concatenated and mixed; (B, C, H, W).

    Args:
        dim: channels.
        low: channels of the low band; half of the rest goes to each of the others.
        num_heads, reduction, groups: see `RLMHSA`.
        kernel: of the depthwise convolutions.
    """

    def __init__(self, dim: int, *, low: int, num_heads: int, reduction: int, groups: int, kernel: int):
        super().__init__()
        middle = (dim - low) // 2
        self.low = RLMHSA(dim, low, num_heads=num_heads, reduction=reduction, groups=groups)
        self.to_middle = pointwise(low, middle, groups)
        self.middle = depthwise(middle, kernel)
        self.to_high = pointwise(dim, dim - low - middle, groups)
        self.high = depthwise(dim - low - middle, kernel)
        self.fuse = pointwise(dim, dim, groups)

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(x)
        middle = self.middle(F.relu(self.to_middle(low)))
        high = self.high(F.relu(self.to_high(x)))
        return self.fuse(torch.cat([low, middle, high], 1))


class ConvFusion(nn.Module):
    """Depthwise convolution, then channels by gMLP; (B, C, H, W)."""

    def __init__(self, dim: int, *, groups: int, kernel: int):
        super().__init__()
        self.conv = depthwise(dim, kernel)
        self.fuse = pointwise(dim, dim, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(self.conv(x))


class Block(nn.Module):
    """CFB or FMB: a residual branch that mixes positions, then one that mixes channels; (B, H, W, C)."""

    def __init__(self, mixer: nn.Module, mlp: nn.Module, *, drop_path: float):
        super().__init__()
        self.mixer = mixer
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = to_first(x)
        x = x + self.drop_path(self.mixer(x))
        return to_last(x + self.drop_path(self.mlp(x)))


class Stem(nn.Module):
    """Two 3x3 convolutions with stride 2; (B, C, H, W) -> (B, H, W, C)."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.conv1 = RepConv(in_chans, dim // 2, branches=[(3, 1)], stride=2)
        self.conv2 = RepConv(dim // 2, dim, branches=[(3, 1), (1, 1)], stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return to_last(F.relu(self.conv2(F.relu(self.conv1(x)))))


class Downsample(nn.Module):
    """A 3x3 convolution with stride 2, trained with a 1x1 one beside it; (B, H, W, C)."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.conv = RepConv(in_dim, dim, branches=[(3, 1), (1, 1)], stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return to_last(self.conv(to_first(x)))


class FMViT(Hierarchical):
    """Convolutional fusion blocks with multiple-frequency blocks among them.

    Args:
        depths, dims: blocks and channels of each stage.
        periods: a multiple-frequency block ends every so many blocks, and the stage; 0: there is none.
        low_ratio: share of the width that multiple-frequency blocks give to attention.
        num_heads: attention heads; None for one per 32 channels of the low band.
        reductions: sides of the squares that keys and values are averaged over.
        mlp_ratio: width of the MLPs over that of the stage.
        groups: of the second branch of 1x1 convolutions, the third has twice as many; 1 leaves both out.
        kernel: odd side of the depthwise convolutions.
        img_size: not needed, any size is taken.
        The others: see `Hierarchical.assemble`.
    """

    has_golden = False
    norm_first = True
    reduced: ClassVar[dict[str, Any]] = {'depths': (1, 2, 2, 1), 'dims': (32, 32, 64, 96), 'periods': (0, 2, 2, 1)}

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (32, 64, 128, 256),
        periods: int | Sequence[int] = (0, 2, 3, 2),
        low_ratio: float = 0.5,
        num_heads: int | Sequence[int | None] | None = None,
        reductions: int | Sequence[int] = (8, 4, 2, 1),
        mlp_ratio: float = 3.0,
        groups: int = 4,
        kernel: int = 5,
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
        if not 0 < low_ratio < 1:
            raise ValueError(f'low_ratio must be between 0 and 1, got {low_ratio=}')
        if kernel < 1 or kernel % 2 == 0 or groups < 1:
            raise ValueError(f'kernel must be odd and groups positive, got {kernel=}, {groups=}')
        stages = []
        for dim, period, heads, reduction, rates in zip(
            dims,
            per_stage('periods', periods),
            per_stage('num_heads', num_heads),
            per_stage('reductions', reductions),
            drop_path_schedule(depths, drop_path_rate),
        ):
            low = int(dim * low_ratio)
            heads = max(low // 32, 1) if heads is None else heads
            if heads < 1 or (period and low % heads):
                raise ValueError(f'num_heads must divide the {low} channels of the low band, got num_heads={heads}')
            if reduction < 1 or period < 0:
                raise ValueError(f'reductions must be positive and periods not negative, got {reductions=}, {periods=}')
            blocks = []
            for b, rate in enumerate(rates):
                if period and ((b + 1) % period == 0 or b + 1 == len(rates)):
                    mixer: nn.Module = FrequencyMixer(
                        dim, low=low, num_heads=heads, reduction=reduction, groups=groups, kernel=kernel
                    )
                else:
                    mixer = ConvFusion(dim, groups=groups, kernel=kernel)
                blocks.append(Block(mixer, GroupMlp(dim, ratio=mlp_ratio, groups=groups), drop_path=rate))
            stages.append(blocks)
        self.assemble(
            dims=dims,
            downsamplings=[Stem(in_chans, dims[0]), *(Downsample(a, b) for a, b in itertools.pairwise(dims))],
            stages=stages,
            output_norm=None,
            norm=BatchNorm,
            head='linear',
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            features_only=features_only,
            out_indices=out_indices,
        )
        self.apply(self.init_weights)

    def reparameterize(self) -> nn.Module:
        """A copy in evaluation mode made of plain convolutions and attention, with equal outputs.

        The classifier's norm becomes part of its linear layer, so `forward_features` gives the map before it.
        """
        return merge_branches(self).for_deploy()


_PAPER: dict[str, Any] = {
    'paper': 'https://arxiv.org/abs/2311.05707',
    'origin': 'https://github.com/tany0699/FMViT',
    'first_conv': 'downsample_layers.0.conv1.convs.0',
    'top1': None,
    'macs': None,
}
register(
    'fmvit_t',
    FMViT,
    depths=(2, 2, 6, 2),
    dims=(48, 64, 192, 320),
    periods=(0, 2, 3, 2),
    drop_path=0.1,
    weights=[weights('untrained', None, params=6.0, **_PAPER)],
)
register(
    'fmvit_s',
    FMViT,
    depths=(3, 3, 8, 3),
    dims=(48, 128, 192, 384),
    periods=(0, 3, 4, 3),
    drop_path=0.1,
    weights=[weights('untrained', None, params=10.0, **_PAPER)],
)
register(
    'fmvit_m',
    FMViT,
    depths=(3, 3, 10, 3),
    dims=(64, 128, 256, 448),
    periods=(0, 3, 5, 3),
    drop_path=0.1,
    weights=[weights('untrained', None, params=16.1, **_PAPER)],
)
register(
    'fmvit_b',
    FMViT,
    depths=(3, 4, 15, 3),
    dims=(64, 128, 320, 512),
    periods=(0, 4, 5, 3),
    drop_path=0.1,
    weights=[weights('untrained', None, params=28.0, **_PAPER)],
)
register(
    'fmvit_l',
    FMViT,
    depths=(3, 4, 20, 3),
    dims=(96, 192, 384, 640),
    periods=(0, 4, 5, 3),
    drop_path=0.1,
    weights=[weights('untrained', None, params=49.8, **_PAPER)],
)
