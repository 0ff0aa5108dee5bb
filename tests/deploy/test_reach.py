"""Without this a mixer, a family or a head could land that does not deploy: the registries are walked.

By default every mixer, four at a time as the stages of one small model, and every head; `-m slow` the smallest model of
every family at its full size, and every head on two backbones. Engines are built for real, by NVIDIA's compiler.
"""

import inspect
from functools import partial

import pytest
import tiny_tasks as tasks
import torch
from torch import nn

from densezoo import heads
from densezoo.backbones import create_model
from densezoo.backbones.hornet import GnConv
from densezoo.backbones.layers import MIXERS
from densezoo.backbones.litv2 import HiLo
from densezoo.deploy import OnnxModel, build_engine, export_onnx, match_boxes
from densezoo.deploy.onnx import count_operators
from densezoo.heads import (
    ATSS,
    DETR,
    FCN,
    FPN,
    GFL,
    CascadeRCNN,
    DeepLabV3Plus,
    DeformableDETR,
    EfficientViTSeg,
    OwnRestorer,
    Restormer,
    RetinaNet,
    SegFormerHead,
    UPerNet,
)
from densezoo.tools.exports import COLUMNS, Trial, build, families, row
from densezoo.train import Detector, Preprocess, Restorer, Segmentor
from densezoo.train.deployable import Deployable, metadata

SIZE = (64, 96)
ANY = [name for name in MIXERS if name != 'random']  # random matrices are made for one size
FOURS = [ANY[i : i + 4] for i in range(0, len(ANY), 4)] + [['random']]


def of_mixers(names):
    torch.manual_seed(0)
    name = 'randformer_s12' if 'random' in names else 'caformer_s18'
    mixers = (names * 4)[:4]
    size = {'img_size': SIZE} if 'random' in names else {}
    return create_model(name, features_only=True, mixers=mixers, depths=(1,) * 4, dims=(32, 32, 64, 64), **size).eval()


def images(height=SIZE[0], width=SIZE[1]):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_every_mixer_is_tried():
    assert {name for four in FOURS for name in four} == MIXERS.keys() and len(MIXERS) > 20


@pytest.mark.parametrize('names', FOURS, ids='-'.join)
def test_mixers(names, tmp_path):
    trial = Trial(of_mixers(names), images(), tmp_path)
    assert trial.onnx().startswith('yes') and trial.engine().startswith('yes')
    assert trial.fp16().startswith('yes')


@pytest.mark.parametrize('name', ['poolformer_s12', 'swin_tiny_patch4_window7_224'])
def test_batch_and_size_in_one_profile(name, tmp_path):
    trial = Trial(build(name, reduced=True), images(), tmp_path)
    assert trial.dynamic_size([(256, 320), (70, 97)]).startswith('yes')
    assert trial.engine_of_any_size().startswith('yes')


@pytest.mark.slow
@pytest.mark.parametrize('names', FOURS[:-1], ids='-'.join)
def test_mixers_at_any_size(names, tmp_path):
    names = [name for name in names if name != 'multipole']  # its least size depends on its levels: Mano states it
    trial = Trial(of_mixers(names), images(), tmp_path)
    assert trial.dynamic_size([(133, 97), (96, 200)]).startswith('yes')
    assert trial.engine_of_any_size().startswith('yes')


def one_stage(kind, backbone=tasks.PYRAMID):
    return Detector(backbone=backbone, neck={'type': FPN, 'out_channels': 16}, preprocess=tasks.PIXELS,
                    head={'type': kind, 'num_classes': 3, 'num_convs': 1})  # fmt: skip


def efficientvit_seg(backbone=tasks.PYRAMID):
    head = {'type': EfficientViTSeg, 'num_classes': 4, 'channels': 16, 'depth': 1}
    return Segmentor(backbone={**backbone, 'out_indices': (1, 2, 3)}, head=head, preprocess=tasks.PIXELS)


SET = {'num_classes': 3, 'channels': 32, 'num_heads': 2, 'hidden': 32, 'decoder_layers': 2, 'num_queries': 20}


def detr(backbone=tasks.PYRAMID):
    return Detector(backbone=backbone, head={'type': DETR, 'encoder_layers': 1, **SET}, preprocess=tasks.PIXELS)


def deformable_detr(backbone=tasks.PYRAMID):
    head = {'type': DeformableDETR, 'encoder_layers': 1, 'refine': True, 'two_stages': True, **SET}
    return Detector(backbone={**backbone, 'out_indices': (1, 2, 3)}, head=head, preprocess=tasks.PIXELS)


def on_maps(head, backbone, neck=None, **options):
    config = {'type': head, 'num_classes': 4, 'channels': 16, **options}
    return Segmentor(backbone=backbone, neck=neck, head=config, preprocess=tasks.PIXELS)


def upernet(backbone=tasks.PYRAMID):
    return on_maps(UPerNet, backbone, mixer={'type': GnConv, 'order': 2})


def segformer(backbone=tasks.PYRAMID):
    return on_maps(SegFormerHead, backbone, neck={'type': FPN, 'out_channels': 32, 'mixer': {'type': HiLo}})


def deeplabv3plus(backbone=tasks.PYRAMID):
    return on_maps(DeepLabV3Plus, {**backbone, 'out_indices': (0, 2)}, low_channels=8)


def fcn(backbone=tasks.PYRAMID):
    return on_maps(FCN, backbone, num_convs=2, concat_input=True)


