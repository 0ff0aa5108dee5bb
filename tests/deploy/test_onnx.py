"""Without this an exported file could compute something else than the model, or a broken one take the place of a good
one."""

import pytest
import torch

from densezoo.backbones import create_model
from densezoo.deploy import OnnxModel, check_onnx, export_onnx, parity, read_metadata
from densezoo.deploy.onnx import count_operators, replacing


def test_parity_for_every_batch(tiny, tiny_onnx):
    model, _ = tiny
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 64, 64)
        (row,) = check_onnx(model, tiny_onnx, x)
        assert row.output == 'logits' and row.shape == (batch, 7)
        assert row.max_rel < 1e-4 and row.cosine > 0.99999


def test_parity_sees_a_difference(tiny, tiny_onnx):
    _, images = tiny
    logits = OnnxModel(tiny_onnx)(images)
    wrong = logits.clone()
    wrong[0, 0] += 1
    (row,) = parity.compare(['logits'], wrong, logits)
    assert row.max_abs == pytest.approx(1, rel=1e-4) and row.cosine < 1
    assert row.mean_abs == pytest.approx(1 / logits.numel(), rel=1e-3)
    assert '| logits | 2x7 | 1.00e+00 |' in parity.as_table([row])
    with pytest.raises(ValueError, match=r'logits has shape \(1, 7\), the model gives \(2, 7\)'):
        parity.compare(['logits'], logits[:1], logits)


def test_pyramid_with_dynamic_size(tmp_path):
    torch.manual_seed(0)
    model = create_model('poolformer_s12', features_only=True, depths=(1, 1, 1, 1), dims=(16, 16, 32, 32)).eval()
    path = export_onnx(model, torch.randn(1, 3, 64, 64), tmp_path / 'pyramid.onnx', dynamic_size=True)
    for size in ((33, 65), (128, 96)):
        rows = check_onnx(model, path, torch.randn(2, 3, *size))
        assert [row.output for row in rows] == ['output0', 'output1', 'output2', 'output3']
        assert max(row.max_rel for row in rows) < 1e-4


def test_metadata(tiny, tmp_path):
    model, images = tiny
    path = export_onnx(model, images, tmp_path / 'm.onnx', metadata={'classes': ['a', 'b'], 'precision': 'fp32'})
    found = read_metadata(path)
    assert found['classes'] == ['a', 'b'] and found['precision'] == 'fp32' and found['layout'] == 'NCHW'
    assert found['architecture'] == 'caformer_s18' and found['mean'] == [0.485, 0.456, 0.406]
    (tmp_path / 'text.onnx').write_text('no graph')
    with pytest.raises(ValueError, match=r'text\.onnx is not an ONNX file'):
        read_metadata(tmp_path / 'text.onnx')


def test_a_file_holds_no_paths_of_this_machine(tiny_onnx):
    data = tiny_onnx.read_bytes()
    assert b'MetaFormerBlock' in data and b'.py' not in data


def test_a_small_number_that_guards_a_division_survives(tmp_path):
    """Exporters' optimizers took it for zero, and 0 / 0 is not a number."""

    class Shares(torch.nn.Module):
        def forward(self, x):
            x = x.relu()
            return x / (x.sum(1, keepdim=True) + 1e-15)

    images = torch.randn(2, 3, 8, 8)
    images[:, :, :4] = -1.0
    path = export_onnx(Shares(), images, tmp_path / 'shares.onnx')
    torch.testing.assert_close(OnnxModel(path)(images), Shares()(images))


def test_static_graphs_compute_no_shapes(tmp_path):
    model = create_model('poolformer_s12', depths=(1, 1, 1, 1), dims=(16, 16, 32, 32), num_classes=3).eval()
    path = export_onnx(model, torch.randn(1, 3, 64, 64), tmp_path / 'static.onnx', dynamic_batch=False)
    counts = count_operators(path)
    assert not {'Shape', 'Gather', 'Concat', 'Range', 'Where'} & counts.keys(), counts


def test_names_must_fit(tiny, tmp_path):
    model, images = tiny
    with pytest.raises(ValueError, match=r"1 inputs and 1 outputs, got .*outputs=\['a', 'b'\]"):
        export_onnx(model, images, tmp_path / 'x.onnx', outputs=['a', 'b'])
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / 'model.onnx'
    path.write_text('old')
    with pytest.raises(OSError, match='disk full'), replacing(path) as unfinished:
        unfinished.write_text('half')
        raise OSError('disk full')
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]
    with replacing(path) as unfinished:
        unfinished.write_text('new')
    assert path.read_text() == 'new' and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match='no such folder'), replacing(tmp_path / 'none' / 'x.onnx'):
        pass
