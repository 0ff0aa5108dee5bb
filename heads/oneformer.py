"""OneFormer (Jain et al. 2022, One Transformer to Rule Universal Image Segmentation, arXiv:2211.06220): a task token
conditions the queries, so that one model trained once answers semantically, by instances and panoptically.

Each training picture draws a task, which decides its segments; the text of its classes is contrasted with its queries.
Pixel decoder, masked attention, matching and losses are Mask2Former's.

Written from the paper and from facts of SHI-Labs/OneFormer (MIT; published weights there: COCO PQ 57.9, AP 49.0,
mIoU 67.4 with Swin-L). Targets and results: see `segments`; tokens: see `text`.
Differs: without a table of merges text is bytes (a smaller vocabulary); each different text of a batch is encoded once.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.precision import full_precision
from .mask2former import MaskHead, rename_part
from .mask2former_decoder import MaskedDecoder
from .mask2former_pixel_decoder import DeformablePixelDecoder, PixelMaps
from .mask_loss import Points, Weights
from .pyramid import FeatureInfo
from .renaming import rename
from .segments import KINDS
from .text import TextTransformer, Tokenizer, contrastive_loss
from .transformer import MLP, DecoderLayer, sine_positions
from .universal import Segments, at_least_float32

# B batch, Q queries, C width, K classes, T tasks, L predictions of the decoder, h w size of the finest map


class TaskDecoder(MaskedDecoder):
    """A masked decoder whose queries start from the task: Q - 1 copies of its token that have looked at the map for
    masks, and the token itself.

    Args:
        class_layers: layers of the transformer that makes the queries.
        dropout: in it.
        others: see MaskedDecoder.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        channels: int,
        mask_channels: int,
        num_queries: int,
        num_layers: int,
        hidden: int,
        num_heads: int,
        class_layers: int,
        dropout: float,
        num_seeds: int = 0,
        seed_classes: Sequence[int] = (),
    ):
        super().__init__(
            num_classes=num_classes,
            channels=channels,
            mask_channels=mask_channels,
            num_queries=num_queries,
            num_layers=num_layers,
            hidden=hidden,
            num_heads=num_heads,
            learnt_queries=False,
            num_seeds=num_seeds,
            seed_classes=seed_classes,
        )
        self.class_layers = nn.ModuleList(
            DecoderLayer(channels=channels, num_heads=num_heads, hidden=hidden, dropout=dropout)
            for _ in range(class_layers)
        )
        for parameter in self.class_layers.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        self.class_norm = nn.LayerNorm(channels)
        self.class_input_proj = nn.Conv2d(mask_channels, channels, 1)
        nn.init.kaiming_uniform_(self.class_input_proj.weight, a=1)
        nn.init.zeros_(self.class_input_proj.get_parameter('bias'))

    def start(self, mask_features: Tensor, task: Tensor) -> Tensor:
        """The map for masks (B, D, H, W), tokens of the tasks (B, C) -> queries (B, Q, C)."""
        task = self.decoder_norm(task)[:, None]
        height, width = mask_features.shape[-2:]
        # As published: positions are the memory, and the map is what is added to its keys.
        memory = sine_positions(height, width, self.channels, None, task.device).to(task.dtype)
        memory = memory.expand(task.shape[0], -1, -1)
        keys = self.class_input_proj(mask_features).flatten(2).transpose(1, 2)
        place = self.query_embed.weight[:-1]
        query = task.expand(-1, len(place), -1)
        for layer in self.class_layers:
            query = layer(query, place, memory, keys)
        return torch.cat([self.class_norm(query), task], 1)


