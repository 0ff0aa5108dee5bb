"""Every config that comes with densezoo loads, builds its model on the meta device, and survives a dump. Without these
tests a recipe for data that no developer has at hand breaks unseen."""

import copy
from collections.abc import Sequence

import pytest
import torch
from families import each_model
from mmengine.config import Config
from mmengine.registry import MODELS

from densezoo.backbones import create_model
from densezoo.backbones.reduction import report
from densezoo.backbones.registry import model_class
from densezoo.train.config import check_arguments, config_names, find_config, load_config

NAMES = config_names()


def build_on_meta(config: Config) -> torch.nn.Module:
    model = copy.deepcopy(config.model)
    model.backbone.pop('pretrained', None)
    with torch.device('meta'):
        return MODELS.build(model)


def test_there_are_configs_for_every_task():
    folders = {name.split('/')[0] for name in NAMES}
    tasks = {'classification', 'detection', 'segmentation', 'universal', 'restoration'}
    assert folders == {'quickstart', 'custom', *tasks}
    for folder in ('quickstart', 'custom'):
        tasks = {name.split('/')[1] for name in NAMES if name.startswith(f'{folder}/')}
        assert tasks >= {'classification', 'detection', 'instance', 'segmentation', 'restoration'}


# The universal heads have tens of millions of parameters, and two-stage detectors take seconds per step, whatever the
# backbone: by default those of a few backbones are built and take their step. Nor is a mixer or a loss that comes on
# several backbones tried on more than one.
VARIED = [
    name
    for name in NAMES
    if 'poolformer' not in name and any(part in name for part in ('gnconv_', 'hilo_', 'unet_allinone', 'unet_inpaint'))
]
BUILT_LATER = [name for name in NAMES if name.startswith('universal/') and 'poolformer' not in name] + VARIED
STEPPED_LATER = [name for name in NAMES if name.startswith('universal/') and 'poolformer_s12_mask2former' not in name]
STEPPED_LATER += VARIED
STEPPED_LATER += [
    name
    for name in NAMES
    if name.startswith('detection/')
    and ('rcnn' in name or 'cascade' in name)
    and not name.split('/')[1].startswith(('poolformer_s12', 'swin_tiny_maskrcnn', 'uvit'))
]


def each(later: list[str]) -> list:
    return [pytest.param(name, marks=pytest.mark.slow) if name in later else name for name in NAMES]


@pytest.mark.parametrize('name', each(BUILT_LATER))
def test_config_builds_dumps_and_builds_again(name, tmp_path):
    config = load_config(name)
    model = build_on_meta(config)
    assert sum(parameter.numel() for parameter in model.parameters()) > 0

    dumped = tmp_path / 'dumped.py'
    config.dump(dumped)
    again = Config.fromfile(dumped)
    check_arguments(again)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in build_on_meta(again).state_dict().items()} == shapes


@pytest.mark.parametrize('name', NAMES)
def test_config_trains_and_validates(name):
    config = load_config(name)
    assert config.train_dataloader.dataset.type and config.val_dataloader.dataset.type
    assert config.val_evaluator and config.optim_wrapper and config.param_scheduler
    end = config.train_cfg.get('max_iters') or config.train_cfg.get('max_epochs')
    assert config.param_scheduler[-1]['end'] == end, 'the last schedule ends before or after the training'


@pytest.mark.parametrize('name', [name for name in NAMES if not name.startswith(('quickstart/', 'custom/'))])
def test_recipe_states_its_figure(name):
    """The last comment of a recipe is the published figure, or says that there is none."""
    last = find_config(name).read_text().strip().splitlines()[-1]
    assert last.startswith('# ') and 'published' in last and 'trained here' in last


RECIPES = {
    'detection': 'retinanet fcos atss gfl maskrcnn cascade detr deformable rtdetr',
    'segmentation': 'semfpn upernet segformer deeplabv3plus semfpn_sbcb semfpn_hilo upernet_gnconv',
    'universal': 'kmax mask2former oneformer',
    'restoration': 'histoformer restormer unet_allinone unet_inpaint512',
}