def own_restorer():
    backbone = {'type': Restormer, **Restormer.reduced}
    return Restorer(backbone=backbone, head={'type': OwnRestorer}, preprocess={'type': Preprocess})


HEADS = {
    'LinearClassifier': tasks.classifier,
    'OwnClassifier': tasks.own_classifier,
    'RetinaNet': partial(one_stage, RetinaNet),
    'ATSS': partial(one_stage, ATSS),
    'GFL': partial(one_stage, GFL),
    'FCOS': tasks.detector,
    'DETR': detr,
    'DeformableDETR': deformable_detr,
    'RTDETR': tasks.rtdetr,
    'CascadeRCNN': partial(tasks.two_stages, kind=CascadeRCNN),
    'MaskRCNN': partial(tasks.two_stages, masks=True),
    'SemanticFPN': tasks.segmentor,
    'EfficientViTSeg': efficientvit_seg,
    'UPerNet': upernet,
    'SegFormerHead': segformer,
    'DeepLabV3Plus': deeplabv3plus,
    'FCN': fcn,
    'UNetRestorer': tasks.restorer,
    'Mask2Former': tasks.universal,
    'OneFormer': tasks.oneformer,
    'KMaXDeepLab': tasks.kmax,
    'OwnRestorer': own_restorer,
}


def test_every_head_is_tried():
    # What has a loss and no predictions, as SBCB, is never in an exported graph.
    found = [name for name in heads.__all__ if hasattr(getattr(heads, name), 'predict')]
    assert sorted(found) == sorted(HEADS) and all(issubclass(getattr(heads, name), nn.Module) for name in found)


def head_deploys(make, folder):
    torch.manual_seed(0)
    task = make().eval()
    if hasattr(task.head, 'topk'):  # nearly all candidates: which of two equal ones is kept is a matter of rounding
        task.head.topk = 3000
    model = Deployable(task).eval()
    x = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(2)) * (255 if model.normalise else 1)
    path = export_onnx(model, x, folder / 'task.onnx', outputs=model.outputs, metadata=metadata(task))
    x = torch.cat([x, x[:1].flip(-1)])
    with torch.no_grad():
        ours, expected = OnnxModel(path)(x), model(x)
    if 'boxes' in model.outputs:
        found = match_boxes(ours, expected, above=float(expected[1].max()) / 2)
        assert found.boxes > 5 and found.matched >= 0.98 * found.boxes and found.pixels < 0.1
    else:
        for a, b in zip(*(x if isinstance(x, list | tuple) else [x] for x in (ours, expected)), strict=True):
            exact = a.dtype == torch.int32
            assert (a == b).float().mean() > 0.999 if exact else (a - b).abs().max() < 1e-4 * b.abs().max()
    if getattr(task.head, 'end_to_end', False):
        operators = count_operators(path)
        assert metadata(task)['nms'] == 'none' and not operators.keys() & {'NonMaxSuppression', 'DeformConv'}
    assert build_engine(path, folder / 'task.engine', batch=(1, 4, 8))['layers'] > 10


ELSEWHERE = ('MaskRCNN',)  # test_deployable builds that engine
# Their operations are those of the heads that are tried by default; the heads' own tests export them without ONNX.
SLOW = ('ATSS', 'CascadeRCNN', 'GFL', 'DETR', 'DeformableDETR', 'UPerNet', 'SegFormerHead', 'DeepLabV3Plus', 'FCN')
SLOW += ('Mask2Former', 'OneFormer', 'KMaXDeepLab')  # graphs of a thousand nodes take their time
SLOW += ('OwnRestorer',)  # adds nothing to networks that test_restorers exports


@pytest.mark.parametrize(
    'name',
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in HEADS if name not in ELSEWHERE],
)
def test_heads(name, tmp_path):
    head_deploys(HEADS[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('backbone', ['caformer_s18', 'pvt_v2_b0'])
@pytest.mark.parametrize('name', HEADS)
def test_heads_on_two_backbones(name, backbone, tmp_path, monkeypatch):
    small = {'name': backbone, **create_model(backbone).reduced}
    for key, value in (('SMALL', small), ('PYRAMID', {'type': create_model, 'features_only': True, **small})):
        monkeypatch.setattr(tasks, key, value)
    make = HEADS[name]
    parameters = inspect.signature(make).parameters
    head_deploys(partial(make, backbone=tasks.PYRAMID) if 'backbone' in parameters else make, tmp_path)


AT_ITS_SIZE = ('onnx', 'fp16', 'engine')  # a minute each; the other cells two
OTHERWISE = ('onnx', 'fp16', 'engine fp16', 'dynamic size', 'engine of any size')  # an engine reads its ONNX file


def test_all_columns_but_int8_are_tried():
    assert {*AT_ITS_SIZE, *OTHERWISE} == {column for column in COLUMNS if 'int8' not in column}


@pytest.mark.slow
@pytest.mark.parametrize('columns', [AT_ITS_SIZE, OTHERWISE], ids=['its_size', 'sizes'])
@pytest.mark.parametrize('name', families())
def test_the_smallest_of_every_family(name, columns):
    cells = row(name, reduced=False, columns=columns)
    reasons = [cell for cell in cells.values() if not cell.startswith(('yes', 'no: its'))]
    assert cells['onnx'].startswith('yes') and not reasons, cells
