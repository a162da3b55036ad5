"""``clipscale audit``: measure, and tell it as tables, JSON, or a page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import rich.console
import torch
from rich.markup import escape
from rich.table import Table

from clipscale.apps.asking import ask
from clipscale.apps.audit.captions import count_words
from clipscale.apps.audit.groups import Labels, parse_group, read_labels, read_words, text_at
from clipscale.apps.explain.command import MOST_PIXELS
from clipscale.apps.probing.sets import explaining, texts_at, warn_of_damage
from clipscale.apps.writing import check_writable, whole_text
from clipscale.data.collections import IMAGE_KEYS, open_collection
from clipscale.data.evalset import EvalSet
from clipscale.data.samples import Member, find_label
from clipscale.distributed.collectives import rank
from clipscale.errors import ConfigError, DataError
from clipscale.evals import Classes, EvalContext
from clipscale.evals.audit import Rate, Spread, rates

OFTEN = 5  # labels of each group that are listed


@dataclass(frozen=True)
class Options:
    """What is audited: see ``clipscale audit --help``."""

    group: Sequence[str]
    labels: Path | None = None
    captions: str | None = None
    words: Path | None = None
    caption_key: str = "txt"
    answer_key: str | None = None
    unit: str | None = None
    small: int = 30
    batch_size: int | None = None


def audit(where: str, dataset: str, options: Options, out: Path | None, device: str, as_json: bool) -> dict[str, Any]:
    """Measure, write the page ``out`` if it is given, and print tables or JSON. Under torchrun, ranks share the images,
    and the first one tells.

    Raises ClipscaleError for what is not there, or cannot be used.
    """
    if out is not None and out.suffix.lower() != ".html":
        raise ConfigError(f"--out {out}: the page is an .html")
    if (options.captions is None) != (options.words is None):
        raise ConfigError("--captions and --words go together: where captions are, and which words to look for")
    group_of = dict(map(parse_group, options.group))
    labels = read_labels(options.labels) if options.labels else None
    words = read_words(options.words) if options.words else None
    context = ask(where, device, options.batch_size)
    if out is not None and rank() == 0:
        check_writable(out, "--out")
    samples = open_collection(dataset)
    captions = open_collection(options.captions) if options.captions else None
    warn_of_damage(samples)
    classes = samples.about.classes if options.answer_key is None else ()
    answers = _answers(options.answer_key or options.caption_key, classes)
    fields = [answers, partial(_unit, key=options.unit), *group_of.values()]
    data = EvalSet(samples, IMAGE_KEYS, context.model.config.vision, MOST_PIXELS, fields)
    with explaining(dataset, "--answer-key and --caption-key"):
        image, items, bad = context.encode_images(data)
    own = [item.fields[0] for item in items]
    if classes:
        own = _class_names(own, classes, dataset)
    groups = {name: [item.fields[2 + place] for item in items] for place, name in enumerate(group_of)}
    for name, values in groups.items():
        if not any(values):
            raise DataError(f"--group {name}: no image of {dataset} belongs to a group; check the field or the keys")
    if options.unit and not any(item.fields[1] for item in items):
        raise DataError(f"--unit {options.unit}: no image of {dataset} has it; check the field")
    units = [item.fields[1] or item.place for item in items]  # of its own, where the field is empty
    found: dict[str, Any] = {
        "model": Path(where).resolve().name if Path(where).exists() else where,
        "images": len(items),
        "unusable": len(bad),
        "unit": options.unit,
        "units": len(set(units)),
        "small": options.small,
        "groups": {name: dict(Counter(v for v in values if v).most_common()) for name, values in groups.items()},
    }
    found["accuracy"] = {
        "of": "class" if classes else options.answer_key or options.caption_key,
        **_accuracy(context, image, own, groups, units, options.small),
    }
    if labels is not None:
        found["labels"] = _associations(context, image, labels, groups, units, options.small)
    if rank() != 0:
        return found
    if words is not None and captions is not None:
        warn_of_damage(captions)
        found["captions"] = count_words(captions, options.caption_key, words)
    if as_json:
        print(json.dumps(found))
    else:
        _print(found)
    if out is not None:
        from clipscale.apps.audit.page import page

        shown = page(found)
        with whole_text(out) as file:
            file.write(shown)
        if not as_json:
            print(out)
    return found


def _answers(key: str, classes: Sequence[str]) -> Callable[[Member], Any]:
    """What finds the number of a sample's class, or where there are none its first text at ``key``."""
    return partial(find_label, key="cls") if classes else lambda sample: texts_at(sample, key)[0]


def _class_names(labels: Sequence[int], classes: Sequence[str], dataset: str) -> list[str]:
    if not 0 <= min(labels) <= max(labels) < len(classes):
        raise DataError(
            f"the labels of {dataset} run from {min(labels)} to {max(labels)}, and it names {len(classes)} classes; "
            "mend them, or say where a text for each image stands: --answer-key"
        )
    return [classes[label] for label in labels]


def _unit(sample: Member, key: str | None) -> str | None:
    return None if key is None else text_at(sample, key)


def _accuracy(
    context: EvalContext,
    image: torch.Tensor,
    own: Sequence[str],
    groups: dict[str, list[str | None]],
    units: Sequence[Hashable],
    small: int,
) -> dict[str, Any]:
    """Whether an image's own text is the most similar one of all texts of the data set."""
    texts = list(dict.fromkeys(own))
    best = _best(image, context.encode_captions(texts))
    right = [texts[place] == text for place, text in zip(best, own, strict=True)]
    return {"texts": len(texts), "chance": 1 / len(texts), **_by_group(right, groups, units, small)}


