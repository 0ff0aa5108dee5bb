"""Write docs/results.md, docs/models.md, their pictures and the README's table from finished runs.

for task in classification detection instance segmentation restoration; do      # and any that COMPARISONS names
    python tools/train.py quickstart/$task --work-dir runs/$task
done
for what in backbones hilo window loop pipeline peers; do
    python tools/benchmark.py --json $what > runs/benchmark_$what.json
done
densezoo models --throughput --format json > runs/throughput.json
python tools/results.py runs

What the pages say of runs and benchmarks that are not in the folder stays as it is: one run more is one row more.
"""

import argparse
import json
import platform
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import torch

from densezoo.backbones import list_models
from densezoo.data import read_image
from densezoo.tools import models
from densezoo.tools.benchmark import table
from densezoo.tools.common import report_errors
from densezoo.train.visualize import as_pixels, grid

ROOT = Path(__file__).resolve().parent.parent
# task: what it learns, the data, the metric of the README's table and its name there
TASKS = {
    'classification': ('scanned digits, 32x32', 'accuracy/top1', 'top-1'),
    'detection': ('digits on photographs, 96x96', 'coco/bbox_mAP_50', 'box AP50'),
    'instance': ('digits on photographs, 96x96', 'coco/segm_mAP_50', 'mask AP50'),
    'segmentation': ('digits on photographs, 96x96', 'mIoU', 'mIoU'),
    'restoration': ('textured photographs, noise sigma 25', 'psnr_over_blur', 'dB above the best blur'),
}


class Comparison(NamedTuple):
    """Runs on the same data that make one table: what differs, the figures (metric: its name there), and the rows.

    A run folder NAME_seed1, NAME_seed2, ... beside NAME is the same config with another `--seed`: the row holds their
    mean and standard deviation. A row has no figure for metrics that its head does not have; seconds are left out, as
    such runs are trained side by side.
    """

    title: str
    what: str
    figures: dict[str, str]
    runs: dict[str, str]
    pictures: bool = False
    scale: float = 100  # fractions as per cent


