"""``clipscale explain-check``: deletion and insertion curves of explanations over a data set, beside two baselines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import rich.console
import torch
from rich.progress import track
from rich.table import Table

from clipscale.apps.asking import ask
from clipscale.apps.explain.command import MOST_PIXELS
from clipscale.apps.writing import check_writable, whole
from clipscale.data.collections import IMAGE_KEYS, open_collection
from clipscale.data.evalset import EvalItem, EvalSet
from clipscale.data.samples import find_captions
from clipscale.errors import ConfigError, DataError
from clipscale.evals import EvalContext
from clipscale.evals.bootstrap import interval, resampled_means
from clipscale.evals.explain import contrast
from clipscale.evals.faithful import FILLS, Curves, area, chance, curves, edges
from clipscale.evals.relevance import cells, methods, relevance

BASELINES = ("edges", "random")
KINDS = ("deletion", "insertion")


@dataclass(frozen=True)
class Options:
    """What is checked: see ``clipscale explain-check --help``."""

    caption_key: str = "txt"
    images: int = 200
    fill: str = "blur"
    contrast: bool = False
    batch_size: int = 32


def check(where: str, dataset: str, options: Options, out: Path | None, device: str, as_json: bool) -> dict[str, Any]:
    """Measure, write the picture ``out`` if it is given, and print a table or JSON.

    Raises ClipscaleError for a model or data that are not there or cannot be explained.
    """
    if options.fill not in FILLS:
        raise ConfigError(f"--fill {options.fill}: choose from {', '.join(FILLS)}")
    if out is not None and out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out}: the picture is a .png")
    context = ask(where, device)
    if out is not None:
        check_writable(out, "--out")
    items, unusable = _items(context, dataset, options)
    found = measure(context, items, options)
    result = summary(found, options) | {"unusable": unusable}
    if out is not None:
        from clipscale.apps.explain.curves_picture import draw

        shown = draw(found, result)
        with whole(out) as file:
            file.write(shown)
    if as_json:
        print(json.dumps(result))
    else:
        _print(result, out)
    return result


def _items(context: EvalContext, dataset: str, options: Options) -> tuple[list[EvalItem], int]:
    """Usable samples, evenly over the data, and how many of those that were chosen are not."""
    captions = partial(find_captions, caption_key=options.caption_key)
    data = EvalSet(open_collection(dataset), IMAGE_KEYS, context.model.config.vision, MOST_PIXELS, [captions])
    count = min(options.images, len(data))
    places = [i * len(data) // count for i in range(count)]
    read = [data.read(place, place + 1)[0] for place in track(places, "images", console=_progress())]
    items = [item for item in read if isinstance(item, EvalItem)]
    if len(items) < 2:
        raise DataError(f"{dataset}: none or one of {len(read)} samples can be used; check --caption-key")
    return items, len(read) - len(items)


def measure(context: EvalContext, items: list[EvalItem], options: Options) -> dict[str, Curves]:
    """The curves of each method that fits the model, and of the baselines; ``items`` have captions."""
    tower = context.model.visual
    grid = cells(tower)
    directions = _directions(context, [item.fields[0][0] for item in items], options.contrast)
    generator = torch.Generator().manual_seed(0)
    ours = methods(tower)
    parts: dict[str, list[Curves]] = {name: [] for name in (*ours, *BASELINES)}
    for start, stop in track(list(_batches(len(items), options.batch_size)), "curves", console=_progress()):
        images = torch.stack([item.image for item in items[start:stop]]).to(context.device)
        some = directions[start:stop].to(context.device)
        maps = {name: relevance(tower, images, some, name) for name in ours}
        maps |= {"edges": edges(images, grid), "random": chance(len(images), grid, generator)}
        for name, heat in maps.items():
            parts[name].append(curves(tower, images, some, heat, options.fill))
    return {name: Curves(*(torch.cat(c) for c in zip(*((p.deletion, p.insertion) for p in found), strict=True)))
            for name, found in parts.items()}  # fmt: skip


def _directions(context: EvalContext, captions: list[str], against_others: bool) -> torch.Tensor:
    """Float[N, D] of each image's caption, less, if asked, the mean of the other captions that there are."""
    texts = list(dict.fromkeys(captions))
    features = context.encode_captions(texts)
    own = torch.tensor([texts.index(caption) for caption in captions])
    if not against_others:
        return features[own]
    if len(texts) < 2:
        raise DataError("--contrast needs captions that differ; all images have the same one")
    others = (features.sum(0) - features) / (len(texts) - 1)
    return contrast(features[own], others[own][:, None])


def _batches(count: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, size):
        yield start, min(start + size, count)


def summary(found: dict[str, Curves], options: Options) -> dict[str, Any]:
    """Plain values: the area under each curve, and paired differences between methods and baselines, with 95 %
    intervals over images."""
    areas = {name: {kind: area(getattr(of, kind)) for kind in KINDS} for name, of in found.items()}
    first = next(iter(found.values())).deletion
    return {
        "images": len(first),
        "cells": first.shape[1] - 1,
        "fill": options.fill,
        "contrast": options.contrast,
        "score": float(first[:, 0].mean()),
        "score_without_image": float(first[:, -1].mean()),
        "area": {name: {kind: _with_interval(values) for kind, values in of.items()} for name, of in areas.items()},
        "minus": {
            method: {base: {kind: _compared(areas, method, base, kind) for kind in KINDS} for base in BASELINES}
            for method in found
            if method not in BASELINES
        },
        "mean_curves": {
            name: {kind: getattr(of, kind).mean(0).tolist() for kind in KINDS} for name, of in found.items()
        },
    }


def _compared(areas: dict[str, dict[str, torch.Tensor]], method: str, base: str, kind: str) -> dict[str, float]:
    """The paired difference of the areas, and the share of images on which the method is better."""
    difference = areas[method][kind] - areas[base][kind]
    better = difference < 0 if kind == "deletion" else difference > 0
    return _with_interval(difference) | {"better": float(better.double().mean())}


def _with_interval(values: torch.Tensor) -> dict[str, float]:
    low, high = interval(resampled_means(values))
    return {"mean": float(values.mean()), "low": low, "high": high}


def _print(result: dict[str, Any], out: Path | None) -> None:
    console = rich.console.Console(highlight=False, emoji=False)
    what = "caption against the others'" if result["contrast"] else "cosine similarity"
    left_out = f" ({result['unusable']} could not be used)" if result["unusable"] else ""
    console.print(
        f"{result['images']} images{left_out}, {what} {result['score']:.4f}, {result['score_without_image']:.4f} "
        f"without the image ({result['fill']}); mean height of the curve, with 95 % intervals",
        soft_wrap=True,
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("", "deletion (low is good)", "insertion (high is good)"):
        table.add_column(heading, no_wrap=True)
    for name, of in result["area"].items():
        table.add_row(name, *(_told(of[kind], "{:.4f}") for kind in KINDS))
    for method, bases in result["minus"].items():
        for base, of in bases.items():
            table.add_row(f"{method} - {base}", *(_told(of[kind], "{:+.4f}") for kind in KINDS))
    console.print(table)
    if out is not None:
        console.print(str(out), soft_wrap=True, markup=False)


def _told(value: dict[str, float], form: str) -> str:
    return f"{form.format(value['mean'])} [{form.format(value['low'])}, {form.format(value['high'])}]"


def _progress() -> rich.console.Console:
    return rich.console.Console(stderr=True)