class OneFormer(MaskHead):
    """Universal head on a backbone's maps that is told its task.

    Args:
        feature_info: channels and strides of the maps, finest first; at least three.
        classes: names of the K classes, for the texts.
        things, tasks: as UniversalHead; each of `tasks` costs a run of the transformer decoder at inference.
        num_queries: Q, the task's own among them.
        num_seeds: queries beside them that start from cells that look like things, see `seeds`; 0 as published.
        channels: C; mask_channels: of the map for masks.
        encoder_layers, encoder_hidden, num_levels, num_points: of the pixel decoder.
        decoder_layers, class_layers, hidden, num_heads: of the transformer decoder and of the one that makes queries.
        dropout: in the latter and in the pixel decoder.
        sub_pixel: see Mask2Former.
        merges: CLIP's file of merges, for published weights (see `text`); None: bytes.
        length: tokens of a text, and inputs of the task's MLP.
        text_channels, text_layers, text_projections: width and depth of the text transformer, and layers behind it.
        context: learnt texts, among the Q texts of a picture.
        task_scale: factor of the token ids that the task's MLP reads (1 as published: raw ids).
        class_weight, mask_weight, dice_weight, class_cost, mask_cost, dice_cost, no_object, loss_points, oversample,
            important: see Mask2Former.
        contrast_weight, temperature: of the query-text contrast.
        lr_scale: see Mask2Former.
        score_threshold, overlap_threshold, detections: decoding.
    """

    task_tokens: Tensor

    def __init__(
        self,
        *,
        feature_info: FeatureInfo,
        classes: Sequence[str],
        things: int | Sequence[int],
        num_queries: int = 150,
        num_seeds: int = 0,
        channels: int = 256,
        mask_channels: int = 256,
        num_levels: int = 3,
        encoder_layers: int = 6,
        encoder_hidden: int = 1024,
        decoder_layers: int = 9,
        class_layers: int = 2,
        hidden: int = 2048,
        num_heads: int = 8,
        num_points: int = 4,
        dropout: float = 0.1,
        sub_pixel: int = 1,
        merges: str | os.PathLike[str] | None = None,
        length: int = 77,
        text_channels: int = 256,
        text_layers: int = 6,
        text_projections: int = 2,
        context: int = 16,
        task_scale: float = 1.0,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        class_cost: float = 2.0,
        mask_cost: float = 5.0,
        dice_cost: float = 5.0,
        no_object: float = 0.1,
        loss_points: int = 12544,
        oversample: float = 3.0,
        important: float = 0.75,
        contrast_weight: float = 0.5,
        temperature: float = 0.07,
        lr_scale: float = 1.0,
        tasks: Sequence[str] = ('panoptic', 'instance', 'semantic'),
        score_threshold: float = 0.8,
        overlap_threshold: float = 0.8,
        detections: int = 100,
    ):
        super().__init__(
            feature_info=feature_info,
            num_classes=len(classes),
            things=things,
            weights=Weights(class_weight, mask_weight, dice_weight, no_object),
            costs=Weights(class_cost, mask_cost, dice_cost),
            points=Points(loss_points, oversample, important),
            tasks=tasks,
            score_threshold=score_threshold,
            overlap_threshold=overlap_threshold,
            detections=detections,
            sub_pixel=sub_pixel,
            lr_scale=lr_scale,
        )
        if not 0 <= context < num_queries:
            raise ValueError(f'context must be fewer than num_queries={num_queries}, got {context}')
        self.classes = tuple(str(name) for name in classes)
        self.num_queries, self.task_scale, self.contrast_weight = num_queries, task_scale, contrast_weight
        self.pixel_decoder = DeformablePixelDecoder(
            feature_info=self.inputs,
            channels=channels,
            mask_channels=mask_channels,
            num_levels=num_levels,
            num_layers=encoder_layers,
            hidden=encoder_hidden,
            num_heads=num_heads,
            num_points=num_points,
            dropout=dropout,
            sub_pixel=sub_pixel,
        )
        self.predictor = TaskDecoder(
            num_classes=self.num_classes,
            channels=channels,
            mask_channels=mask_channels,
            num_queries=num_queries,
            num_layers=decoder_layers,
            hidden=hidden,
            num_heads=num_heads,
            class_layers=class_layers,
            dropout=dropout,
            num_seeds=num_seeds,
            seed_classes=self.reader.things,
        )
        self.task_mlp = MLP(in_channels=length, channels=channels, out_channels=channels, depth=2)
        self.tokenizer = Tokenizer(merges, length=length)
        self.text_encoder = TextTransformer(
            vocabulary=self.tokenizer.size, channels=text_channels, num_layers=text_layers, length=length
        )
        self.text_projector = MLP(
            in_channels=text_channels, channels=channels, out_channels=channels, depth=text_projections
        )
        self.prompt_ctx = nn.Embedding(context, channels) if context else None
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        tokens = self.tokenizer([f'The task is {kind}' for kind in KINDS])
        self.register_buffer('task_tokens', tokens.float(), persistent=False)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """List of maps -> for each of `tasks`, logits of classes (B, T, Q, K + 1), no object last, and of masks
        (B, T, Q, h, w)."""
        maps = self.pixel_decoder(features)
        batch, tasks = maps.mask.shape[0], len(self.reader.tasks)
        # All tasks as one batch of the decoder: (B T, ...), a picture's tasks side by side.
        mask, *levels = (x[:, None].expand(-1, tasks, -1, -1, -1).flatten(0, 1) for x in (maps.mask, *maps.levels))
        task = self.task(self.reader.tasks)[None].expand(batch, -1, -1).flatten(0, 1)
        classes, masks, _ = self.decode(PixelMaps(mask, levels), task)
        return classes[-1].unflatten(0, (batch, tasks)), masks[-1].unflatten(0, (batch, tasks))

    def task(self, names: Sequence[str]) -> Tensor:
        """Tokens (B, C) of the tasks' names."""
        rows = self.task_tokens[[KINDS.index(name) for name in names]]
        return self.task_mlp((rows * self.task_scale).to(self.logit_scale.dtype))

    def decode(self, maps: PixelMaps, task: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Logits of classes and masks of every layer, and the queries that the layers started from (B, Q, C)."""
        fine = self.pixel_decoder.sub_pixel
        # Queries start from a look at the whole picture, for which the finest map's own cells are enough.
        start = self.predictor.start(maps.mask if fine == 1 else F.avg_pool2d(maps.mask, fine), task)
        return *self.predictor(maps.levels, maps.mask, start, start[:, -1:]), start

    def loss(self, features: Sequence[Tensor], targets: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """See `set_losses`, and 'loss_contrast'. Each picture's task is drawn with torch's generator."""
        drawn = torch.randint(len(KINDS), (len(targets),)).tolist()
        kinds = [KINDS[i] for i in drawn]
        segments = self.gather(targets, self.inputs.padded_size(features), kinds)
        classes, masks, queries = self.decode(self.pixel_decoder(features), self.task(kinds))
        losses = self.set_losses(classes, masks, segments)
        texts = self.texts(segments, kinds)
        with full_precision(queries):
            contrast = contrastive_loss(at_least_float32(queries), at_least_float32(texts), self.logit_scale)
        losses['loss_contrast'] = self.contrast_weight * contrast
        return losses

    def texts(self, segments: Segments, kinds: Sequence[str]) -> Tensor:
        """Vectors of each picture's texts (B, Q, C): one per segment in the order of classes, then the task's own, then
        the learnt ones."""
        context = 0 if self.prompt_ctx is None else len(self.prompt_ctx.weight)
        free = self.num_queries - context
        rows = []
        for labels, count, kind in zip(segments.labels.tolist(), segments.counts, kinds):
            row = [f'a photo with a {self.classes[label]}' for label in sorted(labels[:count])[:free]]
            rows.append(row + [_PHOTO[kind]] * (free - len(row)))
        different = sorted({text for row in rows for text in row})
        place = {text: i for i, text in enumerate(different)}
        device = self.logit_scale.device
        vectors = self.text_projector(self.text_encoder(self.tokenizer(different).to(device)))
        vectors = vectors[torch.tensor([[place[text] for text in row] for row in rows], device=device)]
        if self.prompt_ctx is None:
            return vectors
        return torch.cat([vectors, self.prompt_ctx.weight.expand(len(rows), -1, -1)], 1)


_PHOTO = {'semantic': 'a semantic photo', 'instance': 'an instance photo', 'panoptic': 'a panoptic photo'}

_RENAMES = (
    (r'^predictor\.class_transformer\.decoder\.layers', 'predictor.class_layers'),
    (r'^predictor\.class_transformer\.decoder\.norm', 'predictor.class_norm'),
    (r'^criterion\.logit_scale', 'logit_scale'),
    (r'^text_encoder\.transformer\.resblocks\.(\d+)\.mlp\.', r'text_encoder.blocks.\1.'),
    (r'^text_encoder\.transformer\.resblocks', 'text_encoder.blocks'),
)


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' entries of the head under our keys; those of the backbone are left out.

    Args:
        state: a published checkpoint's 'model'. Weights published for inference hold no text encoder: load them with
            strict=False.
    """
    parts = ('pixel_decoder.', 'predictor.', 'task_mlp.', 'text_encoder.', 'text_projector.', 'prompt_ctx.')
    converted = {}
    for key, value in state.items():
        key = key.removeprefix('sem_seg_head.')
        if not key.startswith(parts) and key != 'criterion.logit_scale':
            continue
        converted[rename_part(rename(key, _RENAMES))] = value
    return converted
