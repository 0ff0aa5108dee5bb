"""Without this, weights could land in the wrong place in silence, or a file could execute code."""

import argparse
import logging
import os
import pickle
import re

import pytest
import torch

from densezoo.backbones import create_model, load_checkpoint

SMALL = {'depths': (1, 1, 1, 1), 'dims': (16, 16, 32, 32), 'num_classes': 7}


def model_and_state(name='poolformer_s12', **overrides):
    model = create_model(name, **{**SMALL, **overrides})
    return model, {key: torch.rand_like(value) for key, value in model.state_dict().items()}


def authors_names(state):
    """A PoolFormer state dict as its authors write it: their names, MLPs as 1x1 convolutions."""
    out = {}
    for key, value in state.items():
        parts = key.split('.')
        if key.startswith('downsample_layers.'):
            place = 'patch_embed' if parts[1] == '0' else f'network.{2 * int(parts[1]) - 1}'
            key = f'{place}.proj.{parts[-1]}'
        elif key.startswith('stages.'):
            rest = re.sub(r'layer_scale(\d)\.scale', r'layer_scale_\1', '.'.join(parts[3:]))
            key = f'network.{2 * int(parts[1])}.{parts[2]}.{rest}'
            value = value[..., None, None] if value.ndim == 2 else value
        elif key.startswith('output_norms.'):
            key = f'norm{2 * int(parts[1])}.{parts[-1]}'
        out[key] = value
    return out


@pytest.mark.parametrize('features_only', [False, True])
def test_authors_names_and_ours(features_only):
    model, state = model_and_state(features_only=features_only)
    theirs = authors_names(state)
    assert theirs.keys() != state.keys() and 'network.6.0.mlp.fc1.weight' in theirs
    for source in (theirs, state):
        for parameter in model.parameters():
            parameter.data.zero_()
        load_checkpoint(model, source)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    'wrap',
    [
        lambda s: {'state_dict': s, 'epoch': 1},
        lambda s: {'model': s, 'args': argparse.Namespace(lr=0.1)},
        lambda s: {f'module.{k}': v for k, v in s.items()},
        lambda s: {'model': {}, 'state_dict_ema': s},
        lambda s: {
            'state_dict': {**{f'backbone.{k}': v for k, v in s.items()}, 'head.weight': torch.ones(3)},
            'meta': {},
        },
    ],
    ids=['state_dict', 'namespace', 'parallel', 'averaged', 'detector'],
)
def test_containers(wrap, tmp_path):
    model, state = model_and_state()
    torch.save(wrap(state), tmp_path / 'file.pth')
    load_checkpoint(model, tmp_path / 'file.pth')
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_safetensors(tmp_path):
    from safetensors.torch import save_file

    model, state = model_and_state()
    save_file(state, tmp_path / 'file.safetensors')
    load_checkpoint(model, tmp_path / 'file.safetensors')
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class Attack:
    """Unpickling it would run a command."""

    def __reduce__(self):
        return os.system, ('touch executed',)


