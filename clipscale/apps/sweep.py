"""``clipscale runs sweep``: what was varied over runs, and what came of it, as a table and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import rich.console
from rich.markup import escape
from rich.table import Table

from clipscale.apps.quantities import number
from clipscale.apps.record import Record, differing, find_records, read_record
from clipscale.apps.writing import whole
from clipscale.errors import ConfigError

OWN = ("name", "runs_dir")  # every run has its own
MOST_PANELS = 6
LOG_RATIO = 5.0  # of the largest value to the least, from which an axis is logarithmic


@dataclass(frozen=True)
class Sweep:
    """Runs, best first by their ``eval.objective``; those without a value come last."""

    records: list[Record]

    @cached_property
    def objective(self) -> str:
        """The metric that is maximised."""
        return self.records[0].objective[0]

    @cached_property
    def varied(self) -> dict[str, list[Any]]:
        """The keys in which the commands of the runs differ, else their configurations, with the value of each run."""
        given = [dict(line.partition("=")[::2] for line in record.overrides) for record in self.records]
        keys = dict.fromkeys(key for one in given for key in one if key not in OWN)
        table = {
            key: [one.get(key, record.config.get(key)) for one, record in zip(given, self.records, strict=True)]
            for key in keys
        }
        found = {key: row for key, row in table.items() if len(set(map(_comparable, row))) > 1}
        return found or {key: row for key, row in differing(self.records).items() if key not in OWN}


def find_sweep(places: Sequence[Path]) -> Sweep:
    """The runs named, and those below the directories named. Raises ConfigError for a path without any, for a single
    run, and for runs whose objectives are different metrics."""
    records: dict[Path, Record] = {}
    for place in places:
        found = [read_record(place)] if (place / "config.yaml").exists() else find_records(place)
        records |= {record.path.resolve(): record for record in found}
    if len(records) < 2:
        raise ConfigError(f"{places[0]} is a single run; name several, or a directory of runs")
    if unreadable := next((record for record in records.values() if not record.objective[0]), None):
        raise ConfigError(f"{unreadable.path}/config.yaml cannot be read; leave that run out")
    metrics = dict.fromkeys(record.objective[0] for record in records.values())
    if len(metrics) > 1:
        raise ConfigError(f"these runs have several objectives ({', '.join(metrics)}); name runs of one eval.objective")
    return Sweep(sorted(records.values(), key=_rank))


def _comparable(value: Any) -> float | str:
    try:
        return float(value)  # 1e-3 is 0.001
    except (TypeError, ValueError):
        return str(value)


def _rank(record: Record) -> tuple[bool, float]:
    metric, value = record.objective
    return value is None, (value or 0.0) * (1 if metric.endswith("loss") else -1)


def show_sweep(places: Sequence[Path], plot: Path | None, as_json: bool) -> None:
    """Print the table, or JSON, and write the picture. Raises ConfigError as :func:`find_sweep`, and for a picture
    that is no PNG."""
    if plot is not None and plot.suffix != ".png":
        raise ConfigError(f"--plot {plot}: name a .png file")
    sweep = find_sweep(places)
    if plot is not None:
        draw(sweep, plot)
    if as_json:
        print(json.dumps(_rows(sweep), indent=2))
        return
    rich.console.Console().print(table_of(sweep))
    if plot is not None:
        print(f"picture: {plot}")


def table_of(sweep: Sweep) -> Table:
    """A row for each run: what was varied, the objective, the last training loss, samples per second."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for key in sweep.varied:
        table.add_column(escape(key), overflow="fold")
    for heading in (sweep.objective, "train/loss", "samples/s"):
        table.add_column(heading, justify="right")
    table.add_column("state")
    table.add_column("run", overflow="fold")
    for i, record in enumerate(sweep.records):
        last = record.last
        values = [record.objective[1], last.get("train/loss"), last.get("train/samples_per_s")]
        told = [*map(_four, values[:2]), "" if values[2] is None else number(float(f"{values[2]:.3g}"))]
        best = "bold" if i == 0 and values[0] is not None else None
        named = (escape(str(row[i])) for row in sweep.varied.values())
        table.add_row(*named, *told, record.state, escape(record.name), style=best)
    return table


def draw(sweep: Sweep, path: Path) -> None:
    """Write a picture (PNG): the objective over each varied key, the best run marked. Raises ConfigError where no run
    has an objective."""
    from matplotlib.figure import Figure

    scored = [i for i, record in enumerate(sweep.records) if record.objective[1] is not None]
    if not scored:
        raise ConfigError(f"--plot: none of the runs has measured {sweep.objective}, their eval.objective")
    values = [sweep.records[i].objective[1] for i in scored]
    keys = list(sweep.varied)[:MOST_PANELS]
    if not keys:
        raise ConfigError("--plot: the runs differ in no key")
    figure = Figure(figsize=(3.6 * len(keys), 3.4), layout="constrained")
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for panel, key in zip(panels, keys, strict=True):
        places = _places(panel, [str(sweep.varied[key][i]) for i in scored])
        panel.plot(places, values, "o", color="#2f6fb0", alpha=0.7, markersize=7)
        panel.plot(places[:1], values[:1], "o", color="#d9822b", markersize=10)
        panel.set_xlabel(key)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(sweep.objective)
    best = ", ".join(f"{key}={sweep.varied[key][scored[0]]}" for key in keys)
    figure.suptitle(f"best: {values[0]:.4g} with {best}", fontsize=9, wrap=True)
    with whole(path) as file:
        figure.savefig(file, format="png", dpi=144)


def _places(panel: Any, values: Sequence[str]) -> list[float]:
    """Where values stand on an axis: numbers by their size, words side by side."""
    try:
        numbers = [float(value) for value in values]
        if not all(map(math.isfinite, numbers)):
            raise ValueError
    except ValueError:
        words = sorted(set(values))
        panel.set_xticks(range(len(words)), words, rotation=20, ha="right")
        panel.set_xlim(-0.5, len(words) - 0.5)
        return [float(words.index(value)) for value in values]
    if min(numbers) > 0 and max(numbers) / min(numbers) >= LOG_RATIO:
        panel.set_xscale("log")
    return numbers


def _rows(sweep: Sweep) -> list[dict[str, Any]]:
    return [
        {
            "run": str(record.path), "state": record.state, sweep.objective: record.objective[1],
            "varied": {key: row[i] for key, row in sweep.varied.items()},
        }
        for i, record in enumerate(sweep.records)
    ]  # fmt: skip


def _four(value: float | None) -> str:
    return "" if value is None else f"{value:,.4f}"
