"""Without this a student could learn from no teacher, from one that learns too, or carry it into its checkpoints."""

import copy

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from tiny_tasks import PIXELS

from densezoo.backbones import create_model
from densezoo.backbones.binary import create_binary
from densezoo.heads import LinearClassifier, OwnClassifier, SemanticFPN
from densezoo.train import DistilledClassifier, DistilledSegmentor
from densezoo.train.deployable import metadata

BACKBONE = dict(type=create_model, name='caformer_s18', num_classes=3, depths=(1, 1, 1, 1), dims=(8, 16, 32, 32))
DENSE = dict(type=create_model, name='poolformer_s12', features_only=True, depths=(1, 1, 1, 1), dims=(8, 16, 16, 16))
HEAD = dict(type=OwnClassifier, num_classes=3)


def classifier(**options):
    torch.manual_seed(0)
    options = {'backbone': BACKBONE, 'head': HEAD, 'teacher': BACKBONE, **options}
    return MODELS.build(dict(type=DistilledClassifier, preprocess=PIXELS, **copy.deepcopy(options))).train()


def batch():
    torch.manual_seed(1)
    target = dict(label=1, size=(40, 64), original_size=(40, 64), mask=torch.ones(40, 64, dtype=torch.long))
    return dict(images=[torch.randint(0, 256, (3, 40, 64), dtype=torch.uint8) for _ in range(2)], targets=[target] * 2)


def losses(task):
    return task(**task.data_preprocessor(batch(), True), mode='loss')


def test_terms_of_a_classifier_by_hand():
    task = classifier(logits=0.5, features=2.0, temperature=3.0)
    task.init_weights()
    terms = losses(task)
    images = task.data_preprocessor(batch(), True)['images']
    with torch.no_grad():
        ours, theirs = task.backbone(images) / 3, task.teacher(images) / 3
        expected = 0.5 * 9 * F.kl_div(ours.log_softmax(1), theirs.softmax(1), reduction='batchmean')
        pairs = zip(*(m.forward_intermediates(images, intermediates_only=True) for m in (task.backbone, task.teacher)))
        normalised = [[F.layer_norm(m.permute(0, 2, 3, 1), m.shape[1:2]) for m in pair] for pair in pairs]
        distance = torch.stack([(a - b).square().mean() for a, b in normalised]).mean()
    torch.testing.assert_close(terms['loss_logits'], expected)
    torch.testing.assert_close(terms['loss_features'], 2 * distance)
    assert {'loss_cls', 'loss_logits', 'loss_features', 'top1'} == terms.keys()


def test_the_teacher_stays_out_of_the_task():
    task = classifier()
    task.init_weights()
    before = copy.deepcopy(task.teacher.state_dict())
    total, _ = task.parse_losses(losses(task))
    total.backward()
    assert not any('teacher' in key for key in task.state_dict())
    count = sum(p.numel() for p in task.parameters())
    assert count == sum(p.numel() for p in task.backbone.parameters())
    assert all(p.grad is None for p in task.teacher.parameters()) and not task.teacher.training
    task.train()
    assert not task.teacher.training
    assert all(torch.equal(value, before[key]) for key, value in task.teacher.state_dict().items())
    task.eval()
    assert losses(task).keys() == {'loss_cls', 'top1'}  # a validation loss is the task's own


def test_the_student_starts_from_the_teachers_file(tmp_path):
    torch.manual_seed(5)
    trained = MODELS.build(copy.deepcopy(BACKBONE))
    torch.save({'state_dict': {f'backbone.{key}': v for key, v in trained.state_dict().items()}}, tmp_path / 'best.pth')
    binary = {**BACKBONE, 'type': create_binary, 'method': 'bivit', 'settings': {'parts': 'mlp'}}
    task = classifier(backbone=binary, checkpoint=str(tmp_path / 'best.pth'), start=True)
    task.init_weights()
    state = trained.state_dict()
    assert all(torch.equal(v, state[key]) for key, v in task.teacher.state_dict().items())
    shared = [key for key in task.backbone.state_dict() if key in state]
    assert len(shared) > 20 and all(torch.equal(task.backbone.state_dict()[key], state[key]) for key in shared)


def test_maps_of_a_dense_backbone():
    head = dict(type=SemanticFPN, num_classes=4, channels=16)
    task = MODELS.build(
        dict(type=DistilledSegmentor, backbone=DENSE, head=head, preprocess=PIXELS, teacher=DENSE, features=1.0)
    ).train()
    task.init_weights()
    total, logged = task.parse_losses(losses(task))
    total.backward()
    assert 'loss_features' in logged and 'loss_logits' not in logged


def test_exported_files_name_the_kind_of_task():
    assert metadata(classifier())['task'] == 'ImageClassifier'


def test_without_a_teacher_it_is_the_task():
    assert losses(classifier(teacher=None)).keys() == {'loss_cls', 'top1'}


def test_gates_are_balanced():
    backbone = dict(
        type=create_binary,
        name='pvt_v2_b0',
        num_classes=3,
        depths=(1, 1, 1, 1),
        dims=(8, 16, 16, 16),
        num_heads=1,
        mlp_ratios=1,
        method='shiftadd',
        settings=dict(attention=None, attention_layers='dense', gate='noisy'),
    )
    terms = losses(classifier(backbone=backbone, teacher=None, balance=0.1))
    assert terms['loss_balance'] > 0


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(logits=-1.0), ValueError, 'must not be negative'),
        (dict(temperature=0.0), ValueError, 'temperature must be positive'),
        (dict(logits=0.0), ValueError, 'a teacher needs a weight above 0 or start=True'),
        (dict(checkpoint='nowhere/best.pth'), FileNotFoundError, "teacher's weights nowhere/best.pth are not there"),
        (
            dict(teacher={**BACKBONE, 'num_classes': 4}),
            ValueError,
            'teacher and student must have the same classes',
        ),
        (
            dict(teacher={**BACKBONE, 'dims': (8, 16, 32, 48)}, logits=0.0, features=1.0),
            ValueError,
            'features of teacher and student must have equal shapes.*set features=0',
        ),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        task = classifier(**options)
        task.init_weights()
        losses(task)


def test_a_linear_classifier_on_maps_has_maps_alone():
    dense = {**DENSE, 'out_indices': (3,)}
    task = classifier(backbone=dense, teacher=dense, head=dict(type=LinearClassifier, num_classes=3), features=1.0)
    assert losses(task).keys() == {'loss_cls', 'top1', 'loss_features'}
