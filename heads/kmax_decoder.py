"""The transformer decoder of kMaX-DeepLab (Yu et al. 2022, arXiv:2207.04044): queries are cluster centres, and
cross-attention is one step of k-means. Each pixel belongs to the query of its largest mask logit, and each query gains
the sum of its pixels.

Written from the paper and from facts of bytedance/kmax-deeplab (Apache 2.0). The assignment is hard, so no gradient
passes it: the predictor of every layer is supervised instead.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_tf_
from torch import Tensor, nn

from ..kernels.precision import full_precision
from .kmax_pixel_decoder import ConvNorm, batch_norm, corners
from .pyramid import positive
from .universal import at_least_float32

# B batch, C channels, H W size of a map, Q queries, K classes, h heads, d head width

QUERY_WIDTH = 256
EMBEDDING = 128  # of pixels and mask kernels
FFN_WIDTH = 2048
VOID_PRIOR = 0.9


class Prediction(NamedTuple):
    """What one predictor says: `classes` (B, Q, K + 1) logits with void last, `masks` (B, Q, H, W) logits that compete
    over Q, `pixels` (B, 128, H, W) unit vectors."""

    classes: Tensor
    masks: Tensor
    pixels: Tensor


class Predictor(nn.Module):
    """Masks as inner products of queries and pixels; classes of the queries."""

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.pixel_space_head_conv0bnact = ConvNorm(in_channels, in_channels, 5, groups=in_channels, act=True)
        self.pixel_space_head_conv1bnact = ConvNorm(in_channels, 256, act=True)
        self.pixel_space_head_last_convbn = ConvNorm(256, EMBEDDING, bias=True, std=0.01)
        self.transformer_mask_head = ConvNorm(QUERY_WIDTH, EMBEDDING, axes=1)
        self.transformer_class_head = ConvNorm(QUERY_WIDTH, num_classes + 1, axes=1, bias=True, norm=False, std=0.01)
        self.pixel_space_mask_batch_norm = batch_norm(1)
        nn.init.constant_(self.pixel_space_mask_batch_norm.get_parameter('weight'), 0.1)

    def forward(self, mask_query: Tensor, class_query: Tensor, x: Tensor) -> Prediction:
        """Queries (B, 256, Q) and a map (B, C, H, W)."""
        x = self.pixel_space_head_conv1bnact(self.pixel_space_head_conv0bnact(x))
        pixels = F.normalize(self.pixel_space_head_last_convbn(x), dim=1)
        logits = self.transformer_class_head(class_query).transpose(1, 2)
        # A constant of the graph, not a parameter: published weights were trained with the prior added on the way.
        prior = math.log(self.num_classes * VOID_PRIOR / (1 - VOID_PRIOR))
        classes = torch.cat([logits[..., :-1], logits[..., -1:] + prior], -1)
        kernels = self.transformer_mask_head(mask_query).transpose(1, 2)
        masks = self.pixel_space_mask_batch_norm((kernels @ pixels.flatten(2))[:, None])[:, 0]
        return Prediction(classes, masks.unflatten(2, x.shape[-2:]), pixels)


class QueryAttention(nn.Module):
    """Self-attention of the queries: scores are normalised per head, not scaled; GELU of the normalised result."""

    def __init__(self, value_depth: int, num_heads: int):
        super().__init__()
        self.batch_norm_similarity = batch_norm(num_heads)
        self.batch_norm_retrieved_value = batch_norm(value_depth, 1)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, h, d, Q) each -> (B, h d, Q)."""
        scores = self.batch_norm_similarity(query.transpose(2, 3) @ key)
        weights = at_least_float32(scores).softmax(-1).to(value.dtype)
        return F.gelu(self.batch_norm_retrieved_value((value @ weights.transpose(2, 3)).flatten(1, 2)))