@pytest.mark.parametrize(('folder', 'head'), [(folder, head) for folder in RECIPES for head in RECIPES[folder].split()])
def test_each_head_has_recipes_on_backbones_of_three_kinds(folder, head):
    """Pooling, windows, plain: what one kind of pyramid hides another shows."""
    for backbone in ('poolformer_s12', 'swin_tiny', 'deit_small'):
        assert any(name.startswith(f'{folder}/{backbone}_{head}_') for name in NAMES), backbone


def test_the_quickstart_with_fewer_tokens_saves_what_it_says():
    with torch.device('meta'):
        backbone = build_on_meta(load_config('quickstart/segmentation_mctf')).backbone
    assert 0.64 < report(backbone).share <= 0.65


def batch_for(size: int, *, labels: Sequence[int] = (0, 1), scale: int = 1, holes: bool = False) -> dict:
    """Two pictures with every kind of target: what a head does not ask for it does not read."""
    torch.manual_seed(0)
    targets = []
    for number in range(2):
        masks = torch.zeros(1, size, size, dtype=torch.bool)
        masks[:, 8:40, 8:40] = True
        targets.append(
            dict(
                label=number,
                boxes=torch.tensor([[8.0, 8.0, 40.0, 40.0]]),
                labels=torch.tensor([labels[number]]),
                masks=masks,
                mask=masks[0].long(),
                clean=torch.rand(3, scale * size, scale * size),
                size=(size, size),
                original_size=(size, size),
            )
        )
    pictures = [torch.randint(0, 256, (3, size, size), dtype=torch.uint8) for _ in range(2)]
    if holes:
        pictures = [torch.cat([picture, picture[:1] // 128 * 255]) for picture in pictures]
    return dict(images=pictures, targets=targets)


@pytest.mark.parametrize('name', each(STEPPED_LATER))
def test_a_reduced_copy_takes_one_step(name):
    config = load_config(name)
    config.model.backbone.pop('pretrained', None)
    if 'teacher' in config.model:  # its weights come from another run
        config.model.teacher = None
    if 'method' in config.model.backbone and config.model.backbone.method != 'bivit':  # codes need no learning here
        config.model.backbone.settings = {**config.model.backbone.get('settings', {}), 'iterations': 1}
    with torch.device('meta'):
        whole = getattr(config.model.backbone.type, 'reduced', None)  # of a restorer that is a network of its own
        config.model.backbone.update(whole or type(create_model(config.model.backbone.name)).reduced)
        config.model.backbone.pop('pyramid_blocks', None)  # numbers of blocks that the copy lacks
        reduction = config.model.backbone.get('reduction', {})
        if 'restore_at' in reduction:  # likewise: of three blocks the second fuses, the last has all tokens again
            reduction.update(layers=(1,), restore_at=2)
    width = config.model.head.get('channels')
    if isinstance(width, int) and width > 256:  # a head as wide as published takes longer than the backbone
        config.model.head.channels = 64
    model = MODELS.build(config.model).train()
    fixed = getattr(model.backbone.sizes, 'height_width', None)
    labels = model.head.reader.things[:2] if hasattr(model.head, 'reader') else (0, 1)
    options = dict(labels=labels, scale=getattr(model.head, 'scale', 1), holes=getattr(model.head, 'holes', False))
    batch = model.data_preprocessor(batch_for(fixed[0] if fixed else 64, **options), True)
    total, _ = model.parse_losses(model(**batch, mode='loss'))
    total.backward()
    # Of the whole model: a restorer's last layer starts at zero and lets nothing through to the backbone yet.
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert torch.isfinite(total) and any(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize('name', [p for p in each_model() if not model_class(p.values[0]).staged])
@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_plain_backbones_learn_in_the_quickstarts(task, name):
    """Their simple pyramids take the place of a hierarchical backbone, head and optimizer untouched."""
    config = load_config(f'quickstart/{task}')
    config.model.backbone = dict(type=create_model, name=name, features_only=True, **model_class(name).reduced)
    model = MODELS.build(config.model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(6):
        batch = model.data_preprocessor(batch_for(96), True)
        total, _ = model.parse_losses(model(**batch, mode='loss'))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert min(losses[3:]) < losses[0]
