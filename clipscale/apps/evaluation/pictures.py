"""Results as pictures: who is taken for whom, and runs beside each other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from clipscale.apps.evaluation.results import Results
from clipscale.apps.writing import whole
from clipscale.evals.outcomes import Classified

WHOLE = 40  # classes up to which all are shown
MOST = 30  # of more, those that are mistaken most
NUMBERED = 20  # classes up to which shares are written into the fields
COLORS = ("#3a6ea5", "#c8702a", "#4f8f5b", "#8a5aa8", "#b3434a", "#6b6b6b")


def confusion_file(name: str) -> str:
    """The file of a task's picture."""
    return f"confusion_{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}.png"


def draw_confusion(outcome: Classified, title: str, path: Path) -> None:
    """Shares of each class's images by the answer they were given; of many classes, those that are mistaken most."""
    table, count = _confusion(outcome), len(outcome.names)
    chosen, of_rows, more = np.arange(count), table.sum(1), []
    if count > WHOLE:
        wrong = table - np.diag(table.diagonal())
        mistaken = wrong.sum(0) + wrong.sum(1)
        chosen = np.sort(np.argsort(-mistaken, kind="stable")[:MOST])
        title, more = f"{title}: the {MOST} of {count} classes that are mistaken most", ["any other class"]
    shares = table[np.ix_(chosen, chosen)] / np.maximum(of_rows[chosen, None], 1)
    if more:
        elsewhere = table[chosen].sum(1) / np.maximum(of_rows[chosen], 1) - shares.sum(1)
        shares = np.column_stack([shares, elsewhere])
    names = [_short(outcome.names[i]) for i in chosen]
    side = max(4.0, 1.8 + 0.24 * len(names))
    figure = Figure(figsize=(side + 1.2, side), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("share of the class's images", fontsize=8)
    axes.set_xticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#eceff3", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    if more:
        axes.axvline(len(names) - 0.5, color="#889", linewidth=1)
    axes.set_xticks(range(len(names) + len(more)), [*names, *more], rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), [f"{n} ({of_rows[i]})" for n, i in zip(names, chosen, strict=True)], fontsize=7)
    axes.set_xlabel("answer", fontsize=8)
    axes.set_ylabel("class (images)", fontsize=8)
    axes.set_title(_safe(title), fontsize=9)
    if len(names) <= NUMBERED:
        for (down, across), share in np.ndenumerate(shares):
            if share >= 0.005:
                color = "white" if share > 0.6 else "#223"
                axes.text(across, down, f"{100 * share:.0f}", ha="center", va="center", fontsize=6, color=color)
    with whole(path) as file:
        figure.savefig(file, format="png", bbox_inches="tight")


def draw_results(results: Sequence[Results], path: Path) -> None:
    """The main score of every task with its interval, a colour a run; a bar stands at the chance level."""
    names = list(dict.fromkeys(name for one in results for name in one.tasks))
    figure = Figure(figsize=(7.2, 1.3 + (0.26 + 0.12 * len(results)) * len(names)), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for number, one in enumerate(results):
        offset = (number - (len(results) - 1) / 2) * 0.6 / max(len(results), 2)
        rows = [(row, one.tasks[name]) for row, name in enumerate(names) if name in one.tasks]
        rows = [(row, task) for row, task in rows if task["scores"][task["metric"]] is not None]
        values = np.array([task["scores"][task["metric"]] for _, task in rows])
        around = np.array([task["intervals"][task["metric"]] for _, task in rows], dtype=float).T
        axes.errorbar(
            values, [row + offset for row, _ in rows], xerr=np.abs(around - values), fmt="o", markersize=4,
            capsize=2.5, linewidth=1.2, color=COLORS[number % len(COLORS)], label=_safe(one.name),
        )  # fmt: skip
    for row, name in enumerate(names):
        task = next(one.tasks[name] for one in results if name in one.tasks)
        if (luck := task["chance"].get(task["metric"])) is not None:
            axes.plot([luck, luck], [row - 0.32, row + 0.32], color="#999", linewidth=1.5, zorder=0)
    labels = {name: next(one.tasks[name]["metric"] for one in results if name in one.tasks) for name in names}
    axes.set_yticks(range(len(names)), [_safe(f"{name} · {metric}") for name, metric in labels.items()], fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, min(1.0, axes.get_xlim()[1]))
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    level = results[0].content["level"]
    axes.set_xlabel(f"score, with {level:.0%} interval; grey: chance", fontsize=8)
    figure.legend(loc="outside upper left", ncols=3, fontsize=8, frameon=False)
    with whole(path) as file:
        figure.savefig(file, format="png", bbox_inches="tight")


def _confusion(outcome: Classified) -> NDArray[np.int64]:
    count = len(outcome.names)
    places = outcome.arrays["label"] * count + outcome.arrays["answer"]
    return np.bincount(places, minlength=count * count).reshape(count, count)


def _short(name: str) -> str:
    return _safe(name if len(name) <= 24 else name[:23] + "…")


def _safe(text: str) -> str:
    return text.replace("$", r"\$")  # else matplotlib reads formulas
