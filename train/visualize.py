"""Pictures of predictions: boxes and masks, coloured segmentations, before/after strips, captions, contact sheets.

Everything here takes and returns RGB. Small pictures are enlarged by a whole factor before anything is drawn, so that
lines and letters are legible on a 32x32 digit as on a photograph.
"""

import colorsys
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.io import write_png

from ..heads.segments import panoptic_map

_LEGIBLE = 256  # shorter side of a panel that needs no enlargement
_BAND = 22  # height of a caption
_FONT = 15
_RIGHT, _WRONG, _PLAIN = (24, 120, 48), (190, 30, 30), (45, 45, 45)

Metainfo = Mapping[str, Any]


def draw(
    image: Tensor | np.ndarray,
    result: Mapping[str, Any],
    target: Mapping[str, Any] | None = None,
    metainfo: Metainfo | None = None,
    *,
    score_threshold: float = 0.3,
    max_boxes: int = 100,
) -> np.ndarray:
    """One picture of one result, beside the truth where it is known.

    Args:
        image: (3, H, W), (1, H, W) or (4, H, W) (a picture with holes) uint8 or float in [0, 1], or uint8 (H, W, 3): as
            given to the network, before normalisation; it is scaled to `target['original_size']`, to which results
            refer.
        result: what a task's `predict` returned: classification (`label`, `scores`), detection (`boxes`, `labels`,
            `scores`, perhaps `masks`), segmentation (`mask`), panoptic (`panoptic`, `segment_labels`) or restoration
            (`image`).
        target: the dataset's target, or None.
        metainfo: the dataset's `classes` and `palette`; numbers and generated colours without.
        score_threshold: detections below it are not drawn.
        max_boxes: the best so many detections are drawn.

    Returns:
        uint8 (h, w, 3): panels side by side under their captions.
    """
    if isinstance(image, Tensor) and image.ndim == 3 and image.shape[0] == 4:
        image = image[:3]  # the last channel says where a picture is known
    pixels, target, metainfo = as_pixels(image), target or {}, metainfo or {}
    if 'panoptic' in result:
        return _draw_panoptic(pixels, result, target, metainfo)
    if 'boxes' in result:
        return _draw_detection(pixels, result, target, metainfo, score_threshold, max_boxes)
    if 'mask' in result:
        return _draw_segmentation(pixels, result, target, metainfo)
    if 'image' in result:
        return _draw_restoration(pixels, result, target)
    if 'label' in result:
        return _draw_classification(pixels, result, target, metainfo)
    raise ValueError(f"a result holds 'panoptic', 'boxes', 'mask', 'image' or 'label', got {sorted(result)}")


def save_pictures(
    folder: str | Path,
    images: Sequence[Tensor | np.ndarray],
    results: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]] | None = None,
    metainfo: Metainfo | None = None,
    *,
    columns: int = 0,
    score_threshold: float = 0.3,
) -> list[Path]:
    """Draw each result into `<folder>/<nnn>_<name of the file>.png` and all of them onto `<folder>/sheet.png`.

    Args:
        folder: made where missing; files of the same name are replaced.
        images, results, targets, metainfo, score_threshold: see `draw`; one result (and target) per image.
        columns: of the sheet; 0 chooses a sheet about as wide as high.

    Returns:
        The files, the sheet last; nothing for no images.
    """
    if len(images) != len(results) or (targets is not None and len(targets) != len(results)):
        raise ValueError(
            f'one result and target per image are needed, got {len(images)} images, {len(results)} '
            f'results, {len(targets) if targets is not None else "no"} targets'
        )
    pictures, files = [], []
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    for number, (image, result) in enumerate(zip(images, results, strict=True)):
        target = targets[number] if targets is not None else {}
        pictures.append(draw(image, result, target, metainfo, score_threshold=score_threshold))
        files.append(place / f'{number:03d}_{Path(str(target.get("file", "picture"))).stem}.png')
        save(files[-1], pictures[-1])
    if pictures:
        files.append(place / 'sheet.png')
        save(files[-1], grid(pictures, columns))
    return files


def save(path: str | Path, picture: np.ndarray) -> None:
    """Write uint8 (H, W, 3) RGB as PNG."""
    write_png(torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1), str(path), compression_level=4)


