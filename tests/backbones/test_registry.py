"""Without this, names, weights and overrides could be misunderstood in silence."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import timm
import torch

from densezoo.backbones import FixedSize, create_model, list_models, load_checkpoint, metaformer, registry
from densezoo.backbones.poolformer import PoolFormer
from densezoo.backbones.registry import constructor_arguments

SMALL = {'depths': (1, 1, 1, 1), 'dims': (16, 16, 32, 32)}


def test_list_models():
    names = list_models()
    assert {
        'poolformer_s12',
        'poolformer_m48',
        'identityformer_s36',
        'randformer_m36',
        'poolformerv2_m48',
        'convformer_s18',
        'convformer_b36',
        'caformer_s36',
        'caformer_m36',
    } <= set(names)
    assert list_models('poolformer_*') == [f'poolformer_{size}' for size in ('m36', 'm48', 's12', 's24', 's36')]
    assert set(list_models(pretrained=True)) <= set(names)
    assert list_models('caformer_s18.*') == [
        f'caformer_s18.sail_in{tag}' for tag in ('1k', '1k_384', '22k', '22k_ft_in1k', '22k_ft_in1k_384')
    ]
    assert list_models('resnet*') == []


@pytest.mark.parametrize(
    ('name', 'hint'),
    [
        ('poolformer_s13', 'did you mean poolformer_s12'),
        ('Poolformer_s12', 'did you mean poolformer_s12'),
        ('resnet5', 'did you mean resnet50'),
        ('caformer_s18.sail_in1k_38', 'did you mean sail_in1k_384'),
        ('', 'list_models'),
    ],
)
def test_unknown_names(name, hint):
    with pytest.raises(ValueError, match=hint) as caught:
        create_model(name)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('overrides', 'error', 'text'),
    [
        ({'dephts': (1, 1, 1, 1)}, TypeError, r'dephts=\(1, 1, 1, 1\); did you mean depths'),
        ({'depths': (1, 1, 1)}, ValueError, r'depths must be 4 positive numbers.*got depths=\(1, 1, 1\)'),
        ({'dims': (8, 0, 8, 8)}, ValueError, 'dims must be 4 positive numbers'),
        ({'mixers': 'atention'}, ValueError, 'did you mean attention'),
        ({'mixers': ('pool', 'conv')}, ValueError, 'mixers must be one value or 4'),
        (
            {'mixers': {'name': 'pool', 'size': 3}},
            TypeError,
            "mixer 'pool' has no option 'size'; did you mean pool_size",
        ),
        ({'norm': 'bach'}, ValueError, "norm must be one of .*got 'bach'"),
        (
            {'features_only': True, 'out_indices': (0, 4)},
            ValueError,
            'out_indices must be increasing stage numbers from 0',
        ),
        ({'features_only': True, 'out_indices': (2, 1)}, ValueError, 'out_indices must be increasing'),
        ({'pretrained': True, 'checkpoint_path': 'x.pth'}, ValueError, 'not both'),
    ],
)
def test_bad_arguments(overrides, error, text):
    with pytest.raises(error, match=text) as caught:
        create_model('poolformer_s12', **overrides)
    assert '\n' not in str(caught.value)


def test_dense_only_methods_say_so():
    model = create_model('poolformer_s12', features_only=True, **SMALL)
    with pytest.raises(ValueError, match='reset_classifier needs a classifier'):
        model.reset_classifier(3)


@torch.no_grad()
def test_mixers_from_a_config():
    mixers = ('pool', {'name': 'pool', 'pool_size': 5}, 'conv', {'name': 'attention', 'head_dim': 16})
    for name in ('poolformer_s12', 'convformer_s18'):
        model = create_model(name, mixers=mixers, features_only=True, **SMALL).eval()
        kinds = [type(stage[0].token_mixer).__name__ for stage in model.stages]
        assert kinds == ['PoolMixer', 'PoolMixer', 'SepConv', 'Attention']
        assert model.stages[1][0].token_mixer.pool_size == 5 and model.stages[3][0].token_mixer.num_heads == 2
        assert model(torch.randn(1, 3, 40, 72))[-1].shape == (1, 32, 2, 3)


@torch.no_grad()
def test_random_mixers_fix_the_size():
    model = create_model('randformer_s12', img_size=(64, 96), features_only=True, **SMALL).eval()
    assert isinstance(model.sizes, FixedSize) and model.sizes.height_width == (64, 96)
    assert model(torch.randn(2, 3, 64, 96))[-1].shape == (2, 32, 2, 3)
    assert model.stages[2][0].token_mixer.random_matrix.shape == (24, 24)
    mixed = create_model('convformer_s18', mixers=('conv', 'conv', 'random', 'random'), **SMALL)
    assert mixed.sizes.height_width == (224, 224)
    with pytest.raises(ValueError, match="mixer 'random' needs the size"):
        create_model('poolformer_s12', mixers='random', **SMALL)


def test_last_n_out_indices_and_constructor_arguments():
    model = create_model('convformer_s18', features_only=True, out_indices=2, **SMALL)
    assert model.feature_info.reduction() == [16, 32] and model.feature_info.channels() == [32, 32]
    arguments = constructor_arguments('convformer_s18')
    assert {'depths', 'dims', 'mixers', 'pretrained', 'checkpoint_path', 'out_indices'} <= arguments.keys()
    assert not {'self', 'name', 'overrides'} & arguments.keys()


def test_registering_a_name_twice_names_the_owner():
    with pytest.raises(ValueError, match=r'poolformer_s12 is already registered by densezoo\.backbones\.poolformer'):
        registry.register('poolformer_s12', PoolFormer)
    with pytest.raises(TypeError, match="MetaFormer has no argument 'depht'"):
        registry.register('never_built', metaformer.MetaFormer, depht=3)


# ---- timm


def test_timms_names_stay_timms_and_ours_are_added():
    assert type(timm.create_model('poolformer_s12')).__module__.startswith('timm.')
    assert type(create_model('poolformer_s12', **SMALL)).__module__ == 'densezoo.backbones.poolformer'
    ours = timm.create_model('identityformer_s12', features_only=True, depths=(1, 1, 1, 1), out_indices=(1, 3))
    assert type(ours).__module__ == 'densezoo.backbones.metaformer' and ours.feature_info.reduction() == [8, 32]
    assert timm.create_model('randformer_s12', num_classes=3, depths=(1, 1, 1, 1)).num_classes == 3
    assert 'identityformer_s12.sail_in1k' in timm.list_models('identityformer*', pretrained=True)


@torch.no_grad()
def test_models_of_timms_alone():
    model = create_model('resnet18', features_only=True, out_indices=(1, 2, 3)).eval()
    assert model.feature_info.reduction() == [8, 16, 32]
    assert [tuple(m.shape[1:]) for m in model(torch.randn(1, 3, 64, 64))] == [(128, 8, 8), (256, 4, 4), (512, 2, 2)]
    assert create_model('resnet18', num_classes=3, in_chans=1)(torch.randn(2, 1, 64, 64)).shape == (2, 3)
    swin = create_model('swin_tiny_patch4_window7_224', features_only=True, img_size=64).eval()
    assert [m.shape[1] for m in swin(torch.randn(1, 3, 64, 64))] == swin.feature_info.channels()  # (B, C, H, W)
    with pytest.raises(ValueError, match='has maps with strides'):
        create_model('vit_tiny_patch16_224', features_only=True)
    assert 'features_only' in constructor_arguments('resnet18')


# ---- published weights


@pytest.fixture
def mirror(tmp_path):
    """A folder with a published file as the authors wrote it, and a download cache."""
    source = create_model('identityformer_s12', **SMALL)
    torch.save(source.state_dict(), tmp_path / 'identityformer_s12.pth')
    return source, f'file://{tmp_path}/identityformer_s12.pth', tmp_path / 'cache'


def same(model, source):
    return all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


def test_download_from_a_mirror(mirror):
    source, url, cache = mirror
    options = dict(pretrained=True, pretrained_cfg_overlay={'url': url}, cache_dir=cache, **SMALL)
    for create in (create_model, timm.create_model):
        assert same(create('identityformer_s12', **options), source)
        assert (cache / 'identityformer_s12.pth').is_file()
    dense = create_model('identityformer_s12', features_only=True, **options)
    assert same(dense, source)


def test_download_path_of_the_registered_address(mirror, monkeypatch):
    source, url, _ = mirror
    entry = registry._ENTRIES['identityformer_s12']
    published = entry.weights['sail_in1k']
    weights = {'sail_in1k': replace(published, cfg=replace(published.cfg, url=url))}
    monkeypatch.setitem(registry._ENTRIES, 'identityformer_s12', replace(entry, weights=weights))
    monkeypatch.setattr(torch.hub, '_hub_dir', str(mirror[2]))
    assert same(create_model('identityformer_s12.sail_in1k', pretrained=True, **SMALL), source)


def test_pretrained_for_other_classes_and_channels(mirror, caplog):
    source, url, cache = mirror
    caplog.set_level('INFO', 'densezoo')
    model = create_model(
        'identityformer_s12',
        pretrained=True,
        pretrained_cfg_overlay={'url': url},
        cache_dir=cache,
        num_classes=5,
        in_chans=1,
        **SMALL,
    )
    assert model.head.out_features == 5 and len(caplog.records) == 1
    assert 'head not loaded: 1000 classes instead of 5' in caplog.text and 'from 3 to 1 channels' in caplog.text
    expected = source.downsample_layers[0].conv.weight.sum(1, keepdim=True)
    torch.testing.assert_close(model.downsample_layers[0].conv.weight, expected)


def test_offline_is_one_line(tmp_path):
    missing = f'file://{tmp_path}/nowhere/poolformer_s12.pth.tar'
    with pytest.raises(OSError, match=r"fetch (\S+)\.pth\.tar.*checkpoint_path='/path/to/\1\.pth\.tar'") as caught:
        create_model('poolformer_s12', pretrained=True, pretrained_cfg_overlay={'url': missing}, cache_dir=tmp_path)
    assert '\n' not in str(caught.value) and caught.value.__suppress_context__
    drive = {'url': None, 'file': None}
    with pytest.raises(ValueError, match='no published weights'):
        create_model('poolformer_s12', pretrained=True, pretrained_cfg_overlay=drive, **SMALL)


def test_weights_on_a_drive_name_the_page(monkeypatch):
    entry = registry._ENTRIES['poolformer_s12']
    cfg = replace(entry.weights['sail_in1k'].cfg, url=None)
    weights = {'sail_in1k': registry.Weights(cfg, {'page': 'https://drive.example/folder'})}
    monkeypatch.setitem(registry._ENTRIES, 'poolformer_s12', replace(entry, weights=weights))
    with pytest.raises(ValueError, match=r'download them from https://drive\.example/folder and pass checkpoint_path='):
        create_model('poolformer_s12', pretrained=True, **SMALL)


def test_checkpoint_path(tmp_path):
    source = create_model('poolformer_s12', **SMALL)
    torch.save({'state_dict': source.state_dict(), 'epoch': 3}, tmp_path / 'last.pth')
    model = create_model('poolformer_s12', checkpoint_path=str(tmp_path / 'last.pth'), **SMALL)
    assert same(model, source) and load_checkpoint(model, source.state_dict()) is model


def test_import_is_light():
    """The doors of backbones and kernels open without the training extra."""
    code = 'import sys, densezoo.backbones; print([m for m in ("mmengine", "cv2", "onnx") if m in sys.modules])'
    done = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    assert done.stdout.strip() == '[]'
