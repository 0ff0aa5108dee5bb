"""Without this training with reduction consistency could teach something else than the authors' does."""

import probe
import pytest
import tiny_tasks
import torch

from densezoo.backbones import create_model, load_checkpoint, reduce_tokens
from densezoo.heads import OwnClassifier
from densezoo.train import ReducedClassifier

SMALL = {'name': 'deit_tiny_patch16_224', 'depth': 3, 'dim': 32, 'num_heads': 2, 'img_size': 64, 'num_classes': 4}
HEAD = {'type': OwnClassifier, 'num_classes': 4}


def task(backbone=None, **more):
    torch.manual_seed(0)
    backbone = {'type': create_model, **SMALL, 'reduction': {'type': 'mctf', 'r': 3}, **(backbone or {})}
    return ReducedClassifier(backbone=backbone, head=HEAD, preprocess=tiny_tasks.PIXELS, **more).train()


def batch():
    g = torch.Generator().manual_seed(2)
    return torch.randn(2, 3, 64, 64, generator=g), [{'label': 1, 'size': (64, 64)}, {'label': 2, 'size': (64, 64)}]


def test_authors_student_teacher_and_distance():
    golden = probe.load('reduction/mctf_deit_tiny')
    case = next(case for case in golden['cases'] if case['mode'] == 'train')
    model = load_checkpoint(create_model('deit_tiny_patch16_224'), probe.golden_state(golden))
    model = reduce_tokens(model, 'mctf', r=case['mctf_type'][0]).train()
    x = probe.image(case['seed'], case['shape'])
    head = {'type': OwnClassifier, 'num_classes': 1000}
    trained = ReducedClassifier(backbone=model, head=head, consistency={'r_max': case['mctf_type'][1]}).train()
    with torch.no_grad():
        probe.compare(model(x), case['outputs']['x_student'])
        student = trained._class_tokens(model.reduction.final.x)
        logits, teacher = trained._taught(x)
        probe.compare(logits, case['outputs']['x_teacher'])
        probe.compare(trained.distance(student, teacher), case['outputs']['loss_consistency'], relative=1e-3)
    assert model.reduction.schedule.amounts == (0, *[16] * 11)


@pytest.mark.parametrize('checkpointing', [False, True])
def test_losses_add_up(checkpointing):
    model = task(consistency={'r_max': 2, 'threshold': 0.0})
    model.backbone.set_grad_checkpointing(checkpointing)
    images, targets = batch()
    losses = model(images, targets, mode='loss')
    assert {'loss_cls', 'loss_teacher', 'loss_consistency'} <= losses.keys() and 'loss' not in losses
    assert all(value.isfinite() for value in losses.values()) and losses['loss_consistency'] > 0
    model.parse_losses(losses)[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.backbone.parameters())
    assert model.backbone.reduction.final is None
    unsure = task(consistency={'threshold': 1.0})(images, targets, mode='loss')
    assert unsure['loss_consistency'] == 0
    assert task()(images, targets, mode='loss').keys() == {'loss_cls', 'top1'}
    assert len(model.eval()(images, targets, mode='predict')) == 2


def test_a_methods_own_losses():
    model = task()
    model.backbone.reduction.penalties = lambda tokens: {'sparsity': tokens.x.square().mean()}
    losses = model(*batch(), mode='loss')
    assert losses['loss_sparsity'] > 0


def test_bad_settings():
    with pytest.raises(ValueError, match=r'ReducedClassifier needs a backbone with a reduction'):
        task({'reduction': None})
    with pytest.raises(ValueError, match=r'consistency compares class tokens, and the backbone has none'):
        task({'class_token': False}, consistency={})
    with pytest.raises(TypeError, match=r'consistency has no setting rmax=2; it takes r_max'):
        task(consistency={'rmax': 2})
    with pytest.raises(ValueError, match=r'consistency: weight must not be negative, got weight=-1'):
        task(consistency={'weight': -1})