RESTORED = {'psnr': 'PSNR, dB', 'psnr_gain': 'over the input, dB', 'ssim': 'SSIM'}
COMPARISONS = (
    Comparison(
        title='Small backbones from scratch',
        what='backbone',
        figures={'accuracy/top1': 'top-1'},
        runs={'classification': 'CAFormer', 'classification_cct': 'CCT', 'classification_dhvt': 'DHVT'},
    ),
    Comparison(
        title='Binarized and multiplication-free',
        what='backbone',
        figures={'accuracy/top1': 'top-1'},
        runs={
            'classification_swin': 'Swin, full precision',
            'classification_bivit': 'BiViT, taught by it',
            'classification_pvt': 'PVTv2, full precision',
            'classification_ecoformer': 'EcoFormer, taught by it',
            'classification_shiftadd': 'ShiftAddViT, taught by it',
        },
    ),
    Comparison(
        title='Detectors',
        what='head',
        figures={'coco/bbox_mAP_50': 'AP50', 'coco/bbox_mAP': 'AP'},
        runs={
            'detection': 'Faster R-CNN',
            'detection_cascade': 'Cascade R-CNN',
            'detection_retinanet': 'RetinaNet',
            'detection_fcos': 'FCOS',
            'detection_atss': 'ATSS',
            'detection_gfl': 'GFL',
            'detection_rtdetr': 'RT-DETR',
            'detection_deformable': 'Deformable DETR',
            'detection_detr': 'DETR, twice the iterations',
        },
        pictures=True,
    ),
    Comparison(
        title='Segmentation heads',
        what='head',
        figures={'mIoU': 'mIoU', 'boundary_F': 'boundary F'},
        runs={
            'segmentation': 'FPN and Semantic FPN',
            'segmentation_sbcb': 'the same with SBCB in training',
            'segmentation_gnconv': 'the same with gnConv in the FPN',
            'segmentation_upernet': 'UPerNet',
            'segmentation_segformer': "SegFormer's",
            'segmentation_deeplabv3plus': 'DeepLabV3+',
        },
        pictures=True,
    ),
    Comparison(
        title='Rain and snow',
        what='decoder',
        figures=RESTORED,
        runs={
            'restoration_rainsnow': "Histoformer's blocks, 47.4 thousand multiply-adds per pixel",
            'restoration_rainsnow_unet': 'residual blocks, 55.9 thousand',
        },
        pictures=True,
        scale=1,
    ),
    Comparison(
        title='Large holes',
        what='network',
        figures={'psnr': 'PSNR, dB', 'psnr_over_telea': "over Telea's, dB", 'ssim': 'SSIM'},
        runs={'inpainting': "ConvFormer under Restormer's blocks", 'inpainting_mat': 'MAT'},
        pictures=True,
        scale=1,
    ),
    Comparison(
        title='Other degradations',
        what='network',
        figures=RESTORED,
        runs={
            'restoration': 'ConvFormer under residual blocks: noise',
            'restoration_allinone': 'TAT: noise, haze, rain or blur',
            'super_resolution': "ConvFormer under Restormer's blocks: half the size",
        },
        pictures=True,
        scale=1,
    ),
    Comparison(
        title='One network for three tasks',
        what='head',
        figures={'panoptic/PQ': 'PQ', 'mIoU': 'mIoU', 'coco/segm_mAP': 'mask AP', 'coco/segm_mAP_50': 'mask AP50'},
        runs={
            'universal': 'Mask2Former with seeds',
            'universal_oneformer': 'OneFormer',
            'universal_kmax': 'kMaX-DeepLab',
            'segmentation': 'FPN and Semantic FPN, semantic alone',
            'instance': 'Mask R-CNN, instances alone',
        },
        pictures=True,
    ),
    Comparison(
        title='Fewer tokens',
        what='tokens',
        figures={'mIoU': 'mIoU', 'boundary_F': 'boundary F'},
        runs={'segmentation_deit': 'all', 'segmentation_mctf': 'MCTF, 35% fewer multiply-adds'},
    ),
)
MARKS = ('<!-- quickstarts:begin -->', '<!-- quickstarts:end -->')
BENCHMARKS = {
    'backbones': 'Forward passes against timm',
    'hilo': 'HiLo attention on one core',
    'window': "Shifted-window attention against timm's",
    'loop': 'The training loop against a bare PyTorch loop',
    'pipeline': "Detection data against torchvision's reference pipeline",
    'peers': "The quickstarts' heads on torchvision's smallest backbone, same recipe",
}


def section(page: str, heading: str) -> list[str]:
    """A page's lines from a heading, an empty line before it, to the next one of its level; none if it has no such."""
    lines = page.splitlines()
    if heading not in lines:
        return []
    start = lines.index(heading)
    ends = re.compile(rf'#{{1,{heading.index(" ")}}} ')
    end = next((i for i, line in enumerate(lines) if i > start and ends.match(line)), len(lines))
    return ['', *'\n'.join(lines[start:end]).rstrip().splitlines()]


def table_row(lines: Sequence[str], first: str) -> list[str]:
    """The line of a Markdown table whose first cell this is, or none."""
    return [line for line in lines if line.startswith(f'| {first} |')][:1]


def quickstart_rows(runs: Path, earlier: str = '') -> list[str]:
    """Lines of the README's table; of tasks without a run those of the `earlier` README."""
    lines = ['| command | data | metric | value | time on two CPU cores |', '|---|---|---|---:|---:|']
    for task, (data, metric, title) in TASKS.items():
        path = runs / task / 'metrics.json'
        if path.is_file():
            metrics = json.loads(path.read_text())
            value = metrics[metric]
            text = f'{100 * value:.1f}' if metric == 'accuracy/top1' else f'{value:.2f}'
            lines.append(
                f'| `densezoo train quickstart/{task}` | {data} | {title} | {text} '
                f'| {metrics["seconds"] / 60:.1f} min |'
            )
        else:
            lines += table_row(earlier.splitlines(), f'`densezoo train quickstart/{task}`')
    return lines


