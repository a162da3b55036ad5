"""``clipscale generalise``: does a model generalise, or has it memorised what it was trained on?"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import rich.console
import rich.table
import torch
from rich.markup import escape
from rich.progress import track

from clipscale.apps.asking import ask
from clipscale.apps.probing.contact import KINDS, Contact, contacts, digest, perceived
from clipscale.apps.probing.generalise_page import page
from clipscale.apps.probing.sets import (
    check_labels,
    class_names,
    explaining,
    images_of,
    labels_at,
    open_labelled,
    texts_at,
    warn_of_damage,
    watched,
)
from clipscale.apps.writing import check_writable, whole_text
from clipscale.data.collections import Collection
from clipscale.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from clipscale.data.evalset import Changed, EvalItem, EvalSet
from clipscale.data.order import permutation
from clipscale.data.samples import Member
from clipscale.distributed.collectives import rank
from clipscale.errors import ConfigError
from clipscale.evals.generalisation import Measured, Part, Question, gap, quarters

REPORT, NUMBERS, NEIGHBOURS = "report.html", "report.json", "neighbours.csv"


@dataclass(frozen=True)
class Options:
    """What is asked for; ``shifted`` are ``NAME=DATASET``."""

    shifted: Sequence[str] = ()
    classes: Path | None = None
    label_key: str | None = None
    text_key: str = "txt"
    most: int = 5000
    corruptions: bool = True
    seed: int = 0


@dataclass(frozen=True)
class _Set:
    """A data set and what was found of its usable images."""

    images: EvalSet
    features: torch.Tensor
    items: list[EvalItem]
    bad: int

    def at(self, places: torch.Tensor) -> tuple[torch.Tensor, list[EvalItem]]:
        return self.features[places], [self.items[place] for place in places.tolist()]


def generalise(
    where: str,
    train: str,
    held_out: str,
    out: Path,
    options: Options,
    device: str,
    batch_size: int | None,
    as_json: bool,
) -> dict[str, Any]:
    """Measure, write ``out/{report.html,report.json,neighbours.csv}``, and print tables, or the JSON; the same as a
    dictionary (empty on other ranks).

    Memory: the features of all training images, and about 600 bytes for each. Raises ClipscaleError for a model or data
    that are not there, or without labels or texts.
    """
    if wrong := next((one for one in options.shifted if not all(one.partition("="))), None):
        raise ConfigError(f"--shifted {wrong}: give NAME=DATASET")
    names = [one.partition("=")[0] for one in options.shifted]
    if taken := next((one for one in names if one in ("train", "held out") or names.count(one) > 1), None):
        raise ConfigError(f"--shifted {taken}=…: another set has this name; choose one of its own")
    if options.most < 1:
        raise ConfigError(f"--most {options.most}: damage one image or more")
    context = ask(where, device, batch_size)
    if rank() == 0:
        check_writable(out / REPORT, "--out")
    named = {"train": train, "held out": held_out} | dict(one.split("=", 1) for one in options.shifted)
    opened = {name: open_labelled(place, _split(name), options.label_key) for name, place in named.items()}
    question = Question(context, class_names(options.classes, *opened.values()))
    sets = {name: _read(question, collection, options, name) for name, collection in opened.items()}
    measured = {name: question.measure(one.features, one.items) for name, one in sets.items() if name != "train"}
    _warn_of_easier(question, sets)
    sampled = sets["train"].at(question.sample(sets["train"].items, sets["held out"].items, options.seed))
    measured = {"train": question.measure(*sampled)} | measured
    damaged = _damaged(question, sets["held out"], options) if options.corruptions else {}
    if rank():
        return {}
    found = contacts(sets["train"].features, sets["train"].items, sets["held out"].features, sets["held out"].items)
    told: dict[str, Any] = {"model": where, "question": "zeroshot" if question.classes else "retrieval"}
    told["sets"] = {name: _about(named[name], one) for name, one in sets.items()}
    told |= _numbers(measured, found) | {"corruptions": damaged}
    _write(out, told, sets, found)
    print(json.dumps(told)) if as_json else _print(told, out)
    return told


def _warn_of_easier(question: Question, sets: dict[str, _Set]) -> None:
    """Say that training images have fewer texts to choose from, where they do: the gap is then too large."""
    known, asked = (len({item.fields[0][0] for item in sets[name].items}) if question.classes is None else 0
                    for name in ("train", "held out"))  # fmt: skip
    if known < asked and not rank():
        print(
            f"warning: --train has {known:,} texts and --held-out {asked:,}: among fewer an answer is easier, and the "
            "gap larger than it is; name more of --train, or less of --held-out",
            file=sys.stderr,
        )


def _split(name: str) -> str:
    return "train" if name == "train" else "test"


def _read(question: Question, collection: Collection, options: Options, name: str) -> _Set:
    answer: Callable[[Member], Any] = partial(texts_at, key=options.text_key)
    if question.classes is not None:
        answer = labels_at(options.label_key, collection)
    warn_of_damage(collection)
    images = images_of(collection, question.context.model, answer, digest)
    keys = "--text-key" if question.classes is None else "--label-key"
    with explaining(name, keys), watched(question.context, name) as shown:
        features, items, bad = shown.encode_images(Changed(images, perceived))
    if question.classes is not None:
        check_labels([item.fields[0] for item in items], len(question.classes.names), name)
    return _Set(images, features, items, len(bad))


def _damaged(question: Question, held_out: _Set, options: Options) -> dict[str, list[dict[str, Any]]]:
    """Of each corruption and severity, the scores of held-out images under it; severity 0 is none."""
    places = [item.place for item in held_out.items]
    if len(places) > options.most:
        places = sorted(places[place] for place in permutation(len(places), options.seed)[: options.most].tolist())
    chosen = set(places)
    untouched = torch.tensor([number for number, item in enumerate(held_out.items) if item.place in chosen])
    clean = _parts(question.measure(*held_out.at(untouched)))
    found: dict[str, list[dict[str, Any]]] = {kind: [{"severity": 0, "scores": clean}] for kind in CORRUPTIONS}
    console = rich.console.Console(stderr=True)
    rounds = [(kind, severity) for kind in CORRUPTIONS for severity in SEVERITIES]
    for kind, severity in track(rounds, "corruptions", console=console, disable=bool(rank()), transient=True):
        images = Changed(held_out.images, partial(_corrupted, kind=kind, severity=severity), places)
        features, items, _ = question.context.encode_images(images)
        found[kind].append({"severity": severity, "scores": _parts(question.measure(features, items))})
    return found


def _corrupted(item: EvalItem, kind: str, severity: int) -> EvalItem:
    return replace(item, image=corrupt(item.image, kind, severity, item.key))


def _about(where: str, one: _Set) -> dict[str, Any]:
    return {"where": where, "images": len(one.items), "unusable": one.bad}


def _parts(measured: Measured, places: torch.Tensor | None = None) -> dict[str, Any]:
    found = {name: Part.of(hits if places is None else hits[places]) for name, hits in measured.hits.items()}
    return {name: None if part is None else asdict(part) for name, part in found.items()}


def _numbers(measured: dict[str, Measured], found: Sequence[Contact]) -> dict[str, Any]:
    held_out = measured["held out"]
    pairs = {name: gap(hits, held_out.hits[name]) for name, hits in measured["train"].hits.items()}
    copied = torch.tensor([bool(contact.copy) for contact in found])
    cosines = torch.tensor([contact.cosine for contact in found])
    kinds = [contact.copy for contact in found]
    return {
        "scores": {name: _parts(one) for name, one in measured.items()},
        "chance": {name: one.chance for name, one in measured.items()},
        "gap": {name: dict(zip(("value", "low", "high"), three, strict=True)) for name, three in pairs.items()},
        "contamination": {
            **{kind: kinds.count(kind) for kind in KINDS},
            "all": _parts(held_out), "clean": _parts(held_out, torch.nonzero(~copied).flatten()),
            "in_training": _parts(held_out, torch.nonzero(copied).flatten()),
        },
        "by_similarity": [
            {"from": cosines[places].min().item(), "to": cosines[places].max().item(),
             "scores": _parts(held_out, places)} for places in quarters(cosines) if len(places)
        ],
    }  # fmt: skip


def _write(out: Path, told: dict[str, Any], sets: dict[str, _Set], found: Sequence[Contact]) -> None:
    train, held_out = ({item.place: item.key for item in sets[name].items} for name in ("train", "held out"))
    with whole_text(out / NUMBERS) as file:
        file.write(json.dumps(told, indent=1) + "\n")
    with whole_text(out / NEIGHBOURS) as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["key", "nearest", "cosine", "copy", "copy_of"])
        for one in found:
            copy_of = train[one.copy_of] if one.copy else ""
            rows.writerow([held_out[one.place], train[one.nearest], f"{one.cosine:.4f}", one.copy, copy_of])
    report = page(told, sets["train"].images, sets["held out"].images, found)
    with whole_text(out / REPORT) as file:
        file.write(report)


def _print(told: dict[str, Any], out: Path) -> None:
    metrics = list(told["gap"])
    table = rich.table.Table("", "images", *(f"{metric}, %" for metric in metrics), title=escape(told["model"]))
    for column in table.columns[1:]:
        column.justify = "right"

    def row(name: str, scores: dict[str, Any]) -> None:
        parts = [scores[metric] for metric in metrics]
        table.add_row(escape(name), f"{parts[0]['count'] if parts[0] else 0:,}", *map(_cell, parts))

    for name, scores in told["scores"].items():
        row({"train": "training, a sample"}.get(name, name), scores)
    table.add_row("gap", "", *(_cell(told["gap"][metric]) for metric in metrics), style="bold")
    table.add_row("chance", "", *(f"{100 * told['chance']['held out'][metric]:.1f}" for metric in metrics))
    table.add_section()
    contamination = told["contamination"]
    row("held out, not in training", contamination["clean"])
    row("in training", contamination["in_training"])
    table.add_section()
    for quarter in told["by_similarity"]:
        row(f"nearest at {quarter['from']:.2f} to {quarter['to']:.2f}", quarter["scores"])
    for kind, levels in told["corruptions"].items():
        table.add_section()
        for level in levels[1:]:
            row(f"{kind} {level['severity']}", level["scores"])
    rich.console.Console().print(table)
    print(f"report: {out / REPORT}; neighbours: {out / NEIGHBOURS}")


def _cell(part: dict[str, Any] | None) -> str:
    if part is None:
        return "none"
    value, low, high = (100 * part[name] for name in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f} to {high:.1f})"
