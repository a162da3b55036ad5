"""What a check of shards found: a document of plain values, and tables of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.console
from rich.markup import escape
from rich.table import Table

from clipscale.apps.data.examine import shown
from clipscale.apps.data.repeats import Repeats
from clipscale.apps.data.summaries import Top
from clipscale.data.accounting import BadSamples, over_budget

WORST = 10  # shards that are named per reason; fewer in the table
REPEATED = 0.01  # share of all samples from which on a caption is said to be everywhere
REPEATED_LEAST = 10  # samples, or every caption of a small set would be


@dataclass(frozen=True)
class Report:
    """The whole of what was found, as ``report.json`` holds it."""

    document: Mapping[str, Any]

    @classmethod
    def make(
        cls, labels: Sequence[str], results: Sequence[Mapping[str, Any]], keys: Repeats, limit: float | None,
        captions: Top, examples: Sequence[Mapping[str, Any]],
    ) -> Report:  # fmt: skip
        """Add up the shards' results. ``limit`` is data.max_bad_fraction; ``examples`` are duplicate keys."""
        bad, warned, held = BadSamples(), BadSamples(), Top(5)
        for label, result in zip(labels, results, strict=True):
            bad.counts.update({(label, reason): count for reason, count in result["reasons"].items()})
            warned.counts.update({(label, warning): count for warning, count in result["warnings"].items()})
            held.counts.update(result["held"])
        samples, lost = sum(result["samples"] for result in results), bad.counts.total()
        named = {kind: {label: result[kind] for label, result in zip(labels, results, strict=True) if result[kind]}
                 for kind in ("damage", "unreadable", "mismatches", "hints")}  # fmt: skip
        fatal = over_budget(lost, samples - lost, limit, True) or lost == samples
        inside = sum(result["duplicate_keys"] for result in results)
        return cls({
            "shards": len(set(labels)), "samples": samples, "usable": samples - lost, "bad": lost,
            "bad_fraction": lost / samples if samples else 0.0, "max_bad_fraction": limit,
            "passed": not (fatal or named["unreadable"] or named["mismatches"]),
            "reasons": _by_reason(bad), "members_of_incomplete_samples": dict(held.best(5)),
            "unreadable_shards": named["unreadable"], "damaged_shards": named["damage"],
            "not_as_indexed": named["mismatches"], "not_as_hinted": named["hints"], "warnings": _by_reason(warned),
            "duplicate_keys": {"within_a_shard": inside, "across_shards": keys.extra - inside, "examples": examples},
            "repeated_captions": [
                {"caption": caption, "samples": count, "fraction": count / samples}
                for caption, count in captions.best(WORST) if count > max(REPEATED * samples, REPEATED_LEAST - 1)
            ],
        })  # fmt: skip


def _by_reason(found: BadSamples) -> dict[str, Any]:
    worst: dict[str, Counter[str]] = {}
    for (shard, reason), count in found.counts.items():
        worst.setdefault(reason, Counter())[shard] = count
    return {
        reason: {"samples": count, "worst_shards": dict(worst[reason].most_common(WORST))}
        for reason, count in found.by_reason().items()
    }


def print_report(report: Mapping[str, Any], output: Path) -> None:
    """Tables for people, and the verdict as the last lines."""
    console = rich.console.Console(highlight=False, emoji=False)
    for title, key in (("Samples that cannot be used", "reasons"), ("Used, but worth a look", "warnings")):
        if report[key]:
            console.print(_table(title, report[key], report["samples"]))
    if held := report["members_of_incomplete_samples"]:
        found = (f"{shown(members, 200)} in {count:,}" for members, count in held.items())
        console.print(f"what incomplete samples do hold: {escape('; '.join(found))}", soft_wrap=True)
    for title, key in (("cannot be read", "unreadable_shards"), ("is not as indexed", "not_as_indexed"),
                       ("has a wrong count beside it", "not_as_hinted"), ("is damaged", "damaged_shards")):  # fmt: skip
        _print_shards(console, title, report[key])
    for repeated in report["repeated_captions"]:
        console.print(f"one caption in {repeated['samples']:,} samples ({repeated['fraction']:.1%}): "
                      f"{escape(shown(repeated['caption'], 80))}")  # fmt: skip
    _print_duplicates(console, report["duplicate_keys"])
    console.print(f"{_verdict(report)}\nreport: {escape(str(output))}/report.json, bad_samples.csv, warnings.csv",
                  soft_wrap=True)  # fmt: skip


def _table(title: str, reasons: Mapping[str, Any], samples: int) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("reason", "samples", "share", "worst shards"):
        table.add_column(heading, justify="right" if heading in ("samples", "share") else "left", overflow="fold")
    for reason, found in reasons.items():
        worst = list(found["worst_shards"].items())[:3]
        names = ", ".join(f"{shown(shard.rpartition('/')[2], 60)} ({count:,})" for shard, count in worst)
        table.add_row(
            escape(shown(reason, 40)), f"{found['samples']:,}", f"{found['samples'] / samples:.2%}", escape(names)
        )
    return table


def _print_shards(console: rich.console.Console, title: str, shards: Mapping[str, Any]) -> None:
    for shard, what in list(shards.items())[:WORST]:
        text = what if isinstance(what, str) else "; ".join(what)
        console.print(f"shard {escape(shown(shard, 200))} {title}: {escape(shown(text, 300))}", soft_wrap=True)
    if len(shards) > WORST:
        console.print(f"… and {len(shards) - WORST:,} more shards, of which each {title}: see report.json")


def _print_duplicates(console: rich.console.Console, found: Mapping[str, Any]) -> None:
    if found["within_a_shard"] or found["across_shards"]:
        first = found["examples"][0]
        console.print(
            f"sample keys that occur again: {found['within_a_shard']:,} within a shard, {found['across_shards']:,} in "
            f"other shards; for example {escape(shown(first['key'], 60))} in "
            f"{escape(' and '.join(dict.fromkeys(shown(shard, 60) for shard in first['shards'])))}"
        )


def _verdict(report: Mapping[str, Any]) -> str:
    limit = report["max_bad_fraction"]
    text = (f"{report['samples']:,} samples in {report['shards']:,} shards, {report['bad']:,} of them "
            f"({report['bad_fraction']:.2%}) cannot be used")  # fmt: skip
    if report["passed"]:
        return f"{text}; training may lose {'any share' if limit is None else f'{limit:.2%}'} (data.max_bad_fraction)"
    if report["not_as_indexed"] or report["unreadable_shards"]:
        return f"{text}; shards that cannot be read, or are not as indexed, stop training: restore them"
    if report["bad"] == report["samples"]:
        return f"{text}: nothing to train on; see data.image_keys and data.caption_key"
    return f"{text}, more than data.max_bad_fraction={limit}: training would stop"
