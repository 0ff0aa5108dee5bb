"""Models with fewer tokens against the same models with all of them, and against the authors' own code.

A classifier of 224 x 224 pixels, float32, evaluation mode. A ratio of 2 means twice the images per second. With
`authors`, a checkout of https://github.com/facebookresearch/ToMe, its patch on the same model of timm's. The last lines
are what matching and merging alone take, measured inside the reduced model: there the peer is the whole pass.
"""

import copy
import importlib
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from densezoo.backbones import create_model, reduce_tokens
from densezoo.backbones.reduction import METHODS, report

from .timing import Comparison, compare

# the papers' settings, for the methods that are there
SETTINGS: dict[str, dict[str, Any]] = {
    'mctf': {'r': 16},
    'tome': {'r': 16},
    'stvit': {},
    'ats': {},
}


def run(
    *,
    model: str = 'deit_small_patch16_224',
    methods: list[str] | None = None,
    batch: int = 16,
    size: int = 224,
    repeats: int = 8,
    authors: str | None = None,
) -> list[Comparison]:
    """Forward passes of each method against the unreduced model, then their overhead.

    Raises:
        ValueError: no such method.  FileNotFoundError: `authors` is no checkout of ToMe.
    """
    torch.manual_seed(0)
    whole = create_model(model, img_size=size).eval()
    images = torch.randn(batch, 3, size, size)
    chosen = [name for name in SETTINGS if name in METHODS] if methods is None else methods
    rows, overheads = [], []
    with torch.inference_mode():
        for method in chosen:
            reduced: Any = reduce_tokens(whole, method, **SETTINGS.get(method, {}))
            found = report(reduced, img_size=size)
            name = f'{method} on {model}, {found.macs / 1e9:.2f} of {found.unreduced_macs / 1e9:.2f} GMACs'
            peer_name = 'all tokens'
            ours, theirs = partial(reduced, images), partial(whole, images)
            rows.append(compare(name, ours, theirs, peer_name=peer_name, repeats=repeats))
            if reduced.reduction.overhead:
                overheads.append(overhead(method, reduced, images, repeats))
        if authors is not None:
            rows.append(against_authors(authors, model, images, repeats))
    return rows + overheads


def overhead(method: str, reduced: Any, images: Tensor, repeats: int) -> Comparison:
    """Seconds inside the methods that only a reduction has, beside those of the whole pass that they were part of."""
    spent = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            result = function(*arguments)
            spent += time.perf_counter() - start
            return result

        return call

    watched = copy.deepcopy(reduced)
    for name in watched.reduction.overhead:
        setattr(watched.reduction, name, timed(getattr(watched.reduction, name)))
    best = (float('inf'), float('inf'))
    for _ in range(repeats):
        spent, start = 0.0, time.perf_counter()
        watched(images)
        best = min(best, (time.perf_counter() - start, spent))
    total, inside = best
    name = f'{method}: matching and merging, {inside / total:.1%} of the pass'
    return Comparison(name=name, ours=inside, peer=total, peer_name='the pass')


def against_authors(folder: str, name: str, images: Tensor, repeats: int) -> Comparison:
    """ToMe with r = 16 on the same model of timm's, ours against the authors' patch, which gives the same logits."""
    ours, theirs = timm.create_model(name).eval(), timm.create_model(name).eval()
    theirs.load_state_dict(ours.state_dict())
    patch(folder, theirs)
    theirs.r = 16  # type: ignore[assignment]
    reduced = reduce_tokens(ours, 'tome', r=16)
    with torch.inference_mode():
        deviation = float((reduced(images) - theirs(images)).abs().max())
    if deviation > 1e-3:
        raise RuntimeError(f"the authors' patch computes something else, deviation {deviation:.3g}")
    sides = partial(reduced, images), partial(theirs, images)
    return compare(f'tome on timm {name}', *sides, peer_name="authors' patch", repeats=repeats)


def patch(folder: str, model: nn.Module) -> None:
    """Applies the authors' patch to a model of timm's, in place.

    Raises:
        FileNotFoundError: the folder is no checkout of ToMe.
    """
    if not (Path(folder) / 'tome' / 'patch' / 'timm.py').is_file():
        raise FileNotFoundError(
            f'no such file: {Path(folder) / "tome/patch/timm.py"}; --authors needs a checkout of '
            'https://github.com/facebookresearch/ToMe'
        )
    sys.path.insert(0, str(folder))
    try:
        importlib.import_module('tome.patch.timm').apply_patch(model)
    finally:
        sys.path.remove(str(folder))
