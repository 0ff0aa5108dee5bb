"""The detection data pipeline against torchvision's reference one, on the same COCO folder, with the same workers."""

from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from densezoo.data import CocoDetection, RestartableSampler, collate
from densezoo.train import Preprocess

from .timing import Comparison, compare


def _lists(samples: list[Any]) -> tuple[Any, ...]:
    return tuple(zip(*samples))


def run(
    root: str = 'demo:detection',
    *,
    batch: int = 8,
    workers: int = 2,
    batches: int = 100,
    masks: bool = False,
    repeats: int = 5,
) -> list[Comparison]:
    """Seconds per image, shuffled, with random flips, from the files to float tensors on the CPU.

    Ours goes further than the peer: normalised and stacked into one batch (torchvision leaves that to its model).
    """
    flip = [dict(type=v2.RandomHorizontalFlip, p=0.5)]
    dataset = CocoDetection(root=root, split='train', masks=masks, transforms=flip)
    images = dataset.file(0).parent
    # torchvision's references/detection, preset 'hflip' with use_v2, written with the public API.
    reference = torchvision.datasets.wrap_dataset_for_transforms_v2(
        torchvision.datasets.CocoDetection(
            str(images),
            dataset.metainfo['ann_file'],
            transforms=v2.Compose(
                [
                    v2.RandomHorizontalFlip(p=0.5),
                    v2.ToImage(),
                    v2.ToDtype(torch.float32, scale=True),
                    v2.ConvertBoundingBoxFormat('XYXY'),
                    v2.SanitizeBoundingBoxes(),
                    v2.ToPureTensor(),
                ]
            ),
        ),
        target_keys=['boxes', 'labels', 'image_id', *(['masks'] if masks else [])],
    )
    options: dict[str, Any] = dict(batch_size=batch, num_workers=workers, persistent_workers=workers > 0)
    ours = DataLoader(dataset, sampler=RestartableSampler(dataset, shuffle=True), collate_fn=collate, **options)
    peer = DataLoader(reference, shuffle=True, collate_fn=_lists, **options)
    preprocess = Preprocess(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), divisor=32)

    def stream(loader: DataLoader, use: Callable[[Any], object]) -> Callable[[], None]:
        iterator = iter(loader)

        def take() -> None:
            nonlocal iterator
            for _ in range(batches):
                try:
                    data = next(iterator)
                except StopIteration:
                    iterator = iter(loader)
                    data = next(iterator)
                use(data)

        return take

    comparison = compare(
        f'COCO samples{" with masks" if masks else ""}, {workers} workers',
        stream(ours, lambda data: preprocess(data, True)),
        stream(peer, lambda data: None),
        peer_name='torchvision reference',
        repeats=repeats,
        warmup=1,
    )
    per_image = batches * batch
    return [Comparison(comparison.name, comparison.ours / per_image, comparison.peer / per_image, comparison.peer_name)]