def grid(pictures: Sequence[np.ndarray], columns: int = 0, *, gap: int = 6) -> np.ndarray:
    """A contact sheet: uint8 (H, W, 3) pictures of any sizes, row by row on white, `gap` pixels apart.

    Args:
        pictures: at least one.
        columns: pictures in a row; 0 chooses a sheet about as wide as high.
        gap: white pixels between and around.
    """
    if not pictures:
        raise ValueError('grid needs at least one picture')
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    if columns < 1:
        columns = max(1, math.ceil(math.sqrt(len(pictures) * height / width)))
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, dtype=np.uint8)
    for number, picture in enumerate(pictures):
        top, left = (number // columns) * (height + gap) + gap, (number % columns) * (width + gap) + gap
        sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return sheet


def curves(rows: Iterable[Mapping[str, Any]] | str | Path, path: str | Path) -> None:
    """Training curves as a PNG: one panel for the loss terms, one for the learning rate, one per validation metric.

    Args:
        rows: a run's log rows in order, {'kind': 'train' or 'val', 'step': iteration, name: number, ...}, or the
            `log.jsonl` that holds them.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second, and needed at the end of a run only
    from matplotlib.figure import Figure

    if isinstance(rows, str | Path):
        rows = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    lines: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for row in rows:
        for name, value in row.items():
            if name in ('kind', 'step') or not isinstance(value, int | float):
                continue
            if row['kind'] == 'train':
                panel = 'training loss' if 'loss' in name else 'learning rate' if name == 'lr' else ''
            else:
                panel = name
            if panel:
                steps, values = lines.setdefault(panel, {}).setdefault(name, ([], []))
                steps.append(row['step'])
                values.append(value)
    columns = min(3, max(1, len(lines)))
    figure = Figure(figsize=(4.5 * columns, 3.2 * max(1, math.ceil(len(lines) / columns))), layout='constrained')
    FigureCanvasAgg(figure)
    for number, (title, parts) in enumerate(lines.items()):
        axes = figure.add_subplot(math.ceil(len(lines) / columns), columns, number + 1)
        for name, (steps, values) in parts.items():
            axes.plot(steps, values, label=name, linewidth=1.3, marker='.' if len(steps) < 40 else None)
        axes.set_title(title)
        axes.set_xlabel('iteration')
        axes.grid(alpha=0.3)
        if len(parts) > 1:
            axes.legend(fontsize='small')
    figure.savefig(path, dpi=100)


# -------------------------------------------------------------------------------------------- the four kinds


def _draw_detection(
    pixels: np.ndarray,
    result: Mapping[str, Any],
    target: Mapping[str, Any],
    metainfo: Metainfo,
    score_threshold: float,
    max_boxes: int,
) -> np.ndarray:
    seen = pixels.shape[:2]
    height, width = target.get('original_size', seen)
    ground, factor = _enlarged(_resized(pixels, height, width), Image.Resampling.LANCZOS)
    scores = _array(result['scores'])
    order = [i for i in np.argsort(-scores, kind='stable')[:max_boxes] if scores[i] >= score_threshold]
    masks = _array(result['masks'])[order] if 'masks' in result else None
    found = _objects(
        ground, factor, _array(result['boxes'])[order], _array(result['labels'])[order], masks, metainfo, scores[order]
    )
    if 'boxes' not in target:
        return _under(found, f'{len(order)} found (score >= {score_threshold:g})')
    seen_height, seen_width = target.get('size', seen)
    scale = np.array([width / seen_width, height / seen_height] * 2)
    boxes = _array(target['boxes']).reshape(-1, 4) * scale
    masks = None
    if 'masks' in target:
        masks = np.array(
            [
                _resized(mask.astype(np.uint8), height, width, Image.Resampling.NEAREST) > 0
                for mask in _array(target['masks'])
            ]
        ).reshape(-1, height, width)
    truth = _objects(ground, factor, boxes, _array(target['labels']), masks, metainfo, None)
    return _beside([_under(found, 'prediction'), _under(truth, 'truth')])


def _draw_segmentation(
    pixels: np.ndarray, result: Mapping[str, Any], target: Mapping[str, Any], metainfo: Metainfo
) -> np.ndarray:
    found = _array(result['mask'])
    height, width = found.shape
    ground, factor = _enlarged(_resized(pixels, height, width), Image.Resampling.LANCZOS)
    panels = [_under(ground, 'picture'), _under(_regions(ground, factor, found, metainfo), 'prediction')]
    if 'mask' in target:
        truth = _resized(_array(target['mask']).astype(np.int32), height, width, Image.Resampling.NEAREST)
        panels.append(_under(_regions(ground, factor, truth, metainfo), 'truth'))
    return _beside(panels)


def _draw_panoptic(
    pixels: np.ndarray, result: Mapping[str, Any], target: Mapping[str, Any], metainfo: Metainfo
) -> np.ndarray:
    ids, labels = _array(result['panoptic']), _array(result['segment_labels'])
    height, width = ids.shape
    ground, factor = _enlarged(_resized(pixels, height, width), Image.Resampling.LANCZOS)
    panels = [_under(ground, 'picture'), _under(_segments(ground, factor, ids, labels, metainfo), 'prediction')]
    if {'mask', 'masks', 'labels'} <= target.keys() and 'things' in metainfo:
        truth = panoptic_map(target, things=metainfo['things'])
        true_ids = _resized(_array(truth.ids).astype(np.int32), height, width, Image.Resampling.NEAREST)
        panels.append(_under(_segments(ground, factor, true_ids, _array(truth.labels), metainfo), 'truth'))
    return _beside(panels)


def _draw_restoration(pixels: np.ndarray, result: Mapping[str, Any], target: Mapping[str, Any]) -> np.ndarray:
    clean = as_pixels(target['clean']) if 'clean' in target else None
    panels = []
    for caption, picture in (('input', pixels), ('restored', as_pixels(result['image']))):
        if clean is not None and clean.shape == picture.shape:
            error = float(((picture.astype(np.float64) - clean) ** 2).mean())
            caption += f'  {10 * math.log10(255**2 / error):.2f} dB' if error else '  exact'
        panels.append(_under(_enlarged(picture, Image.Resampling.NEAREST)[0], caption))
    if clean is not None:
        panels.append(_under(_enlarged(clean, Image.Resampling.NEAREST)[0], 'clean'))
    return _beside(panels)


def _draw_classification(
    pixels: np.ndarray, result: Mapping[str, Any], target: Mapping[str, Any], metainfo: Metainfo
) -> np.ndarray:
    label, scores = int(result['label']), _array(result['scores'])
    caption, colour = f'{_name(metainfo, label)}  {100 * scores[label]:.1f} %', _PLAIN
    truth = target.get('label')
    if truth is not None:
        truth = int(torch.as_tensor(truth).argmax()) if np.ndim(truth) else int(truth)
        colour = _RIGHT if truth == label else _WRONG
        caption += '' if truth == label else f'  (is {_name(metainfo, truth)})'
    return _under(_enlarged(pixels, Image.Resampling.LANCZOS)[0], caption, colour)


# ---------------------------------------------------------------------------------------------------- parts


def as_pixels(image: Tensor | np.ndarray) -> np.ndarray:
    """(C, H, W) uint8 or float in [0, 1] tensor with 1 or 3 channels, or uint8 (H, W, 3) array -> uint8 (H, W, 3)."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f'an array must be uint8 (H, W, 3), got {image.dtype} {image.shape}')
        return image
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f'a tensor must be (3, H, W) or (1, H, W), got {tuple(image.shape)}')
    image = image.detach().cpu()
    if image.is_floating_point():
        image = image.float().nan_to_num().clamp(0, 1).mul(255).round()
    return image.to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()