def _associations(
    context: EvalContext,
    image: torch.Tensor,
    labels: Labels,
    groups: dict[str, list[str | None]],
    units: Sequence[Hashable],
    small: int,
) -> dict[str, Any]:
    """Which of the labels, of all sets together, is the most similar one (CLIP paper, section 7.1, tables 6 and 7)."""
    names = [label for of in labels.sets.values() for label in of]
    set_of = [name for name, of in labels.sets.items() for _ in of]
    best = _best(image, Classes(names, labels.templates, {}).embed(context))
    often = {
        name: {
            group: [[names[label], count / size] for label, count in Counter(
                label for label, value in zip(best, values, strict=True) if value == group
            ).most_common(OFTEN)]
            for group, size in sorted(Counter(value for value in values if value).items())
        }
        for name, values in groups.items()
    }  # fmt: skip
    return {
        "templates": labels.templates,
        "sets": {
            name: {"labels": of, **_by_group([set_of[label] == name for label in best], groups, units, small)}
            for name, of in labels.sets.items()
        },
        "most_frequent": often,
    }


def _best(image: torch.Tensor, texts: torch.Tensor) -> list[int]:
    """Of each image the text that is most similar, in parts, since images times texts may be many."""
    return [place for some in image.split(4096) for place in (some @ texts.T).argmax(dim=1).tolist()]


def _by_group(
    true: Sequence[bool], groups: dict[str, list[str | None]], units: Sequence[Hashable], small: int
) -> dict[str, Any]:
    overall = rates(true, ["all"] * len(true), units, small).groups["all"]
    spreads = {name: _ordered(rates(true, values, units, small), values) for name, values in groups.items()}
    return {"overall": asdict(overall), "by": {name: asdict(spread) for name, spread in spreads.items()}}


def _ordered(spread: Spread, values: Sequence[str | None]) -> Spread:
    """The same, with the largest groups first."""
    sizes = Counter(value for value in values if value)
    return replace(spread, groups={name: spread.groups[name] for name, _ in sizes.most_common()})


def told(rate: Rate | Mapping[str, Any]) -> str:
    """A rate and its interval, as tables show them."""
    value = asdict(rate) if isinstance(rate, Rate) else rate
    return f"{value['rate']:.1%} [{value['low']:.1%}, {value['high']:.1%}]"


def gap_in_words(spread: Mapping[str, Any]) -> str:
    """What can be said of a gap, and no more."""
    if spread["gap"] is None:
        return "No gap is given: fewer than two groups are large enough."
    verdict = "more than dealing the groups at random gives" if spread["p"] < 0.05 else "no more than chance may give"
    return (
        f"Gap {spread['gap']:.1%}, from {spread['lowest']} to {spread['highest']}: {verdict} (95 % of random gaps are "
        f"below {spread['gap_by_chance']:.1%}; p = {spread['p']:.3f})."
    )


def _print(found: dict[str, Any]) -> None:
    console = rich.console.Console(highlight=False, emoji=False)
    console.print(
        f"{found['images']:,} images ({found['unusable']:,} unusable), {found['units']:,} units; 95 % intervals; "
        f"* marks groups of fewer than {found['small']} units",
        soft_wrap=True,
    )
    for name, groups in found["groups"].items():
        if none := found["images"] - sum(groups.values()):
            console.print(f"{none:,} images are of no {name}", soft_wrap=True, markup=False)
    _print_rates(console, f"accuracy, one of {found['accuracy']['texts']:,} texts", found["accuracy"])
    for name, of in found.get("labels", {}).get("sets", {}).items():
        _print_rates(console, f"labelled {name}", of)
    if "captions" in found:
        _print_words(console, found["captions"])


def _print_rates(console: rich.console.Console, title: str, of: dict[str, Any]) -> None:
    console.print(escape(f"\n{title}: {told(of['overall'])} of all"), style="bold")
    for name, spread in of["by"].items():
        table = Table(box=None, padding=(0, 2, 0, 2))
        for heading in (name, "images", "units", "rate"):
            table.add_column(escape(heading), justify="left" if heading == name else "right", no_wrap=True)
        for group, rate in spread["groups"].items():
            mark = "*" if rate["small"] else ""
            table.add_row(escape(group) + mark, f"{rate['images']:,}", f"{rate['units']:,}", told(rate))
        console.print(table)
        console.print("  " + escape(gap_in_words(spread)), soft_wrap=True)


def _print_words(console: rich.console.Console, found: dict[str, Any]) -> None:
    without = f" ({found['without_caption']:,} more have none)" if found["without_caption"] else ""
    title = f"captions of {found['samples']:,} training samples{without}, log odds against captions of other groups"
    console.print(f"\n{title}", style="bold", soft_wrap=True)
    table = Table(box=None, padding=(0, 2, 0, 2))
    for heading in ("group", "attribute", "both", "of its", "log odds", "PMI, bits"):
        table.add_column(heading, justify="left" if heading in ("group", "attribute") else "right", no_wrap=True)
    for group, row in found["associations"].items():
        for attribute, one in row.items():
            odds = f"{one['log_odds']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}]"
            share = f"{one['both'] / one['named']:.1%}" if one["named"] else ""
            pmi = "" if one["pmi"] is None else f"{one['pmi']:+.2f}"
            table.add_row(escape(group), escape(attribute), f"{one['both']:,}", share, odds, pmi)
    console.print(table)
