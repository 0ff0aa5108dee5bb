"""DETR: End-to-End Object Detection with Transformers (Carion et al. 2020, arXiv:2005.12872).

Written from the paper; parameters are called as in the authors' code (facebookresearch/detr, Apache-2.0) without its
prefix `transformer.`; `convert` takes the authors' names and MMDetection's. Loss: cross entropy over K + 1 classes,
L1 and GIoU of matched pairs, of every layer. Targets are torchvision's; `size` (h, w) is the valid part of a picture.
Differs: boxes without area are left out.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .pyramid import FeatureInfo, Size, positive
from .renaming import rename
from .set_prediction import SetDetector
from .transformer import MLP, DecoderLayer, EncoderLayer, padding_of, sine_positions, valid_cells

# B batch, N cells of the coarsest map, Q queries, C width, L layers


class Stack(nn.Module):
    """Layers and, where there is one, a norm."""

    def __init__(self, layers: Sequence[nn.Module], norm: nn.Module | None):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm


class DETR(SetDetector):
    """Transformer on the coarsest map; queries become boxes.

    Args:
        feature_info: channels and strides of the maps; the last one is read.
        num_classes: K; labels are 0..K-1.
        num_queries: Q, boxes that a picture can have.
        channels: C, a multiple of 4 and of num_heads.
        num_heads: of attention.
        encoder_layers, decoder_layers: how many; the encoder may have none.
        hidden: width between the two linear layers of a layer.
        dropout: in the transformer.
        pre_norm: norms before attention and linear layers.
        no_object: weight of the class "no object".
        class_weight, box_weight, giou_weight: of the losses, and of the terms of matching.
        detections, score_threshold, min_size: decoding, see SetDetector.
    """

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        num_classes: int,
        num_queries: int = 100,
        channels: int = 256,
        num_heads: int = 8,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        hidden: int = 2048,
        dropout: float = 0.1,
        pre_norm: bool = False,
        no_object: float = 0.1,
        class_weight: float = 1.0,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
        detections: int = 100,
        score_threshold: float = 0.0,
        min_size: float = 0.0,
    ):
        super().__init__(
            feature_info=feature_info,
            num_classes=num_classes,
            class_loss='softmax',
            class_weight=class_weight,
            box_weight=box_weight,
            giou_weight=giou_weight,
            class_cost=class_weight,
            box_cost=box_weight,
            giou_cost=giou_weight,
            no_object=no_object,
            detections=detections,
            score_threshold=score_threshold,
            min_size=min_size,
        )
        check_width(channels, num_heads)
        self.channels = channels
        options: dict[str, Any] = {
            'channels': channels,
            'num_heads': num_heads,
            'hidden': hidden,
            'dropout': dropout,
            'pre_norm': pre_norm,
        }
        self.input_proj = nn.Conv2d(self.inputs.channels()[-1], channels, 1)
        self.encoder = Stack(
            [EncoderLayer(**options) for _ in range(encoder_layers)], nn.LayerNorm(channels) if pre_norm else None
        )
        self.decoder = Stack(
            [DecoderLayer(**options) for _ in range(positive('decoder_layers', decoder_layers))],
            nn.LayerNorm(channels),
        )
        self.query_embed = nn.Embedding(positive('num_queries', num_queries), channels)
        self.class_embed = nn.Linear(channels, num_classes + 1)
        self.bbox_embed = MLP(in_channels=channels, channels=channels, out_channels=4, depth=3)
        for part in (self.encoder, self.decoder):
            for parameter in part.parameters():
                if parameter.ndim > 1:
                    nn.init.xavier_uniform_(parameter)

    def hidden_states(self, features: Sequence[Tensor], sizes: Sequence[Size] | None) -> list[Tensor]:
        """Queries (B, Q, C) after each layer of the decoder."""
        self.inputs.check(features)
        x = features[-1]
        height, width = x.shape[-2:]
        valid = valid_cells(sizes, self.inputs.reduction()[-1], (height, width), x.device)
        padding = padding_of(valid, height, width)
        position = sine_positions(height, width, self.channels, valid, x.device)
        memory = self.input_proj(x).flatten(2).transpose(1, 2)
        position = position.to(memory.dtype)
        for layer in self.encoder.layers:
            memory = layer(memory, position, padding)
        if self.encoder.norm is not None:
            memory = self.encoder.norm(memory)
        place = self.query_embed.weight.to(memory.dtype)[None]
        query = torch.zeros_like(place).expand(memory.shape[0], -1, -1)
        norm = self.decoder.norm
        assert norm is not None
        states = []
        for layer in self.decoder.layers:
            query = layer(query, place, memory, position, padding)
            states.append(norm(query))
        return states

    def layers(self, features: Sequence[Tensor], sizes: Sequence[Size] | None) -> tuple[Tensor, Tensor]:
        """Logits (L, B, Q, K + 1), the last one "no object", and boxes (L, B, Q, 4)."""
        return self._heads(torch.stack(self.hidden_states(features, sizes)))

    def last_layer(self, features: Sequence[Tensor], sizes: Sequence[Size] | None) -> tuple[Tensor, Tensor]:
        return self._heads(self.hidden_states(features, sizes)[-1])

    def _heads(self, states: Tensor) -> tuple[Tensor, Tensor]:
        return self.class_embed(states), self.bbox_embed(states).sigmoid()


def check_width(channels: int, num_heads: int) -> None:
    """ValueError unless positions and heads divide the width."""
    if channels % 4 or channels % positive('num_heads', num_heads):
        raise ValueError(f'channels must be a multiple of 4 and of num_heads={num_heads}, got {channels}')


_RENAMES = (
    (r'^transformer\.', ''),
    (r'^(bbox_head|neck|detr)\.', ''),
    (r'^convs\.0\.conv\.', 'input_proj.'),
    (r'\.self_attn\.attn\.', '.self_attn.'),
    (r'\.cross_attn\.attn\.', '.multihead_attn.'),
    (r'\.ffn\.layers\.0\.0\.', '.linear1.'),
    (r'\.ffn\.layers\.1\.', '.linear2.'),
    (r'\.norms\.0\.', '.norm1.'),
    (r'\.norms\.1\.', '.norm2.'),
    (r'\.norms\.2\.', '.norm3.'),
    (r'^decoder\.post_norm\.', 'decoder.norm.'),
    (r'^query_embedding\.', 'query_embed.'),
    (r'^fc_cls\.', 'class_embed.'),
    (r'^reg_ffn\.layers\.0\.0\.', 'bbox_embed.layers.0.'),
    (r'^reg_ffn\.layers\.1\.', 'bbox_embed.layers.1.'),
    (r'^fc_reg\.', 'bbox_embed.layers.2.'),
)


def convert(state: dict[str, Any]) -> dict[str, Any]:
    """The head's entries of a state dict under the authors' or MMDetection's names, renamed to ours."""
    return {rename(key, _RENAMES): value for key, value in state.items()}