def _objects(
    ground: np.ndarray,
    factor: int,
    boxes: np.ndarray,
    labels: np.ndarray,
    masks: np.ndarray | None,
    metainfo: Metainfo,
    scores: np.ndarray | None,
) -> np.ndarray:
    """Masks first, then boxes, then their names, best last."""
    canvas = ground.astype(np.float32)
    order = range(len(boxes) - 1, -1, -1)
    for i in order if masks is not None else ():
        mask = masks[i].repeat(factor, 0).repeat(factor, 1)  # type: ignore[index]
        paint = np.array(_colour(metainfo, int(labels[i])), dtype=np.float32)
        canvas[mask] = 0.6 * canvas[mask] + 0.4 * paint
        canvas[_rim(mask)] = paint
    picture = Image.fromarray(canvas.astype(np.uint8))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(_FONT)
    for i in order:
        x0, y0, x1, y1 = (float(value) * factor for value in boxes[i])
        pen.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=_colour(metainfo, int(labels[i])), width=2)
    for i in order:
        text = _name(metainfo, int(labels[i])) + ('' if scores is None else f' {scores[i]:.2f}')
        colour = _colour(metainfo, int(labels[i]))
        left, top, right, bottom = font.getbbox(text)
        wide, high = int(right - left) + 6, int(bottom - top) + 5
        x = min(max(0.0, float(boxes[i][0]) * factor), max(0, picture.width - wide))
        y = float(boxes[i][1]) * factor
        y = y - high if y >= high else min(max(y, 0.0), picture.height - high)  # above the box, or inside its top
        pen.rectangle((x, y, x + wide - 1, y + high - 1), fill=colour)
        pen.text((x + 3 - left, y + 2 - top), text, fill=_ink_on(colour), font=font)
    return np.asarray(picture)


