"""Statistics of shards as a document of plain values, and as tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rich.console
from rich.markup import escape
from rich.table import Table

from clipscale.apps.data.describe import Summary
from clipscale.apps.data.examine import shown
from clipscale.apps.data.repeats import Repeats
from clipscale.apps.data.summaries import Top
from clipscale.apps.quantities import number, size

FREQUENT = 30  # words, captions and values that are listed
DISTRIBUTIONS = {  # of the document, by part: what each is called in tables
    "captions": {"characters": "characters per caption", "words": "words per caption", "tokens": "tokens per caption",
                 "captions_per_sample": "captions per sample"},
    "images": {"width": "width in pixels", "height": "height in pixels", "aspect_ratio": "width / height",
               "megapixels": "megapixels", "bytes_per_image": "bytes per image"},
    "shards": {"samples_per_shard": "samples per shard", "bytes_per_shard": "bytes per shard"},
}  # fmt: skip


def document(
    summary: Summary, captions: Repeats, tokenizer: str, context_length: int, damage: Mapping[str, str]
) -> dict[str, Any]:
    """The document ``stats.json``; every distribution as ``Spread.describe`` gives it.

    ``damage`` is of every shard, by label; empty for most.
    """
    samples, used, cut = (summary.counts.get(name, 0) for name in ("samples", "used", "cut"))
    spreads = {part: {name: summary.spread(name).describe() for name in names} for part, names in DISTRIBUTIONS.items()}
    return {
        "samples": samples,
        "usable": used,
        "unusable": dict(summary.top("reasons").best(FREQUENT)),
        "bytes": round(summary.spread("bytes_per_shard").total),
        "captions": spreads["captions"] | {
            "tokenizer": tokenizer, "context_length": context_length, "cut": cut, "cut_fraction": cut / captions.values,
            "distinct": captions.values - captions.extra, "duplicate_fraction": captions.extra / captions.values,
            "frequent_captions": _best(summary.top("captions"), least=2),
            "frequent_words": _best(summary.top("words")), "frequent_bigrams": _best(summary.top("bigrams")),
        },
        "images": spreads["images"] | {
            name: dict(summary.top(name).best(FREQUENT)) for name in ("formats", "modes")
        },
        "shards": spreads["shards"] | {
            "count": len(damage), "first": next(iter(damage)), "last": list(damage)[-1],
            "damaged": {shard: what for shard, what in damage.items() if what},
        },
        "members": dict(summary.top("members").best(FREQUENT)),
        "fields": {name: _field(summary, name) for name in _fields(summary)},
        "unreadable_json": summary.counts.get("unreadable_json", 0),
    }  # fmt: skip


def _best(top: Top, least: int = 1) -> list[list[Any]]:
    return [[text, count] for text, count in top.best(FREQUENT) if count >= least]


def _fields(summary: Summary) -> list[str]:
    named = [name.removeprefix("type:") for name in summary.tops if name.startswith("type:")]
    return sorted(named, key=lambda name: (-summary.top(f"type:{name}").counts.total(), name))


def _field(summary: Summary, name: str) -> dict[str, Any]:
    """One JSON field; ``distinct`` is null where there are more values than were kept."""
    types, values = summary.top(f"type:{name}"), summary.top(f"value:{name}")
    found: dict[str, Any] = {"present": types.counts.total(), "types": dict(types.best(FREQUENT))}
    for kind in ("number", "length"):
        if f"{kind}:{name}" in summary.spreads:
            found[kind] = summary.spread(f"{kind}:{name}").describe()
    if values.counts:
        found["distinct"] = None if values.lost else len(values.counts)
        found["frequent_values"] = _best(values)
    return found


def cells(name: str, found: Mapping[str, float]) -> list[str]:
    """A distribution's row: min, p5, median, mean, p95, max."""
    told = size if name.startswith("bytes_") else number
    return [told(found[key]) if found["count"] else "–" for key in ("min", "p5", "median", "mean", "p95", "max")]


def values(found: Mapping[str, Any], count: int) -> str:
    """What a JSON field holds, in a line."""
    parts = []
    for kind, name in (("number", ""), ("length", "length ")):
        if kind in found and found[kind]["count"]:
            parts.append(f"{name}{number(found[kind]['min'])} … {number(found[kind]['max'])}")
    if "distinct" in found:
        parts.append("very many values" if found["distinct"] is None else f"{found['distinct']:,} distinct")
        frequent = [f"{shown(str(text), 30)} ({times:,})" for text, times in found["frequent_values"] if times > 1]
        parts += [", ".join(frequent[:count])] if frequent else []
    return "; ".join(parts)


def print_stats(found: Mapping[str, Any], output: Path) -> None:
    """Tables for people."""
    console = rich.console.Console(highlight=False, emoji=False)
    bad = found["samples"] - found["usable"]
    console.print(
        f"{found['samples']:,} samples in {found['shards']['count']:,} shards, {size(found['bytes'])}; "
        f"{bad:,} ({bad / found['samples']:.2%}) cannot be used, and are in nothing that follows",
        soft_wrap=True,
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("", "min", "5 %", "median", "mean", "95 %", "max"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for part, names in DISTRIBUTIONS.items():
        for name, title in names.items():
            table.add_row(title, *cells(name, found[part][name]))
        table.add_row()
    console.print(table)
    captions = found["captions"]
    lines = [
        f"{captions['cut_fraction']:.2%} of the captions exceed {captions['context_length']} tokens and are cut",
        f"{captions['distinct']:,} distinct captions; {captions['duplicate_fraction']:.1%} repeat an earlier one",
        "most frequent words: " + ", ".join(shown(word, 30) for word, _ in captions["frequent_words"][:12]),
        "formats: " + ", ".join(f"{name} {count:,}" for name, count in found["images"]["formats"].items()),
    ]
    for name, about in list(found["fields"].items())[:12]:
        lines.append(f"json:{shown(name, 40)}: {' or '.join(about['types'])}, {values(about, 3)}".rstrip(", "))
    for shard, damage in list(found["shards"]["damaged"].items())[:5]:
        lines.append(f"shard {shown(shard, 80)} is damaged: {shown(damage, 200)}")
    lines.append(f"all of it: {output}/index.html, stats.json and the plots beside them")
    for line in lines:
        console.print(escape(line), soft_wrap=True)
