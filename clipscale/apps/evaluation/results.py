"""Results as files: scores with intervals in ``results.json``, what was found of each query in ``outcomes.npz``."""

from __future__ import annotations

import io
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from clipscale import __version__
from clipscale.apps.evaluation.tasks import Answer
from clipscale.apps.writing import whole
from clipscale.errors import ConfigError, masked
from clipscale.evals.bootstrap import LEVEL, combined
from clipscale.evals.outcomes import OUTCOMES, Outcome, intervals, resampled, score_intervals

RESULTS, OUTCOMES_FILE = "results.json", "outcomes.npz"
AGGREGATE = "aggregate"


@dataclass(frozen=True)
class Results:
    """What was stored in a directory; ``content`` is its ``results.json``."""

    name: str
    content: Mapping[str, Any]
    outcomes: Mapping[str, Outcome]

    @property
    def tasks(self) -> dict[str, Mapping[str, Any]]:
        """By name."""
        return {task["name"]: task for task in self.content["tasks"]}


def summarise(where: str, answers: Sequence[Answer], resamples: int) -> dict[str, Any]:
    """Plain values: per task its scores, intervals and chance levels, and the mean of the main scores over tasks."""
    drawn = [resampled(answer.outcome, resamples) for answer in answers]
    tasks = [_task(answer, scores) for answer, scores in zip(answers, drawn, strict=True)]
    found: dict[str, Any] = {
        "model": masked(where),
        "clipscale": __version__,
        "level": LEVEL,
        "resamples": resamples,
        "tasks": tasks,
    }
    if len(tasks) > 1:
        # Of tasks that have a score: a data set may have none, such as one without a yes.
        mains = [task["scores"][task["metric"]] for task in tasks]
        known = [number for number, score in enumerate(mains) if score is not None]
        means = [_average([drawn[n][r][answers[n].metric] for n in known]) for r in range(resamples)]
        low, high = intervals([{AGGREGATE: value} for value in means])[AGGREGATE]
        if low == high and known:  # no draw differed: each task's own interval tells more
            low, high = combined([mains[n] for n in known], [tasks[n]["intervals"][answers[n].metric] for n in known])
        found[AGGREGATE] = {
            "score": _plain(_average([mains[n] for n in known])),
            "interval": [_plain(low), _plain(high)],
            "tasks": len(known),
        }
    return found


def _task(answer: Answer, drawn: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    outcome = answer.outcome
    bounds = score_intervals(outcome, drawn)
    return {
        "name": answer.task.shown,
        "path": masked(answer.task.path),
        "kind": outcome.kind,
        "metric": answer.metric,
        "queries": outcome.sizes,
        "keys": outcome.keys,
        "bad_samples": answer.bad,
        "scores": {name: _plain(value) for name, value in outcome.scores(outcome.all).items()},
        "intervals": {name: [_plain(low), _plain(high)] for name, (low, high) in bounds.items()},
        "chance": {name: _plain(value) for name, value in outcome.chances.items()},
    }


def _average(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores) if scores else float("nan")


def _plain(value: float) -> float | None:
    """A number for JSON, which has no NaN."""
    return None if math.isnan(value) else value


def write_results(out: Path, content: Mapping[str, Any], answers: Sequence[Answer]) -> None:
    """Write both files, whole or not at all, in place of those that are there. Raises DataError where it cannot."""
    arrays: dict[str, Any] = {}
    for number, one in enumerate(answers):
        arrays |= {f"{number}/{key}": array for key, array in one.outcome.arrays.items()}
        arrays[f"{number}/names"] = np.array(one.outcome.names, dtype=str)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    for name, data in ((OUTCOMES_FILE, buffer.getvalue()), (RESULTS, json.dumps(content, indent=1).encode())):
        with whole(out / name) as file:
            file.write(data)


def read_results(where: Path) -> Results:
    """What :func:`write_results` wrote into a directory. Raises ConfigError where there is none."""
    try:
        content = json.loads((where / RESULTS).read_text())
        with np.load(where / OUTCOMES_FILE, allow_pickle=False) as stored:
            arrays = dict(stored)
        outcomes = {
            task["name"]: OUTCOMES[task["kind"]](
                {key.partition("/")[2]: array for key, array in arrays.items() if _is_of(key, number)},
                tuple(arrays[f"{number}/names"].tolist()),
                task["keys"],
            )
            for number, task in enumerate(content["tasks"])
        }
    except FileNotFoundError as error:
        raise ConfigError(
            f"{where} holds no results ({Path(str(error.filename)).name} is not there); clipscale eval MODEL DATASET "
            "--out DIR writes them"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile, zlib.error) as error:
        raise ConfigError(f"{where} holds no results of clipscale eval: {error}") from None
    return Results(where.resolve().name, content, outcomes)


def _is_of(key: str, number: int) -> bool:
    place, _, name = key.partition("/")
    return place == str(number) and name != "names"


# ---- comparing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Of one score: both values, ``second - first``, and the paired bootstrap interval of that."""

    task: str
    metric: str
    first: float
    second: float
    low: float
    high: float

    @property
    def change(self) -> float:
        """``second - first``."""
        return self.second - self.first

    @property
    def plain(self) -> dict[str, Any]:
        """All of it for JSON."""
        told = vars(self) | {"change": self.change}
        return {key: _plain(one) if isinstance(one, float) else one for key, one in told.items()} | {
            "is_clear": self.is_clear
        }

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def compare(first: Results, second: Results, resamples: int) -> list[Difference]:
    """Differences of the main scores on all tasks of both, and of their mean: the same queries are drawn of both.

    Raises ConfigError where they have no task in common, or one name stands for different queries.
    """
    found, drawn = [], []
    for name, task in first.tasks.items():
        if name not in second.outcomes:
            continue
        one, other, metric = first.outcomes[name], second.outcomes[name], task["metric"]
        if not one.same_queries(other):
            raise ConfigError(
                f"{name}: {first.name} and {second.name} were not asked the same queries; evaluate both on the same "
                "data, with as many classes"
            )
        if metric not in (scores := other.scores(other.all)):
            raise ConfigError(f"{name}: {second.name} has no {metric}; it has {', '.join(scores)}")
        pairs = zip(resampled(one, resamples), resampled(other, resamples), strict=True)
        changes = [b[metric] - a[metric] for a, b in pairs]
        low, high = intervals([{metric: change} for change in changes])[metric]
        if low == high and low:
            low, high = sorted((low, low * _sure(min(one.sizes.values()))))
        difference = Difference(name, metric, one.scores(one.all)[metric], scores[metric], low, high)
        found.append(difference)
        if not math.isnan(difference.change):
            drawn.append((difference, changes))
    if not found:
        raise ConfigError(f"{first.name} and {second.name} have no data set in common")
    if len(found) > 1 and drawn:
        low, high = intervals([{"": _average(row)} for row in zip(*(changes for _, changes in drawn), strict=True)])[""]
        if low == high and low:
            low, high = combined([one.change for one, _ in drawn], [(one.low, one.high) for one, _ in drawn])
        before, after = (_average([getattr(one, side) for one, _ in drawn]) for side in ("first", "second"))
        found.append(Difference(AGGREGATE, "mean", before, after, low, high))
    return found


def _sure(pairs: int) -> float:
    """Of a difference that all pairs agree on, the part that is sure: by the exact interval of how many of all pairs
    would agree (Clopper and Pearson 1934). Below 0, of fewer than six pairs, not even its sign is."""
    return 2 * ((1 - LEVEL) / 2) ** (1 / pairs) - 1
