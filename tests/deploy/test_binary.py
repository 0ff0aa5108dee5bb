"""Without this a binarized model could train and then not leave PyTorch: its simulated form is what is exported."""

import pytest
import torch

from densezoo.backbones import binarize, create_model
from densezoo.backbones.binary import hashes_of
from densezoo.deploy import check_onnx, export_onnx
from densezoo.tools.exports import Trial

SWIN = dict(name='swin_tiny_patch4_window7_224', num_heads=(1, 2, 2, 2), window_size=(4, 3, 2, 2))
PVT = dict(name='pvt_v2_b0', num_heads=(1, 2, 2, 2), mlp_ratios=2)
FORMS = {
    'bivit': (SWIN, 'bivit', dict(parts=('attention', 'mlp', 'merging'), residual_rank=1)),
    'ecoformer': (PVT, 'ecoformer', {}),
    'shiftadd': (PVT, 'shiftadd', dict(gate='soft')),
    'sums': (PVT, 'shiftadd', dict(attention='linear', mlp_layers='shift', form='apot')),
    'sp2': (PVT, 'shiftadd', dict(attention=None, mlp_layers='shift', form='sp2')),
}


def build(form, **overrides):
    backbone, method, settings = FORMS[form]
    torch.manual_seed(0)
    parent = create_model(**backbone, **{'features_only': True, 'dims': (16, 32, 32, 32), **overrides})
    model = binarize(parent, method, **settings).eval()
    for functions in hashes_of(model):
        functions.anchor.normal_(std=functions.anchor.shape[-1] ** -0.5)
        functions.trained.fill_(True)
    return model


def parity(model, path, *size):
    """The mean difference of the worst output over its largest magnitude.

    Not the largest difference: a sum that rounding moves across a threshold flips a bit.
    """
    rows = check_onnx(model, path, torch.randn(3, 3, *size))
    return max(row.mean_abs * row.max_rel / max(row.max_abs, 1e-12) for row in rows)


def test_a_simulated_form_exports_with_parity(tmp_path):
    model = build('bivit', depths=(2, 1, 1, 1), out_indices=(0, 1))
    path = export_onnx(model, torch.randn(2, 3, 36, 44), tmp_path / 'binary.onnx')
    assert parity(model, path, 36, 44) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize('form', FORMS)
def test_all_export_with_dynamic_size(form, tmp_path):
    model = build(form, depths=(1, 2, 1, 1))
    path = export_onnx(model, torch.randn(2, 3, 64, 96), tmp_path / f'{form}.onnx', dynamic_size=True)
    for size in ((64, 96), (75, 130)):
        assert parity(model, path, *size) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize('form', FORMS)
def test_all_become_engines(form, tmp_path):
    trial = Trial(build(form, depths=(1, 2, 1, 1)), torch.randn(2, 3, 64, 96), tmp_path)
    assert trial.onnx().startswith('yes') and trial.engine().startswith('yes')


@pytest.mark.parametrize('form', [pytest.param('bivit', marks=pytest.mark.slow), 'ecoformer', 'shiftadd', 'sums'])
def test_trains_in_one_graph(form):
    model = build(form, depths=(1, 1, 1, 1), out_indices=(0,) if form != 'bivit' else (0, 1)).train()
    x = torch.randn(2, 3, 64, 64)
    torch.manual_seed(1)
    expected = [m.detach() for m in model(x)] if form != 'shiftadd' else None  # its gates draw noise
    maps = torch.compile(model, fullgraph=True, backend='aot_eager')(x)
    sum(m.square().mean() for m in maps).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.stages.parameters())
    for ours, theirs in zip(maps, expected or maps):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