class KMaXLayer(nn.Module):
    """k-means update, self-attention, MLP of the queries on one map.

    Args:
        in_channels: of the map.
        num_classes: K without void.
        drop_path: rate of each of the three branches.
    """

    def __init__(self, in_channels: int, num_classes: int, *, num_heads: int = 8, drop_path: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        width, key_depth = QUERY_WIDTH, QUERY_WIDTH // 2
        self.depths = (key_depth, key_depth, width)
        self.query_conv1_bn_act = ConvNorm(width, width, axes=1, act=True)
        self.pixel_conv1_bn_act = ConvNorm(in_channels, width, act=True)
        self.query_qkv_conv_bn = ConvNorm(width, sum(self.depths), axes=1, std=width**-0.5)
        self.pixel_v_conv_bn = ConvNorm(width, width, std=width**-0.5)
        self.query_self_attention = QueryAttention(width, num_heads)
        self.query_conv3_bn = ConvNorm(width, width, axes=1, gain=0.0)
        self.query_ffn_conv1_bn_act = ConvNorm(width, FFN_WIDTH, axes=1, act=True)
        self.query_ffn_conv2_bn = ConvNorm(FFN_WIDTH, width, axes=1, gain=0.0)
        self.predictor = Predictor(width, num_classes)
        self.kmeans_query_batch_norm_retrieved_value = batch_norm(width, 1)
        self.kmeans_query_conv3_bn = ConvNorm(width, width, axes=1, gain=0.0)
        self.drop_path = DropPath(drop_path)

    def forward(self, query: Tensor, x: Tensor) -> tuple[Tensor, Prediction]:
        """Queries (B, 256, Q), map (B, C, H, W) -> queries, and what the predictor said before the update."""
        pixel_space = self.pixel_conv1_bn_act(F.gelu(x))
        query_space = self.query_conv1_bn_act(query)
        prediction = self.predictor(query_space, query_space, pixel_space)

        values = self.pixel_v_conv_bn(pixel_space).flatten(2)  # (B, C, HW)
        update = self.kmeans_query_batch_norm_retrieved_value(assign(prediction.masks.detach(), values))
        query = query + self.drop_path(self.kmeans_query_conv3_bn(update))

        # From the queries before the update, as published.
        parts = self.query_qkv_conv_bn(query_space).split(self.depths, 1)
        attended = self.query_self_attention(*(part.unflatten(1, (self.num_heads, -1)) for part in parts))
        query = F.gelu(query + self.drop_path(self.query_conv3_bn(attended)))

        hidden = self.query_ffn_conv1_bn_act(query)
        return F.gelu(query + self.drop_path(self.query_ffn_conv2_bn(hidden))), prediction


def assign(masks: Tensor, values: Tensor) -> Tensor:
    """Sum over each query's pixels: masks (B, Q, H, W), values (B, C, HW) -> (B, C, Q), in float32 at least."""
    owner = masks.flatten(2).argmax(1)  # (B, HW)
    owned = owner[:, None] == torch.arange(masks.shape[1], device=masks.device)[:, None]  # (B, Q, HW)
    with full_precision(values):
        values = at_least_float32(values)
        return values @ owned.to(values.dtype).transpose(1, 2)


class KMaXDecoder(nn.Module):
    """Layers on three maps, coarse to fine, and the last predictor on the finest map.

    Args:
        in_channels: of the decoded maps, finest first.
        depths: layers on the three coarsest maps, coarsest first.
        num_queries: Q.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        num_classes: int,
        num_queries: int = 128,
        depths: Sequence[int] = (2, 2, 2),
        drop_path: float = 0.0,
        align_corners: bool | None = None,
    ):
        super().__init__()
        coarse_first = list(in_channels)[::-1]
        if not 1 <= len(depths) <= len(coarse_first):
            raise ValueError(f'decoder_depths must name layers for 1 to {len(coarse_first)} maps, got {tuple(depths)}')
        self.depths = tuple(depths)
        self.align_corners = align_corners
        self.kmax_transformer_layers = nn.ModuleList(
            KMaXLayer(channels, num_classes, drop_path=drop_path)
            for channels, depth in zip(coarse_first, depths)
            for _ in range(depth)
        )
        self.cluster_centers = nn.Embedding(QUERY_WIDTH, positive('num_queries', num_queries))
        trunc_normal_tf_(self.cluster_centers.weight, std=1.0)
        self.class_embedding_projection = ConvNorm(QUERY_WIDTH, QUERY_WIDTH, axes=1, act=True)
        self.mask_embedding_projection = ConvNorm(QUERY_WIDTH, QUERY_WIDTH, axes=1, act=True)
        self.predictor = Predictor(coarse_first[-1], num_classes)

    def forward(self, maps: Sequence[Tensor]) -> list[Prediction]:
        """Decoded maps, finest first -> predictions at their own sizes, the last one at the finest."""
        query = self.cluster_centers.weight.expand(maps[0].shape[0], -1, -1)
        predictions = []
        layers = iter(self.kmax_transformer_layers)
        for depth, x in zip(self.depths, reversed(maps)):
            for _ in range(depth):
                query, prediction = next(layers)(query, x)
                predictions.append(prediction)
        last = self.predictor(self.mask_embedding_projection(query), self.class_embedding_projection(query), maps[0])
        return [*predictions, last]

    def resized(self, prediction: Prediction, size: Sequence[int]) -> Prediction:
        """A prediction at the size of the last one, for its loss (align_corners as published: by the height)."""
        aligned = size[0] % 2 == 1 if self.align_corners is None else self.align_corners
        return Prediction(
            prediction.classes,
            *(
                F.interpolate(x, size=tuple(size), mode='bilinear', align_corners=aligned)
                for x in (prediction.masks, prediction.pixels)
            ),
        )


class SemanticPredictor(nn.Module):
    """The auxiliary semantic branch of training, a Panoptic-DeepLab decoder (Cheng et al. 2020, arXiv:1911.10194) on
    the backbone's own maps: atrous pyramid on the coarsest, fused with those of strides 8 and 4.

    (coarse, stride 8, stride 4) -> logits (B, num_classes + 1, H, W) at stride 4, void last.
    """

    def __init__(self, coarse: int, os8: int, os4: int, num_classes: int, align_corners: bool | None = None):
        super().__init__()
        self.align_corners = align_corners
        self.aspp = AtrousPyramid(coarse, 256, align_corners=align_corners)
        self.low_level_projection_os8 = ConvNorm(os8, 64, act=True)
        self.low_level_fusion_os8_conv0_bn_act = ConvNorm(320, 320, 5, groups=320, act=True)
        self.low_level_fusion_os8_conv1_bn_act = ConvNorm(320, 256, act=True)
        self.low_level_projection_os4 = ConvNorm(os4, 32, act=True)
        self.low_level_fusion_os4_conv0_bn_act = ConvNorm(288, 288, 5, groups=288, act=True)
        self.low_level_fusion_os4_conv1_bn_act = ConvNorm(288, 256, act=True)
        self.conv_block_0 = ConvNorm(256, 256, 5, groups=256, act=True)
        self.conv_block_1 = ConvNorm(256, 256, act=True)
        self.final_conv = ConvNorm(256, num_classes + 1, bias=True, norm=False, std=0.01)

    def forward(self, coarse: Tensor, os8: Tensor, os4: Tensor) -> Tensor:
        aligned = corners(coarse, self.align_corners)
        x = self._join(self.aspp(coarse), self.low_level_projection_os8(os8), aligned)
        x = self.low_level_fusion_os8_conv1_bn_act(self.low_level_fusion_os8_conv0_bn_act(x))
        x = self._join(x, self.low_level_projection_os4(os4), aligned)
        x = self.low_level_fusion_os4_conv1_bn_act(self.low_level_fusion_os4_conv0_bn_act(x))
        return self.final_conv(self.conv_block_1(self.conv_block_0(x)))

    @staticmethod
    def _join(x: Tensor, finer: Tensor, aligned: bool) -> Tensor:
        x = F.interpolate(x, size=finer.shape[-2:], mode='bilinear', align_corners=aligned)
        return torch.cat([x, finer], 1)


class AtrousPyramid(nn.Module):
    """ASPP: a 1x1, three dilated 3x3 convolutions and the picture's mean, projected together."""

    def __init__(
        self, in_channels: int, channels: int, *, rates: Sequence[int] = (6, 12, 18), align_corners: bool | None = None
    ):
        super().__init__()
        self.align_corners = align_corners
        self.aspp_conv0 = ConvNorm(in_channels, channels, act=True)
        self.aspp_conv1, self.aspp_conv2, self.aspp_conv3 = (
            ConvNorm(in_channels, channels, 3, dilation=rate, act=True) for rate in rates
        )
        self.aspp_pool = ConvNorm(in_channels, channels, act=True)
        self.proj_conv_bn_act = ConvNorm(5 * channels, channels, act=True)
        self.proj_drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True)
        if self.training and len(x) == 1:
            # One value per channel has no variance, and PyTorch refuses it: the running statistics stand in.
            norm = self.aspp_pool.norm
            mean, variance = norm.get_buffer('running_mean'), norm.get_buffer('running_var')
            pooled = F.gelu(
                F.batch_norm(self.aspp_pool.conv(pooled), mean, variance, norm.weight, norm.bias, eps=1e-3)  # type: ignore[arg-type]
            )
        else:
            pooled = self.aspp_pool(pooled)
        branches = [self.aspp_conv0(x), self.aspp_conv1(x), self.aspp_conv2(x), self.aspp_conv3(x)]
        return self.proj_drop(self.proj_conv_bn_act(torch.cat([*branches, pooled.expand(-1, -1, *x.shape[-2:])], 1)))
