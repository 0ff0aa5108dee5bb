"""Samples to batches: lists, so that pictures of different sizes meet; mixup and cutmix for those of one size."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import mixed, seeded
from .batch import Batch
from .errors import DataError
from .transforms import TransformSpec, build


def collate(
    samples: Sequence[dict[str, Any]],
    *,
    mix: TransformSpec | Sequence[TransformSpec] | None = None,
    probability: float = 1.0,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Batch:
    """{'images': list of (3, H, W), 'targets': list of dict} from dataset samples.

    Args:
        samples: what datasets return.
        mix: None, or for classification one transform or a list of which one is drawn per batch:
            dict(type=v2.MixUp, alpha=0.2, num_classes=10), dict(type=v2.CutMix, ...).
        probability, weights, seed: of mixing, as in MixCollate.
    """
    if mix is not None:
        return MixCollate(mix=mix, probability=probability, weights=weights, seed=seed)(samples)
    batch = {'images': [sample['image'] for sample in samples], 'targets': [sample['target'] for sample in samples]}
    return Batch(batch)


class MixCollate:
    """Collate for classification with v2.MixUp and v2.CutMix; a target's `label` becomes (K,) float32 that sums to 1.

    The choice and the mixing are seeded by (seed, draw of the first sample), so they do not depend on the worker.

    Args:
        mix: one transform (or dict(type=..., ...)) on a batch of images and labels, or a list of them.
        probability: of mixing a batch at all; other batches get one-hot labels.
        weights: of the transforms in the list; equal by default.
        seed: of the draws.
    """

    def __init__(
        self,
        *,
        mix: TransformSpec | Sequence[TransformSpec],
        probability: float = 1.0,
        weights: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f'probability must lie in 0..1, got {probability=}')
        specs = list(mix) if isinstance(mix, Sequence) else [mix]
        self.transforms: list[Callable[..., Any]] = [build(spec, 'mix') for spec in specs]
        self.weights = torch.tensor(list(weights) if weights is not None else [1.0] * len(specs))
        if len(self.weights) != len(specs):
            raise ValueError(f'weights must have one number per transform, got {weights=} for {len(specs)}')
        classes = {getattr(transform, 'num_classes', None) for transform in self.transforms}
        if len(classes) != 1 or None in classes:
            raise ValueError(f'mix: every transform needs the same num_classes, got {sorted(map(str, classes))}')
        self.num_classes = int(classes.pop())  # type: ignore[arg-type]
        self.probability, self.seed = probability, seed

    def __call__(self, samples: Sequence[dict[str, Any]]) -> Batch:
        batch = collate(samples)
        images, targets = batch['images'], batch['targets']
        labels = [target.get('label') for target in targets]
        if any(not isinstance(label, int) for label in labels):
            raise DataError('mixup and cutmix need classification samples with an integer label')
        if max(labels) >= self.num_classes:
            raise DataError(
                f'label {max(labels)} of {targets[labels.index(max(labels))]["file"]} is not below '
                f'num_classes={self.num_classes} of mix'
            )
        sizes = {tuple(image.shape) for image in images}
        if len(sizes) > 1:
            raise DataError(f'mixup and cutmix need images of one size, got {sorted(sizes)}; crop them to one size')
        with seeded(self.seed, mixed(targets[0]['draw'], len(samples))):
            stack, soft = self._mixed(torch.stack(images), torch.tensor(labels))
        batch['images'] = list(stack)
        batch['targets'] = [{**target, 'label': label} for target, label in zip(targets, soft)]
        return batch

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if torch.rand(()) >= self.probability:
            return images, torch.nn.functional.one_hot(labels, self.num_classes).float()
        transform = self.transforms[int(torch.multinomial(self.weights, 1))]
        if images.dtype != torch.uint8:
            return transform(images, labels)
        stack, soft = transform(images.float(), labels)  # MixUp averages: not in uint8
        return stack.round_().clamp_(0, 255).to(torch.uint8), soft