def latest_pictures(run: Path, count: int) -> list[Path]:
    """The pictures of a run's last validation."""
    folders = sorted((run / 'predictions').glob('iter_*'))
    return sorted(folders[-1].glob('[0-9]*.png'))[:count] if folders else []


def write_sheet(files: Sequence[Path], path: Path, columns: int, width: int) -> None:
    """Several pictures on one JPEG of at most `width` pixels across."""
    pictures = [as_pixels(read_image(file)) for file in files]
    sheet = cv2.cvtColor(grid(pictures, columns), cv2.COLOR_RGB2BGR)
    scale = min(1.0, width / sheet.shape[1])
    sheet = cv2.resize(sheet, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), sheet, [cv2.IMWRITE_JPEG_QUALITY, 85])


def results_page(runs: Path, images: Path, earlier: str = '') -> str:
    """docs/results.md, with what the `earlier` page says of runs and benchmarks that are not there."""
    lines = [
        '# Results',
        '',
        f'Measured on {torch.get_num_threads()} cores of a CPU ({platform.machine()}), torch {torch.__version__}, '
        'by the commands below; this page and its pictures are written by `python tools/results.py runs`.',
    ]
    for task in TASKS:
        run = runs / task
        if not (run / 'metrics.json').is_file():
            lines += section(earlier, f'## {task.capitalize()}')
            continue
        metrics = json.loads((run / 'metrics.json').read_text())
        lines += ['', f'## {task.capitalize()}', '', '```', f'densezoo train quickstart/{task}', '```', '']
        lines += ['| metric | value |', '|---|---:|']
        lines += [f'| {name} | {value:.4g} |' for name, value in metrics.items() if value != -1]
        pictures = latest_pictures(run, 6)
        if pictures:
            write_sheet(pictures, images / f'{task}.jpg', 2 if task == 'segmentation' else 3, 1400)
            lines += ['', f'![predictions](images/{task}.jpg)']
        if (run / 'curves.png').is_file():
            (images / f'{task}_curves.png').write_bytes((run / 'curves.png').read_bytes())
            lines += ['', f'![curves](images/{task}_curves.png)']
    for comparison in COMPARISONS:
        lines += comparison_lines(comparison, runs, images, earlier)
    benchmarks = []
    for name, title in BENCHMARKS.items():
        path = runs / f'benchmark_{name}.json'
        if path.is_file():
            benchmarks += ['', f'### {title}', '', '```', f'densezoo benchmark {name}', '```', '']
            benchmarks += table(json.loads(path.read_text())).splitlines()
        else:
            benchmarks += section(earlier, f'### {title}')
    if benchmarks:
        lines += ['', '## Benchmarks', '']
        lines += ['Side by side in one run, in turn, the minimum of several; above 1 ours is faster.', *benchmarks]
    return '\n'.join(lines) + '\n'


def comparison_lines(comparison: Comparison, runs: Path, images: Path, earlier: str = '') -> list[str]:
    """Lines on the runs of a comparison, if any is more than a task's own; with their pictures where it asks for them.

    Of runs that are not there, the rows of the `earlier` page stay, if it had the same columns.
    """
    before = section(earlier, f'## {comparison.title}')
    header = f'| config | {comparison.what} | {" | ".join(comparison.figures.values())} | iterations |'
    kept = before if header in before else []
    rows = {name: run_row(comparison, name, runs) or table_row(kept, f'quickstart/{name}') for name in comparison.runs}
    names = [name for name in rows if rows[name]]
    if all(name in TASKS for name in names):  # they have sections of their own
        return []
    lines = ['', f'## {comparison.title}', '', '```', *(f'densezoo train quickstart/{name}' for name in names), '```']
    lines += ['', header, '|---|---|' + '---:|' * (len(comparison.figures) + 1), *(rows[name][0] for name in names)]
    for name in names if comparison.pictures else ():
        if name in TASKS:  # a task's own section shows them already
            continue
        pictures = latest_pictures(runs / name, 4)
        if pictures:
            write_sheet(pictures, images / f'{name}.jpg', 2, 1400)
        if (images / f'{name}.jpg').is_file():
            lines += ['', f'{comparison.runs[name]}:', '', f'![predictions](images/{name}.jpg)']
    return lines


