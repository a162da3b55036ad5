"""Which curves a report shows, of one run (several metrics each) or of several (one metric each, a line per run)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from clipscale.apps.quantities import number, size
from clipscale.apps.record import Points, Record
from clipscale.apps.report.curves import Curve, draw

COLOURS = 8
MARKED = {  # events that a chart shows, and what to call them
    "started": "started again", "rolled_back": "went back", "skipped_step": "a step was skipped",
    "config_changed": "the configuration changed", "save_failed": "a save failed",
}  # fmt: skip
Tell = Callable[[float], str]


def seconds(value: float) -> str:
    """A step's time."""
    return f"{1000 * value:.3g} ms" if 0 < value < 1 else f"{value:.3g} s"


def percent(value: float) -> str:
    """A share."""
    return f"{100 * value:.3g} %"


def small(value: float) -> str:
    """A number that may have many zeros behind its point."""
    return f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e") if 0 < abs(value) < 0.01 else number(value)


@dataclass(frozen=True)
class Chart:
    """Metrics that belong in one picture: ``{metric: what it is called there}``."""

    title: str
    metrics: dict[str, str]
    tell: Tell = number
    zero: bool = True
    chance: bool = False


def wait_share(record: Record) -> Points:
    """Over samples, the share of the time since the row before for which the main rank had no batch."""
    rows = [row for row in record.rows if "time/data_wait_s" in row and "time_s" in row]
    return [
        (b["samples_seen"], min(max(b["time/data_wait_s"] - a["time/data_wait_s"], 0) / (b["time_s"] - a["time_s"]), 1))
        for a, b in pairwise(rows)
        if b["time_s"] > a["time_s"]
    ]


DERIVED: dict[str, Callable[[Record], Points]] = {"share/data_wait": wait_share}
TRAINING = (
    Chart("Loss", {"train/loss": "training", "val/loss": "held out"}, zero=False),
    Chart("Right pair first in its batch", {"train/i2t_top1": "image → text", "train/t2i_top1":
          "text → image"}, percent),
    Chart("Logit scale (multiplier on similarities)", {"train/logit_scale": ""}, zero=False),
    Chart("Gradient norm, before clipping", {"train/grad_norm": ""}),
    Chart("Norm of the weights", {"train/param_norm": ""}, zero=False),
    Chart("Learning rate", {"train/lr": ""}, small),
)  # fmt: skip
SPEED = (
    Chart("Throughput, samples/s", {"train/samples_per_s": ""}),
    Chart("Throughput, samples/s per GPU", {"train/samples_per_s_per_gpu": ""}),
    Chart("Model FLOP utilisation", {"train/mfu": "what captions need", "train/mfu_nominal": "nominal"}, percent),
    Chart("Time of a step", {"train/step_s": "in all", "train/rank_s_max": "own work, slowest rank",
          "train/rank_s_min": "own work, quickest rank"}, seconds),
    Chart("Waiting for data, share of the time", {"share/data_wait": ""}, percent),
    Chart("Memory peak, fullest rank", {"train/memory_peak_bytes": ""}, size),
)  # fmt: skip
TIME = (Chart("Goodput so far", {"time/goodput": ""}, percent),)
DATA = (
    Chart("Bad samples so far", {"train/bad_samples": ""}),
    Chart("Tokens per caption", {"train/tokens_per_caption": ""}, zero=False),
    Chart("Pairs of a batch with a duplicate", {"train/duplicate_fraction": ""}, percent),
)
RECALL = {"r1": "R@1", "r5": "R@5", "r10": "R@10"}
EVALUATION = (
    *(Chart(f"Retrieval, {name}", {f"val/retrieval/{way}_{k}": label for k, label in RECALL.items()}, percent,
            chance=True) for way, name in (("i2t", "image → text"), ("t2i", "text → image"))),
    Chart("Zero-shot classification", {"val/zeroshot/top1": "top 1", "val/zeroshot/top5": "top 5"}, percent,
          chance=True),
    Chart("Classification", {"val/top1": "top 1", "val/top5": "top 5"}, percent, chance=True),
)  # fmt: skip


def pictures(charts: Sequence[Chart], records: Sequence[Record]) -> str:
    """The figures of those charts of which there is anything to show."""
    if len(records) == 1:
        found = [
            _figure(chart, _of_one(chart, records[0]), records[0]) for chart in charts if not _same(chart, records)
        ]
    else:
        found = [
            _figure(Chart(f"{chart.title}{', ' if label else ''}{label}", {}, chart.tell, chart.zero), curves)
            for chart in charts
            if not _same(chart, records)
            for metric, label in chart.metrics.items()
            if (curves := _of_many(metric, records))
        ]
    return f'<div class="charts">{"".join(found)}</div>' if any(found) else ""


def others(records: Sequence[Record]) -> list[Chart]:
    """Charts of what evaluations measure beside the usual."""
    known = {metric for chart in (*EVALUATION, *TRAINING) for metric in chart.metrics}
    named = dict.fromkeys(key for record in records for key in record.last if key.startswith("val/"))
    return [
        Chart(key.removeprefix("val/"), {key: ""})
        for key in named
        if key not in known and not key.endswith(("_chance", "bad_samples")) and "/top1_" not in key
    ]


def _same(chart: Chart, records: Sequence[Record]) -> bool:
    """Whether it would show rates per GPU of runs on one."""
    key = "train/samples_per_s_per_gpu"
    return key in chart.metrics and all(record.last.get(key) == record.last.get(key[:-8]) for record in records)


def _series(record: Record, metric: str) -> Points:
    return DERIVED[metric](record) if metric in DERIVED else record.series(metric)


def _of_one(chart: Chart, record: Record) -> list[Curve]:
    found = []
    for i, (metric, label) in enumerate(chart.metrics.items()):
        if points := _series(record, metric):
            found.append(Curve(label, points, i % COLOURS))
            if chart.chance and (luck := record.series(f"{metric}_chance")):
                found.append(Curve("chance", luck, i % COLOURS, dashed=True))
    return found


def _of_many(metric: str, records: Sequence[Record]) -> list[Curve]:
    curves = [Curve(record.name, _series(record, metric), i % COLOURS) for i, record in enumerate(records)]
    return [curve for curve in curves if curve.points]


def _figure(chart: Chart, curves: Sequence[Curve], record: Record | None = None) -> str:
    if not curves:
        return ""
    solid = [curve for curve in curves if not curve.dashed]
    entries = [
        f"<span>{_key(curve) if curve.label else ''}<b>{escape(chart.tell(curve.points[-1][1]))}</b></span>"
        for curve in solid
    ]
    if len(solid) < len(curves):
        entries.append('<span class="soft"><i class="key dashed"></i>chance</span>')
    legend = f'<div class="legend">{"".join(entries)}</div>'
    marks = _marks(record) if record is not None and chart.title == "Loss" else []
    drawing = draw(curves, chart.tell, chart.zero, marks)
    return f'<figure class="chart"><figcaption>{escape(chart.title)}</figcaption>{legend}{drawing}</figure>'


def _key(curve: Curve) -> str:
    return f'<i class="key s{curve.colour}"></i>{escape(curve.label)} '


def _marks(record: Record) -> list[tuple[float, str]]:
    marks = []
    for event in record.events:
        seen = event.get("samples_seen")
        again = event["event"] != "started" or event.get("attempt", 1) > 1
        if event["event"] in MARKED and again and isinstance(seen, int):
            marks.append((float(seen), MARKED[event["event"]]))
    return marks[-100:]
