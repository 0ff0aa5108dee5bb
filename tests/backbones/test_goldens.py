"""Without this a backbone could drift from the published system: outputs, gradients, keys and parameter counts are
compared with what the authors' own code gave for the same deterministic weights and images.

Every golden of a registered name is found here, with the endings `__dense`, `__dense_det` and `__dense_seg` for dense
forms. Fingerprints of single modules and of special settings are compared in the families' own test files, through
`golden.run`.
"""

import math

import golden
import probe
import pytest
import torch

from densezoo.backbones import list_models
from densezoo.backbones.registry import model_class

# file names of whole models; a golden that ends otherwise belongs to its family's tests
NAMES = sorted(
    path.stem
    for path in probe.GOLDENS.glob('*.json')
    if golden.registered_name(path.stem) in list_models() and golden.ending(path.stem) in golden.FORMS
)


def cases():
    """One forward case of each golden by default, the gradients too; the rest is slow."""
    for name in NAMES:
        plain = 0
        for case in probe.load(name)['cases']:
            if not golden.is_plain(case) or (name, case['name']) in golden.SPOILT:
                continue
            gradient = case['name'].startswith('grad')
            if gradient and golden.registered_name(name).split('_')[0] in golden.OWN_GRADIENTS:
                continue
            marks = [pytest.mark.slow] if not gradient and plain else []
            plain += not gradient
            yield pytest.param(name, case['name'], id=f'{name}-{case["name"]}', marks=marks)


CASES = list(cases())


def test_every_family_has_a_golden():
    """Families without any published code declare it."""
    families = {name.split('_')[0] for name in list_models()}
    classes = {name.split('_')[0]: model_class(name) for name in list_models()}
    tested = {golden.registered_name(name).split('_')[0] for name in NAMES}
    assert families - tested == {family for family, cls in classes.items() if not cls.has_golden}


@pytest.mark.parametrize('name', NAMES)
def test_parameters(name):
    with torch.device('meta'):
        model = golden.create(name)
    recorded = probe.load(name)
    ours = model.convert({key: key for key in recorded['state_dict']}) if model.features_only else {}
    unused = [theirs for key, theirs in ours.items() if key.startswith(model.classifier_keys)]  # kept by some authors
    expected = recorded['params'] - sum(math.prod(recorded['state_dict'][key]) for key in unused)
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize(('name', 'case_name'), CASES)
def test_outputs(name, case_name):
    recorded = probe.load(name)
    golden.run(golden.build(name), recorded, golden.case(recorded, case_name))