def _regions(ground: np.ndarray, factor: int, mask: np.ndarray, metainfo: Metainfo) -> np.ndarray:
    """Class colours over the greyed picture with a thin rim between classes; ignored pixels (255) stay grey.

    Class 0 stays uncoloured where its palette entry is black, as backgrounds are.
    """
    grey = np.repeat((ground @ np.array([0.299, 0.587, 0.114]))[..., None], 3, axis=2)
    canvas = (0.75 * grey).astype(np.float32)
    large = mask.repeat(factor, 0).repeat(factor, 1)
    for label in np.unique(mask):
        colour = np.array(_colour(metainfo, int(label)), dtype=np.float32)
        if label == 255 or not colour.any():
            continue
        where = large == label
        canvas[where] = 0.4 * grey[where] + 0.6 * colour
        canvas[_rim(where)] = colour
    return canvas.clip(0, 255).astype(np.uint8)


def _segments(ground: np.ndarray, factor: int, ids: np.ndarray, labels: np.ndarray, metainfo: Metainfo) -> np.ndarray:
    """`_regions` of the segments' classes, and a rim around each segment, so that touching ones stay apart."""
    canvas = _regions(ground, factor, np.append(255, labels)[ids], metainfo)
    large = ids.repeat(factor, 0).repeat(factor, 1)
    for number in range(1, len(labels) + 1):
        colour = _colour(metainfo, int(labels[number - 1]))
        if any(colour):
            canvas[_rim(large == number)] = colour
    return canvas


def _rim(mask: np.ndarray) -> np.ndarray:
    """Pixels of a boolean mask with a neighbour (of 4) outside it."""
    padded = np.pad(mask, 1, mode='edge')
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside


def _under(picture: np.ndarray, caption: str, colour: tuple[int, int, int] = _PLAIN) -> np.ndarray:
    """The picture under a band that holds the caption."""
    band = Image.new('RGB', (picture.shape[1], _BAND), colour)
    ImageDraw.Draw(band).text((6, 2), caption, fill=(255, 255, 255), font=ImageFont.load_default(_FONT))
    return np.vstack([np.asarray(band), picture])


def _beside(panels: Sequence[np.ndarray]) -> np.ndarray:
    """Panels of one height in a row, 4 white pixels apart."""
    height = max(panel.shape[0] for panel in panels)
    row = []
    for panel in panels:
        filled = np.pad(panel, ((0, height - panel.shape[0]), (0, 0), (0, 0)), constant_values=255)
        row += [filled, np.full((height, 4, 3), 255, dtype=np.uint8)]
    return np.hstack(row[:-1])


def _enlarged(picture: np.ndarray, resample: Image.Resampling) -> tuple[np.ndarray, int]:
    """The picture with its sides times the least whole factor that makes the shorter one legible, and that factor."""
    height, width = picture.shape[:2]
    factor = max(1, min(16, math.ceil(_LEGIBLE / min(height, width))))
    return _resized(picture, height * factor, width * factor, resample), factor


def _resized(
    picture: np.ndarray, height: int, width: int, resample: Image.Resampling = Image.Resampling.BILINEAR
) -> np.ndarray:
    if picture.shape[:2] == (height, width):
        return picture
    return np.asarray(Image.fromarray(picture).resize((int(width), int(height)), resample))


def _array(values: Any) -> np.ndarray:
    return torch.as_tensor(values).detach().cpu().numpy()


def _name(metainfo: Metainfo, label: int) -> str:
    classes = metainfo.get('classes') or ()
    return str(classes[label]) if 0 <= label < len(classes) else str(label)


def _colour(metainfo: Metainfo, label: int) -> tuple[int, int, int]:
    palette = metainfo.get('palette') or ()
    if 0 <= label < len(palette):
        red, green, blue = (int(value) for value in palette[label])
        return red, green, blue
    red, green, blue = (round(255 * value) for value in colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.8, 0.95))
    return red, green, blue


def _ink_on(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    return (0, 0, 0) if 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140 else (255, 255, 255)
