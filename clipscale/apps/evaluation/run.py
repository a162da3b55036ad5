"""``clipscale eval MODEL DATASET …``: one model on any data, and ``clipscale results``: what was stored, compared."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import rich.console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from clipscale.apps.asking import ask
from clipscale.apps.evaluation.pictures import confusion_file, draw_confusion, draw_results
from clipscale.apps.evaluation.results import RESULTS, Results, compare, read_results, summarise, write_results
from clipscale.apps.evaluation.tables import differences, overview, task_table
from clipscale.apps.evaluation.tasks import Answer, Task, is_listed, run_task
from clipscale.apps.writing import check_writable
from clipscale.distributed.collectives import rank
from clipscale.errors import ConfigError, DataError
from clipscale.evals.bootstrap import LEVEL
from clipscale.evals.outcomes import Classified
from clipscale.evals.protocol import EvalContext


def evaluate_tasks(
    where: str,
    tasks: Sequence[Task],
    *,
    device: str = "auto",
    batch_size: int | None = None,
    resamples: int = 1000,
    out: Path | None = None,
    as_json: bool = False,
) -> dict[str, Any]:
    """Ask the model at ``where`` every task; print tables, or JSON; store results and pictures in ``out``.

    Returns what ``results.json`` holds. Under torchrun the batches are dealt to the ranks, and the first one prints.
    Raises ClipscaleError, in one line, for a model or data that cannot be opened or do not fit.
    """
    if resamples < 1:
        raise ConfigError(f"--resamples {resamples}: choose at least 1")
    names = [task.shown for task in tasks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"two data sets are called {twice}; give them names in a suite")
    _check_places(tasks)
    context = ask(where, device, batch_size)
    if out is not None and rank() == 0:
        check_writable(out / RESULTS, "--out")
    answers = _ask_all(tasks, context)
    if rank() != 0:
        return {}
    content = summarise(where, answers, resamples)
    for answer in answers:
        for warning in answer.warnings:
            print(f"warning: {answer.task.shown}: {warning}", file=sys.stderr)
    if out is not None:
        write_results(out, content, answers)
        for answer in answers:
            if isinstance(answer.outcome, Classified):
                draw_confusion(answer.outcome, answer.task.shown, out / confusion_file(answer.task.shown))
    if as_json:
        print(json.dumps(content))
    else:
        _print(where, content, out)
    return content


def _check_places(tasks: Sequence[Task]) -> None:
    """Raise DataError where one of several data sets is no path: before the first is asked, not after the others."""
    local = [task.path for task in tasks if not is_listed(task.path)]
    gone = [path for path in local if not Path(path).expanduser().exists()]
    if gone and len(tasks) > 1:
        raise DataError(f"{gone[0]} does not exist; of {len(tasks)} data sets {len(gone)} do not")


def _ask_all(tasks: Sequence[Task], context: EvalContext) -> list[Answer]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = rich.console.Console(stderr=True)
    answers = []
    with Progress(*columns, console=console, transient=True, disable=rank() != 0 or not console.is_terminal) as bar:
        for number, task in enumerate(tasks, start=1):
            of = f" ({number} of {len(tasks)})" if len(tasks) > 1 else ""
            shown = bar.add_task(escape(task.shown) + of, total=None)
            answers.append(run_task(task, replace(context, progress=partial(_show, bar, shown))))
            bar.remove_task(shown)
    return answers


def _show(bar: Progress, shown: TaskID, done: int, total: int) -> None:
    bar.update(shown, completed=done, total=total)


def _print(where: str, content: dict[str, Any], out: Path | None) -> None:
    console = rich.console.Console()
    if len(content["tasks"]) == 1:
        console.print(task_table(content["tasks"][0], content["level"]))
    else:
        console.print(overview([Results(where, content, {})], f"{where}, {LEVEL:.0%} intervals"))
    if out is not None:
        print(f"{out}: results.json, outcomes.npz, pictures; clipscale results {out} OTHER … shows runs side by side")


def show_results(
    places: Sequence[Path], compared: tuple[Path, Path] | None, plot: Path | None, resamples: int, as_json: bool
) -> None:
    """Print stored results side by side, or the differences of two, and draw them.

    Raises ConfigError for a place without results, and for two that cannot be compared.
    """
    if bool(places) == (compared is not None):
        raise ConfigError("name the directories of results to show, or two of them behind --compare")
    results = [read_results(place) for place in (compared or places)]
    if len({one.name for one in results}) < len(results):  # directories of one name: their paths tell them apart
        results = [replace(one, name=str(place)) for one, place in zip(results, compared or places, strict=True)]
    if plot is not None:
        _draw(results, plot)
    console = rich.console.Console()
    if compared is None:
        _warn_of_other_queries(results)
        if as_json:
            print(json.dumps({one.name: one.content for one in results}))
        else:
            console.print(overview(results, f"results, {LEVEL:.0%} intervals"))
        return
    found = compare(results[0], results[1], resamples)
    for one, other in (results, reversed(results)):
        if alone := [name for name in one.tasks if name not in other.tasks]:
            print(f"warning: only {one.name} has {', '.join(alone)}; left out", file=sys.stderr)
    if as_json:
        print(json.dumps([one.plain for one in found]))
    else:
        console.print(differences(found, results[0].name, results[1].name, LEVEL))


def _warn_of_other_queries(results: Sequence[Results]) -> None:
    for name in dict.fromkeys(name for one in results for name in one.tasks):
        first, *others = (one for one in results if name in one.tasks)
        odd = [one.name for one in others if not one.outcomes[name].same_queries(first.outcomes[name])]
        if odd:
            told = f"{', '.join(odd)}: other queries than {first.name} was asked; scores cannot be compared"
            print(f"warning: {name} of {told}", file=sys.stderr)


def _draw(results: Sequence[Results], plot: Path) -> None:
    if plot.suffix.lower() != ".png":
        raise ConfigError(f"--plot {plot}: pictures are .png")
    draw_results(results, plot)
