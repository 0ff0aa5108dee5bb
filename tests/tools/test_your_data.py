"""The commands of docs/your-data.md on data that the demo builder did not make: a photograph of coins, cut into tiles.
Without it the path of a user's own folder to predictions breaks unseen, since all quickstarts read the demo data."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
from scipy import ndimage

from densezoo.tools.cli import main

# Small enough for a test: a narrow backbone from scratch, few and small steps.
SMALL = [
    'model.backbone.pretrained=False',
    'model.backbone.dims=(8,16,24,32)',
    'model.backbone.depths=(1,1,1,1)',
    'train_cfg.max_iters=4',
    'param_scheduler.0.end=2',
    'param_scheduler.1.begin=2',
    'param_scheduler.1.end=4',
    'train_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False',
    'val_dataloader.num_workers=0',
]
CROP = 'train_dataloader.dataset.transforms.0.size=64'
RANGE = ['train_dataloader.dataset.transforms.0.short=96', 'val_dataloader.dataset.transforms.0.short=96']


@pytest.fixture(scope='module')
def coins(tmp_path_factory) -> Path:
    """Four tiles of the coins photograph with a COCO JSON, class masks and blurred counterparts."""
    root = tmp_path_factory.mktemp('coins')
    photo = skimage.data.coins()
    ground = cv2.morphologyEx((photo > 110).astype(np.uint8), cv2.MORPH_CLOSE, np.ones((9, 9)))
    instances, _ = ndimage.label(ndimage.binary_fill_holes(ground))
    for split, top in (('train', 0), ('val', 150)):
        images, annotations = [], []
        for number, left in enumerate((0, 190)):
            tile = (slice(top, top + 150), slice(left, left + 190))
            rgb = cv2.cvtColor(photo[tile], cv2.COLOR_GRAY2BGR)
            for folder, picture in (
                (f'images/{split}', rgb),
                (f'masks/{split}', (instances[tile] > 0).astype(np.uint8)),
                (f'{split}/target', rgb),
                (f'{split}/input', cv2.GaussianBlur(rgb, (7, 7), 2)),
            ):
                (root / folder).mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(root / folder / f'{number}.png'), picture)
            images.append(dict(id=number, file_name=f'{number}.png', height=150, width=190))
            for value in np.unique(instances[tile])[1:]:
                mask = (instances[tile] == value).astype(np.uint8)
                contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
                outline = max(contours, key=cv2.contourArea)
                x, y, width, height = cv2.boundingRect(outline)
                if min(width, height) > 12:
                    annotations.append(
                        dict(
                            id=len(annotations) + 1,
                            image_id=number,
                            category_id=7,
                            iscrowd=0,
                            area=int(mask.sum()),
                            bbox=[x, y, width, height],
                            segmentation=[outline.flatten().tolist()],
                        )
                    )
        assert len(annotations) >= 8
        (root / 'annotations').mkdir(exist_ok=True)
        (root / 'annotations' / f'instances_{split}.json').write_text(
            json.dumps(dict(images=images, annotations=annotations, categories=[dict(id=7, name='coin')]))
        )
    (root / 'classes.txt').write_text('background\ncoin\n')
    return root


@pytest.mark.parametrize(
    ('task', 'options', 'metric', 'keys'),
    [
        ('detection', ['model.head.num_classes=1', 'model.neck.out_channels=16', *RANGE], 'coco/bbox_mAP', {'boxes'}),
        pytest.param(
            'instance',
            ['model.head.num_classes=1', 'model.neck.out_channels=16', *RANGE],
            'coco/segm_mAP',
            {'boxes', 'masks'},
            marks=pytest.mark.slow,  # half a minute, for what detection and the heads' own tests go through
        ),
        (
            'segmentation',
            [
                'model.head.num_classes=2',
                'model.head.channels=16',
                'model.neck.out_channels=16',
                'train_dataloader.dataset.transforms.1.size=(64,64)',
                *RANGE,
            ],
            'mIoU',
            {'mask', 'classes'},
        ),
        ('restoration', ['model.head.channels=8', CROP], 'psnr', {'restored'}),
    ],
)
def test_train_test_and_predict(coins, tmp_path, capsys, task, options, metric, keys):
    run, out = tmp_path / 'run', tmp_path / 'predictions'
    roots = [f'{part}_dataloader.dataset.root={coins}' for part in ('train', 'val')]
    assert main(['train', f'custom/{task}', '--work-dir', str(run), '--cfg-options', *SMALL, *options, *roots]) == 0
    assert metric in json.loads((run / 'metrics.json').read_text())

    config, checkpoint = str(run / 'config.py'), str(run / 'best.pth')
    assert main(['test', config, checkpoint, '--out', str(tmp_path / 'again.json')]) == 0
    again = json.loads((tmp_path / 'again.json').read_text())
    rows = [json.loads(line) for line in (run / 'log.jsonl').read_text().splitlines()]
    validated = [row[metric] for row in rows if row['kind'] == 'val']
    assert again[metric] == pytest.approx(max(validated), abs=1e-4)

    photos = coins / 'images' / 'val'
    assert main(['predict', config, checkpoint, str(photos), '--out', str(out), '--score-threshold', '0']) == 0
    entries = json.loads((out / 'predictions.json').read_text())
    assert [Path(entry['file']).name for entry in entries] == ['0.png', '1.png']
    assert all(keys <= set(entry) and entry['size'] == [150, 190] for entry in entries)
    assert all((out / f'{number}.png').is_file() for number in (0, 1))
