"""Without these the pages that the README links could name other figures than the runs have."""

import json

import numpy as np
import pytest

from densezoo.tools import results
from densezoo.train import visualize
from densezoo.train.config import config_names


def finish(runs, task, **metrics):
    (runs / task).mkdir(parents=True)
    (runs / task / 'metrics.json').write_text(json.dumps({'seconds': 90.0, 'iterations': 1000, **metrics}))


def test_tables_hold_what_the_runs_have(tmp_path):
    finish(tmp_path, 'classification', **{'accuracy/top1': 0.9875})
    finish(tmp_path, 'segmentation', mIoU=0.7512)
    rows = results.quickstart_rows(tmp_path)
    assert len(rows) == 4
    assert rows[2].endswith('| top-1 | 98.8 | 1.5 min |') and rows[3].endswith('| mIoU | 0.75 | 1.5 min |')
    page = results.results_page(tmp_path, tmp_path / 'images')
    assert '## Segmentation' in page and '| mIoU | 0.7512 |' in page and '## Detection' not in page
    assert 'from scratch' not in page


def test_runs_that_compare_share_a_table(tmp_path):
    titled = {comparison.title: comparison for comparison in results.COMPARISONS}
    small, heads = titled['Small backbones from scratch'], titled['Segmentation heads']
    finish(tmp_path, 'classification', **{'accuracy/top1': 0.975})
    assert results.comparison_lines(small, tmp_path, tmp_path) == []
    finish(tmp_path, 'classification_cct', **{'accuracy/top1': 0.991})
    finish(tmp_path, 'classification_dhvt', **{'accuracy/top1': 0.982})
    assert results.comparison_lines(small, tmp_path, tmp_path)[-2:] == [
        '| quickstart/classification_cct | CCT | 99.10 | 1000 |',
        '| quickstart/classification_dhvt | DHVT | 98.20 | 1000 |',
    ]
    for name in ('segmentation', 'segmentation_upernet'):
        finish(tmp_path, name, mIoU=0.7, boundary_F=0.625)
        place = tmp_path / name / 'predictions' / 'iter_000010'
        place.mkdir(parents=True)
        for number in range(2):
            visualize.save(place / f'{number:03d}_a.png', np.full((20, 30, 3), 90, dtype=np.uint8))
    lines = results.comparison_lines(heads, tmp_path, tmp_path / 'images')
    assert '| config | head | mIoU | boundary F | iterations |' in lines
    assert '| quickstart/segmentation_upernet | UPerNet | 70.00 | 62.50 | 1000 |' in lines
    assert lines[-1] == '![predictions](images/segmentation_upernet.jpg)'
    assert [file.name for file in (tmp_path / 'images').iterdir()] == ['segmentation_upernet.jpg']


def test_seeds_of_a_config_share_a_row(tmp_path):
    universal = next(c for c in results.COMPARISONS if 'universal' in c.runs)
    finish(tmp_path, 'segmentation', mIoU=0.76)
    finish(tmp_path, 'universal', mIoU=0.70, **{'panoptic/PQ': 0.6, 'coco/segm_mAP': 0.5, 'coco/segm_mAP_50': 0.8})
    finish(
        tmp_path, 'universal_seed1', mIoU=0.72, **{'panoptic/PQ': 0.6, 'coco/segm_mAP': 0.5, 'coco/segm_mAP_50': 0.8}
    )
    lines = results.comparison_lines(universal, tmp_path, tmp_path)
    assert any('| 60.00 ± 0.00 (2) | 71.00 ± 1.41 (2) | 50.00 ± 0.00 (2) |' in line for line in lines)
    assert lines[-1] == '| quickstart/segmentation | FPN and Semantic FPN, semantic alone |  | 76.00 |  |  | 1000 |'


