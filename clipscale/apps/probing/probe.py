"""``clipscale probe``: how far simple classifiers on a model's frozen features get, with all labels and with few."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rich.console
import rich.table
import torch
from rich.markup import escape
from rich.progress import track

from clipscale.apps.asking import ask
from clipscale.apps.probing.contact import digest
from clipscale.apps.probing.few_shot_plot import plot_few_shot
from clipscale.apps.probing.sets import (
    check_labels,
    class_names,
    explaining,
    images_of,
    labels_at,
    open_labelled,
    warn_of_damage,
    watched,
)
from clipscale.apps.writing import check_writable
from clipscale.data.collections import Collection
from clipscale.distributed.collectives import rank
from clipscale.errors import ConfigError
from clipscale.evals import EvalContext
from clipscale.evals.bootstrap import share_interval
from clipscale.evals.fewshot import Shots, draw_shots, few_shot
from clipscale.evals.linear_probe import Labelled, hold_out, linear_probe
from clipscale.evals.neighbours import choose_k, votes
from clipscale.evals.zeroshot import Classes

_SPLITS = {"train": "train", "val": "train", "test": "test"}  # of CLIP_benchmark's layout


@dataclass(frozen=True)
class Options:
    """What is asked for; ``k`` None chooses it; ``few`` are numbers of shots."""

    val: str | None = None
    classes: Path | None = None
    label_key: str | None = None
    few: Sequence[int] = ()
    draws: int = 3
    k: int | None = None
    embedding: bool = False
    float32: bool = False
    seed: int = 0
    plot: Path | None = None


@dataclass(frozen=True)
class Score:
    """Accuracy with its 95 % interval (over test images), and the mean over classes of their recall."""

    top1: float
    low: float
    high: float
    mean_per_class: float

    @staticmethod
    def of(scores: torch.Tensor, labels: torch.Tensor) -> Score:
        """Of Float[N, K] and Int64[N]."""
        hits = (scores.argmax(dim=1) == labels).double()
        recalls = [hits[labels == label].mean().item() for label in labels.unique().tolist()]
        return Score(hits.mean().item(), *share_interval(hits), sum(recalls) / len(recalls))


def probe(
    where: str, train: str, test: str, options: Options, device: str, batch_size: int | None, as_json: bool
) -> dict[str, Any]:
    """Probe the features of a model and print a table, or JSON; the same as a dictionary (empty on other ranks).

    Raises ClipscaleError for a model or data that are not there, labels outside the classes, and too few images.
    """
    if (options.few and min(options.few) < 1) or options.draws < 1 or (options.k or 1) < 1:
        raise ConfigError("--shots, --draws and --k are numbers from 1 on")
    if options.plot is not None and not options.few:
        raise ConfigError("--plot shows the few-shot curve; say how many shots: --shots 1,2,4,8,16")
    context = ask(where, device, batch_size)
    if options.plot is not None and rank() == 0:
        check_writable(options.plot, "--plot")
    places = {"train": train, "test": test} | ({"val": options.val} if options.val else {})
    opened = {name: open_labelled(place, _SPLITS[name], options.label_key) for name, place in places.items()}
    classes = class_names(options.classes, *opened.values())
    encoded = {name: _features(context, collection, options, name) for name, collection in opened.items()}
    parts = {name: one.part for name, one in encoded.items()}
    known = torch.cat([part.labels for part in parts.values()]).unique()
    for name, part in parts.items():
        check_labels(part.labels.tolist(), int(known[-1]) + 1 if classes is None else len(classes.names), name)
    if classes is None:  # those that occur: labels may begin at 1, and have holes
        names = [str(label) for label in known.tolist()]
        parts = {name: Labelled(part.features, torch.searchsorted(known, part.labels)) for name, part in parts.items()}
    else:
        names = classes.names
    zeroshot = None if classes is None else _zeroshot(context, opened["test"], classes, options)
    if rank():
        return {}
    seen = _seen(encoded)
    found = _measure(parts, names, zeroshot, options)
    found |= {"unusable": {name: one.bad for name, one in encoded.items()}, "seen_in_training": seen}
    print(json.dumps(found)) if as_json else _print(where, found)
    if options.plot is not None:
        plot_few_shot(options.plot, found["few_shot"], found.get("zeroshot"), found["linear_probe"])
    return found


@dataclass(frozen=True)
class _Encoded:
    """The usable images of a set, a digest of each one's bytes, and how many samples could not be used."""

    part: Labelled
    digests: list[bytes]
    bad: int