@pytest.mark.parametrize('zipped', [True, False])
def test_untrusted_files_execute_nothing(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    model, state = model_and_state()
    torch.save({'state_dict': state, 'x': Attack()}, 'attack.pth', _use_new_zipfile_serialization=zipped)
    (tmp_path / 'raw.pth').write_bytes(pickle.dumps(Attack(), protocol=2))
    for file in ('attack.pth', 'raw.pth'):
        with pytest.raises(ValueError, match=r'holds the class (posix|nt)\.system; only tensors') as caught:
            load_checkpoint(model, file)
        assert '\n' not in str(caught.value)
    assert not (tmp_path / 'executed').exists()


def test_foreign_class_is_named(tmp_path):
    from collections import Counter
    from pathlib import PurePosixPath

    model, state = model_and_state()
    torch.save({'state_dict': state, 'path': PurePosixPath('a')}, tmp_path / 'f.pth')
    with pytest.raises(ValueError, match=r'f\.pth holds the class pathlib\.\w*\.?PurePosixPath'):
        load_checkpoint(model, tmp_path / 'f.pth')
    torch.save({'state_dict': state, 'count': Counter('ab')}, tmp_path / 'g.pth')
    load_checkpoint(model, tmp_path / 'g.pth')  # PyTorch itself allows this one


def test_damaged_missing_and_empty_files(tmp_path):
    model, state = model_and_state()
    with pytest.raises(FileNotFoundError, match=r'no such checkpoint file: .*nothing\.pth'):
        load_checkpoint(model, tmp_path / 'nothing.pth')
    torch.save(state, tmp_path / 'whole.pth')
    whole = (tmp_path / 'whole.pth').read_bytes()
    (tmp_path / 'cut.pth').write_bytes(whole[: len(whole) // 2])
    (tmp_path / 'text.pth').write_text('not weights')
    (tmp_path / 'empty.pth').write_bytes(b'')
    for file in ('cut.pth', 'text.pth', 'empty.pth'):
        with pytest.raises(ValueError, match=rf'{file} is not a PyTorch checkpoint') as caught:
            load_checkpoint(model, tmp_path / file)
        assert '\n' not in str(caught.value)
    with pytest.raises(ValueError, match='holds no state dict'):
        load_checkpoint(model, {'epoch': 3})


def test_strict_names_the_keys(caplog):
    model, state = model_and_state()
    wrong = dict(state)
    del wrong['stages.1.0.norm1.weight']
    wrong['stages.9.0.extra'] = torch.ones(1)
    wrong['stages.0.0.mlp.fc1.bias'] = torch.ones(3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_checkpoint(model, wrong)
    assert str(caught.value) == (
        'the state dict does not fit poolformer_s12: missing: stages.1.0.norm1.weight; unexpected: stages.9.0.extra; '
        'of another shape: stages.0.0.mlp.fc1.bias (3,) instead of (64,)'
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # nothing half loaded
    load_checkpoint(model, wrong, strict=False)
    assert torch.equal(model.state_dict()['stages.2.0.mlp.fc1.weight'], state['stages.2.0.mlp.fc1.weight'])
    assert 'not loaded, missing: stages.1.0.norm1.weight' in caplog.text and len(caplog.records) == 1


def test_dense_form_forgives_only_what_it_lacks(caplog):
    model = create_model('poolformer_s12', features_only=True, out_indices=(0, 1), **SMALL)
    _, state = model_and_state()
    with caplog.at_level(logging.INFO, 'densezoo'):
        load_checkpoint(model, state)
    assert len(caplog.records) == 1
    assert 'head.weight' in caplog.text and 'stages.3.*' in caplog.text and 'output_norms.1.weight' in caplog.text
    del state['stages.0.0.norm1.weight']
    state['heads.weight'] = torch.ones(2)
    with pytest.raises(ValueError, match=r'dense form\): missing: stages\.0\.0\.norm1\.weight; .*: heads\.weight'):
        load_checkpoint(model, state)


def test_computed_entries_are_never_loaded():
    model, state = model_and_state()
    load_checkpoint(
        model,
        {
            **state,
            'stages.0.0.token_mixer.relative_position_index': torch.zeros(4),
            'stages.0.0.attn_mask': torch.zeros(2),
        },
    )


def test_other_classes_and_channels(caplog):
    _, state = model_and_state('caformer_s18')
    model = create_model('caformer_s18', **{**SMALL, 'num_classes': 4}, in_chans=4)
    kept = model.head.fc2.weight.clone()
    with caplog.at_level(logging.INFO, 'densezoo'):
        load_checkpoint(model, state)
    assert len(caplog.records) == 1 and 'head.fc2 not loaded: 7 classes instead of 4' in caplog.text
    assert torch.equal(model.head.fc2.weight, kept) and torch.equal(model.head.fc1.weight, state['head.fc1.weight'])
    first = model.downsample_layers[0].conv.weight
    assert first.shape[1] == 4 and torch.equal(first[:, 0], first[:, 3])