def test_what_has_no_run_stays_as_the_page_has_it(tmp_path):
    earlier, later, images = tmp_path / 'earlier', tmp_path / 'later', tmp_path / 'images'
    images.mkdir()
    (images / 'segmentation_sbcb.jpg').write_bytes(b'')
    finish(earlier, 'restoration', psnr=25.0, psnr_over_blur=1.5)
    finish(earlier, 'segmentation', mIoU=0.7, boundary_F=0.6)
    finish(earlier, 'segmentation_sbcb', mIoU=0.71, boundary_F=0.7)
    rows = [{'name': 'x', 'ours': 1.0, 'peer': 2.0, 'peer_name': 'p', 'ratio': 2.0, 'ours_bytes': None}]
    (earlier / 'benchmark_hilo.json').write_text(json.dumps(rows))
    page, readme = results.results_page(earlier, images), '\n'.join(results.quickstart_rows(earlier))
    later.mkdir()
    assert results.results_page(later, images, page) == page
    assert '\n'.join(results.quickstart_rows(later, readme)) == readme
    finish(later, 'segmentation_gnconv', mIoU=0.72, boundary_F=0.61)
    finish(later, 'restoration', psnr=26.0, psnr_over_blur=2.5)
    new = results.results_page(later, images, page)
    lines = new.splitlines()
    kept = lines.index('| quickstart/segmentation_sbcb | the same with SBCB in training | 71.00 | 70.00 | 1000 |')
    assert lines[kept + 1].startswith('| quickstart/segmentation_gnconv |') and '| 72.00 | 61.00 |' in lines[kept + 1]
    assert '![predictions](images/segmentation_sbcb.jpg)' in lines and 'segmentation_gnconv.jpg' not in new
    assert '| psnr | 26 |' in lines and '| psnr | 25 |' not in lines and new.count('### HiLo') == 1
    assert results.quickstart_rows(later, readme)[-1].split(' | ')[3] == '2.50'


def test_a_kept_row_is_of_the_same_columns(tmp_path):
    comparison = next(c for c in results.COMPARISONS if c.title == 'Fewer tokens')
    for name in comparison.runs:
        finish(tmp_path, name, mIoU=0.5, boundary_F=0.4)
    page = '\n'.join(results.comparison_lines(comparison, tmp_path, tmp_path))
    other = comparison._replace(figures={'mIoU': 'mIoU'})
    assert results.comparison_lines(comparison, tmp_path / 'none', tmp_path, page)
    assert results.comparison_lines(other, tmp_path / 'none', tmp_path, page) == []


def test_speeds_of_models_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(results, 'list_models', lambda: ['poolformer_s12'])
    (tmp_path / 'throughput.json').write_text(json.dumps([{'name': 'poolformer_s12', 'images_per_second': 12.5}]))
    page = results.models_page(tmp_path)
    assert results.earlier_speeds(page) == {'poolformer_s12': 12.5}
    assert results.models_page(tmp_path / 'none', page) == page
    assert results.earlier_speeds(results.models_page(tmp_path / 'none')) == {}


def test_every_comparison_is_of_quickstarts():
    known = {name.removeprefix('quickstart/') for name in config_names()}
    assert all(set(comparison.runs) <= known and comparison.figures for comparison in results.COMPARISONS)


def test_an_empty_folder_is_refused(tmp_path, capsys):
    assert results.main([str(tmp_path)]) != 0
    assert 'no finished quickstart' in capsys.readouterr().err


@pytest.mark.parametrize('name', results.BENCHMARKS)
def test_benchmarks_have_their_command(tmp_path, name):
    rows = [{'name': 'x', 'ours': 1.0, 'peer': 2.0, 'peer_name': 'p', 'ratio': 2.0, 'ours_bytes': None}]
    if name == 'peers':
        rows = [
            {'task': 'x', 'metric': 'm', 'ours': 1, 'peer': 2, 'peer_name': 'p', 'ours_seconds': 1, 'peer_seconds': 1}
        ]
    (tmp_path / f'benchmark_{name}.json').write_text(json.dumps(rows))
    assert f'densezoo benchmark {name}\n' in results.results_page(tmp_path, tmp_path)
