"""The hierarchical skeleton's own ways, seen on one small model; what every model owes is in test_contract.py."""

import pytest
import torch

from densezoo.backbones import create_model, skeleton


@torch.no_grad()
@pytest.mark.parametrize('batch', [1, 3, 7])
def test_images_at_once_change_nothing(monkeypatch, batch):
    """Inference on a CPU runs large stages some images at a time; with gradients the batch stays whole."""
    torch.manual_seed(0)
    model = create_model('poolformer_s12', features_only=True, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)).eval()
    x = torch.randn(batch, 3, 40, 52)
    whole, seen = model(x), []
    model.stages[0][0].register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    monkeypatch.setattr(skeleton, '_AT_ONCE', 2 * 10 * 13 * 8)
    for ours, expected in zip(model(x), whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert seen == {1: [1], 3: [2, 1], 7: [2, 2, 2, 1]}[batch]
    seen.clear()
    with torch.enable_grad():
        model(x)
    assert seen == [batch]