def run_row(comparison: Comparison, name: str, runs: Path) -> list[str]:
    """The line of a run and its other seeds, or none."""
    files = [runs / name / 'metrics.json', *sorted(runs.glob(f'{name}_seed*/metrics.json'))]
    if not files[0].is_file():
        return []
    seeds = [json.loads(file.read_text()) for file in files]
    figures = ' | '.join(
        mean_and_spread([comparison.scale * run[m] for run in seeds if m in run]) for m in comparison.figures
    )
    return [f'| quickstart/{name} | {comparison.runs[name]} | {figures} | {seeds[0]["iterations"]} |']


def mean_and_spread(values: Sequence[float]) -> str:
    """'', '71.20' or of several seeds '71.20 ± 0.35 (3)', with the sample's deviation."""
    if len(values) < 2:
        return ''.join(f'{value:.2f}' for value in values)
    return f'{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} ({len(values)})'


def models_page(runs: Path, earlier: str = '') -> str:
    """docs/models.md: every model, with images per second from runs/throughput.json or else the `earlier` page."""
    rows = [models.describe(name) for name in list_models()]
    written_by = 'densezoo models --format markdown'
    measured = runs / 'throughput.json'
    if measured.is_file():
        speeds = {row['name']: row['images_per_second'] for row in json.loads(measured.read_text())}
    else:
        speeds = earlier_speeds(earlier)
    for row in rows:
        row['images_per_second'] = speeds.get(row['name'])
    if speeds:
        written_by += ' --throughput'
    return (
        f'# Models\n\nWritten by `{written_by}`; top-1 on ImageNet-1k as published. images/s: here, on two CPU cores, '
        f'batch 8, float32.\n\n{models.as_text(rows, markdown=True)}\n'
    )


def earlier_speeds(page: str) -> dict[str, float]:
    """Images per second by model, of a page that `models_page` wrote."""
    cells = [[cell.strip() for cell in line.split('|')[1:-1]] for line in page.splitlines() if line.startswith('|')]
    if not cells or (title := models.COLUMNS['images_per_second']) not in cells[0]:
        return {}
    column = cells[0].index(title)
    return {line[0]: float(line[column]) for line in cells[2:] if line[column]}


def readme_page(runs: Path, earlier: str) -> str:
    """README.md with the table of the quickstarts between its marks."""
    before, rest = earlier.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return f'{before}{MARKS[0]}\n' + '\n'.join(quickstart_rows(runs, earlier)) + f'\n{MARKS[1]}{after}'


def rewrite(path: Path, write: Callable[[str], str]) -> None:
    """A page anew, from what it says now; '' if there is none."""
    path.write_text(write(path.read_text() if path.is_file() else ''))


@report_errors
def main(argv: Sequence[str] | None = None) -> int:
    arguments = argparse.ArgumentParser(description='Write the tables and pictures of README and docs.')
    arguments.add_argument('runs', type=Path, help='folder with a run folder per quickstart')
    runs = arguments.parse_args(argv).runs
    if not any(runs.glob('*/metrics.json')) and not any(runs.glob('*.json')):
        raise ValueError(f'no finished quickstart in {runs}: expected {runs}/detection/metrics.json and so on')
    docs, images = ROOT / 'docs', ROOT / 'docs' / 'images'
    rewrite(docs / 'results.md', lambda earlier: results_page(runs, images, earlier))
    rewrite(docs / 'models.md', lambda earlier: models_page(runs, earlier))
    banner = [picture for task in TASKS if task != 'classification' for picture in latest_pictures(runs / task, 1)]
    if len(banner) == len(TASKS) - 1:
        write_sheet(banner, images / 'quickstarts.jpg', 2, 1400)
    rewrite(ROOT / 'README.md', lambda earlier: readme_page(runs, earlier))
    return 0


if __name__ == '__main__':
    sys.exit(main())