def _seen(encoded: dict[str, _Encoded]) -> dict[str, int]:
    """How many images of the other sets are training images, and how many of the test set validation images, byte for
    byte; a warning where there are any."""
    known: set[bytes] = set()
    found: dict[str, int] = {}
    for name in ("train", "val", "test"):
        if name in encoded:
            found[name] = sum(one in known for one in encoded[name].digests)
            known.update(encoded[name].digests)
    del found["train"]
    for name, count in found.items():
        if count:
            others = "--train" if name == "val" or "val" not in encoded else "--train or --val"
            total = len(encoded[name].digests)
            print(f"warning: {count:,} of {total:,} images of --{name} are in {others} too: no test of them",
                  file=sys.stderr)  # fmt: skip
    return found


def _features(context: EvalContext, collection: Collection, options: Options, name: str) -> _Encoded:
    warn_of_damage(collection)
    images = images_of(collection, context.model, labels_at(options.label_key, collection), digest)
    with explaining(name, "--label-key"), watched(context, name) as shown:
        features, items, bad = shown.encode_images(images, projected=options.embedding)
    labels = torch.tensor([item.fields[0] for item in items])
    return _Encoded(Labelled(features, labels), [item.fields[1] for item in items], len(bad))


def _zeroshot(context: EvalContext, test: Collection, classes: Classes, options: Options) -> Score:
    image, items, _ = context.encode_images(images_of(test, context.model, labels_at(options.label_key, test)))
    return Score.of(image @ classes.embed(context).T, torch.tensor([item.fields[0] for item in items]))


def _measure(
    parts: dict[str, Labelled], names: Sequence[str], zeroshot: Score | None, options: Options
) -> dict[str, Any]:
    everything, test = parts["train"], parts["test"]
    dtype = torch.float32 if options.float32 else torch.float64
    if "val" in parts:
        train, held_out = everything, parts["val"]
        everything = everything.with_(held_out)
    else:
        train, held_out = map(everything.at, hold_out(everything.labels, seed=options.seed))
    for shots in options.few:  # that there are enough is known before the long work begins
        draw_shots(everything.labels, names, shots, options.seed, 0)
    fitted, scores = linear_probe(train, held_out, len(names), dtype)
    k = min(options.k or choose_k(train, held_out, len(names))[0], len(everything.labels))
    found: dict[str, Any] = {
        "train_images": len(everything.labels), "test_images": len(test.labels), "classes": len(names),
        "features": "embedding" if options.embedding else "before the projection",
        "dimensions": everything.features.shape[1], "chance": 1 / len(names),
        "linear_probe": asdict(Score.of(fitted.logits(test.features), test.labels)) | {
            "c": fitted.c, "objective": fitted.objective, "iterations": fitted.iterations,
            "converged": fitted.converged, "held_out_accuracy_by_c": {f"{c:.3g}": a for c, a in scores.items()},
        },
        "knn": asdict(Score.of(votes(everything, test.features, (k,), len(names))[k], test.labels)) | {"k": k},
    }  # fmt: skip
    if zeroshot is not None:
        found["zeroshot"] = asdict(zeroshot)
    found["few_shot"] = [asdict(shots) for shots in _few(everything, test, names, dtype, options)]
    return found


def _few(
    train: Labelled, test: Labelled, names: Sequence[str], dtype: torch.dtype, options: Options
) -> list[Shots]:  # fmt: skip
    console = rich.console.Console(stderr=True)
    shown = track(sorted(set(options.few)), "few-shot probes", console=console, disable=not options.few, transient=True)
    return [few_shot(train, test, names, shots, options.draws, options.seed, dtype) for shots in shown]


def _print(where: str, found: dict[str, Any]) -> None:
    title = (
        f"{escape(where)}: {found['train_images']:,} training and {found['test_images']:,} test images, "
        f"{found['classes']} classes, {found['dimensions']} features {found['features']}"
    )
    if bad := ", ".join(f"{count:,} of {name}" for name, count in found["unusable"].items() if count):
        title += f"; could not be used: {bad}"
    table = rich.table.Table("", "top 1", "95 % interval", "per class", "", title=title)
    for column in table.columns[1:4]:
        column.justify = "right"
    probed, near = found["linear_probe"], found["knn"]
    told = f"C {probed['c']:.3g}, {probed['iterations']} iterations"
    rows = [("linear probe", probed, told if probed["converged"] else f"{told}, not converged"),
            ("k nearest", near, f"k {near['k']}")]  # fmt: skip
    rows += [("zero-shot", found["zeroshot"], "")] if "zeroshot" in found else []
    for name, score, note in rows:
        table.add_row(name, f"{score['top1']:.1%}", _between(score), f"{score['mean_per_class']:.1%}", note)
    table.add_section()
    for shots in found["few_shot"]:
        draws = ", ".join(f"{value:.1%}" for value in shots["draws"])
        table.add_row(f"{shots['shots']} per class", f"{shots['mean']:.1%}", _between(shots), "", draws)
    table.add_row("chance", f"{found['chance']:.1%}", "", "", "")
    rich.console.Console().print(table)


def _between(score: dict[str, Any]) -> str:
    return f"{score['low']:.1%} to {score['high']:.1%}"
