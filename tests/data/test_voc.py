"""Without these, VOC's boxes would be off by one and its evaluation would have no ground truth."""

import json
import pathlib

import pytest
import torch

from densezoo.data import CocoDetection, DataError, VOCDetection

OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0]}</xmin>
<ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"""


@pytest.fixture
def voc(tmp_path, save, monkeypatch):
    monkeypatch.setenv('DENSEZOO_DATA', str(tmp_path / 'cache'))

    def write(**objects):
        home = tmp_path / 'VOC2007'
        for folder in ('Annotations', 'ImageSets/Main'):
            (home / folder).mkdir(parents=True, exist_ok=True)
        for name, items in objects.items():
            save(f'VOC2007/JPEGImages/{name}.jpg')
            text = ''.join(OBJECT.format(**({'difficult': 0} | item)) for item in items)
            (home / f'Annotations/{name}.xml').write_text(
                f'<annotation><size><width>80</width><height>60</height></size>{text}</annotation>'
            )
        (home / 'ImageSets/Main/train.txt').write_text('\n'.join(objects) + '\n')
        (home / 'ImageSets/Main/val.txt').write_text('\n'.join(f'{name}  1' for name in objects) + '\n')
        return tmp_path

    return write


def test_boxes_difficult_objects_and_ground_truth(voc):
    root = voc(a=[dict(name='dog', box=(1, 1, 80, 60)), dict(name='person', box=(11, 21, 30, 40), difficult=1)], b=[])
    train = VOCDetection(root=root, split='train')
    assert len(train) == 1 and train.metainfo['classes'][11] == 'dog'
    target = train[0]['target']
    assert target['boxes'].tolist() == [[0, 0, 80, 60]] and target['labels'].tolist() == [11]
    val = VOCDetection(root=root, split='val')
    assert len(val) == 2 and val[0]['target']['iscrowd'].tolist() == [0, 1]
    torch.testing.assert_close(val[0]['target']['boxes'][1], torch.tensor([10.0, 20, 30, 40]))
    stored = json.loads(pathlib.Path(val.metainfo['ann_file']).read_text())
    assert [entry['bbox'] for entry in stored['annotations']] == [[0, 0, 80, 60], [10, 20, 20, 20]]
    assert val.metainfo['category_ids'] == list(range(1, 21)) and isinstance(val, CocoDetection)
    assert VOCDetection(root=root, split='val').metainfo['ann_file'] == val.metainfo['ann_file']


def test_bad_annotations_are_named(voc):
    root = voc(a=[dict(name='dragon', box=(1, 1, 9, 9)), dict(name='dog', box=(5, 5, 20, 20))], b=[])
    (root / 'VOC2007/Annotations/b.xml').write_text('<annotation>')
    message = r"2 problems: .*a\.xml: object 'dragon' is not one of the 20 classes; .*b\.xml: is not a VOC annotation"
    with pytest.raises(DataError, match=message):
        VOCDetection(root=root)
    with pytest.warns(UserWarning, match=message):
        assert VOCDetection(root=root, on_error='skip')[0]['target']['boxes'].tolist() == [[4, 4, 20, 20]]
    with pytest.raises(DataError, match='holds no JPEGImages'):
        VOCDetection(root=root / 'VOC2007/Annotations')
