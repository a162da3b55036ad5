"""Results as tables of the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from clipscale.apps.evaluation.results import AGGREGATE, Difference, Results

LABELS_SHOWN = 30  # of a multi-label set


def task_table(task: Mapping[str, Any], level: float) -> Table:
    """All scores of one task, with intervals and what chance would give."""
    queries = ", ".join(f"{count:,} {name}" for name, count in task["queries"].items())
    bad = f", {task['bad_samples']:,} could not be used" if task["bad_samples"] else ""
    table = Table(title=escape(f"{task['name']}: {queries}{bad}"), title_justify="left")
    for heading in ("score", "value", f"{level:.0%} interval", "chance"):
        table.add_column(heading, justify="left" if heading == "score" else "right")
    for name, value in list(task["scores"].items())[: 2 + 2 * LABELS_SHOWN]:
        main = name == task["metric"]
        table.add_row(
            escape(name), number(value), between(task["intervals"][name]), number(task["chance"].get(name)),
            style="bold" if main else None,
        )  # fmt: skip
    return table


def overview(results: Sequence[Results], title: str) -> Table:
    """The main score of every task, a column a run, and their mean; of more than two runs, intervals stand below."""
    gap = "  " if len(results) < 3 else "\n"
    table = Table(title=escape(title), title_justify="left", show_lines=gap == "\n")
    table.add_column("data set")
    for one in results:
        table.add_column(escape(one.name), justify="right")
    names = list(dict.fromkeys(name for one in results for name in one.tasks))
    for name in names:
        metric = next(one.tasks[name]["metric"] for one in results if name in one.tasks)
        table.add_row(f"{escape(name)}{gap}[dim]{metric}[/dim]", *(_cell(one, name, metric, gap) for one in results))
    if any(AGGREGATE in one.content for one in results):
        table.add_section()
        table.add_row("mean", *(_mean_cell(one.content.get(AGGREGATE), len(names), gap) for one in results))
    return table


def differences(found: Sequence[Difference], first: str, second: str, level: float) -> Table:
    """Two runs side by side, and whether they differ."""
    table = Table(title=escape(f"A: {first}\nB: {second}"), title_justify="left")
    table.add_column("data set")
    for heading in ("A", "B", "B - A", f"paired {level:.0%}", "B is"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in found:
        verdict = ("better" if (one.change > 0) != (one.metric == "ece") else "worse") if one.is_clear else "not clear"
        name = "mean" if one.task == AGGREGATE else f"{escape(one.task)}  [dim]{one.metric}[/dim]"
        if one.task == AGGREGATE:
            table.add_section()
        table.add_row(
            name, number(one.first), number(one.second), f"{one.change:+.4f}", f"{one.low:+.4f} … {one.high:+.4f}",
            verdict,
        )  # fmt: skip
    return table


def number(value: float | None) -> str:
    """Four digits, or nothing."""
    return "" if value is None else f"{value:.4f}"


def between(interval: Sequence[float | None]) -> str:
    """``low … high``, or nothing."""
    low, high = interval
    return "" if low is None or high is None else f"{low:.4f} … {high:.4f}"


def _cell(one: Results, name: str, metric: str, gap: str) -> str:
    task = one.tasks.get(name)
    if task is None or metric not in task["scores"]:
        return "–"
    return f"{number(task['scores'][metric])}{gap}[dim]{_short(task['intervals'][metric])}[/dim]"


def _mean_cell(mean: Mapping[str, Any] | None, tasks: int, gap: str) -> str:
    if mean is None:
        return "–"
    of = "" if mean["tasks"] == tasks else f" of {mean['tasks']}"
    return f"[bold]{number(mean['score'])}[/bold]{of}{gap}[dim]{_short(mean['interval'])}[/dim]"


def _short(interval: Sequence[float | None]) -> str:
    low, high = interval
    return "" if low is None or high is None else f"{low:.3f} … {high:.3f}"
