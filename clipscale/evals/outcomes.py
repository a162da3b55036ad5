"""What an evaluation found for each query, from which its scores follow: of all queries, or of any resampling.

Outcomes are stored beside the scores, so that runs can be compared later, query by query.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from clipscale.evals.bootstrap import combined, interval, wilson
from clipscale.evals.scores import Floats, Ranked, calibration_error, class_recalls, macro_f1, mean

Weights = Mapping[str, Floats]
Arrays = Mapping[str, NDArray[Any]]
RESAMPLES = 1000


@dataclass(frozen=True)
class Outcome:
    """Queries of one or two populations, and what was found of each.

    ``arrays`` hold what is found; ``names`` those of classes or labels; ``keys`` tells the queries from others.
    """

    arrays: Arrays
    names: tuple[str, ...]
    keys: str

    kind: ClassVar[str]

    def same_queries(self, other: Outcome) -> bool:
        """Whether both were asked the same, so that they can be compared query by query: with the same right answers
        among as many."""
        one, two = ((found.kind, found.keys, found.sizes, len(found.names)) for found in (self, other))
        truth = [name for name in self.arrays if name in other.arrays and _is_truth(name)]
        return one == two and all(
            np.array_equal(self.arrays[name], other.arrays[name], equal_nan=True) for name in truth
        )

    @property
    def sizes(self) -> dict[str, int]:
        """How many queries each population has."""
        return {"samples": len(next(iter(self.arrays.values())))}

    def scores(self, weights: Weights) -> dict[str, float]:
        """Scores by name, of queries that count as often as ``weights`` say."""
        raise NotImplementedError

    @property
    def chances(self) -> dict[str, float]:
        """What a random ranking would score, for the scores of which that has a meaning."""
        return {}

    @property
    def parts(self) -> Mapping[str, Sequence[Floats]]:
        """Of a score that is a mean of means over queries, what is found of the queries of each of them."""
        return {}

    @property
    def all(self) -> dict[str, Floats]:
        """Weights with which every query counts once."""
        return {name: np.ones(size) for name, size in self.sizes.items()}


class Classified(Outcome):
    """``label`` and ``answer`` Int[N], ``top1`` and ``top5`` Float[N] (hits; ties share), ``confidence`` Float[N] of
    the answer, ``group`` Int[N] if samples are in groups."""

    kind = "zeroshot"

    def scores(self, weights: Weights) -> dict[str, float]:
        """Scores of a classification; ``worst_group_top{1,5}`` is the lowest of a group."""
        found, weight, count = self.arrays, weights["samples"], len(self.names)
        recalls = class_recalls(found["label"], found["top1"], weight, count)
        scores = {
            "top1": mean(found["top1"], weight),
            "top5": mean(found["top5"], weight),
            "mean_per_class_recall": _mean(recalls),
            "macro_f1": macro_f1(found["label"], found["answer"], weight, count),
            "ece": calibration_error(found["confidence"], found["top1"], weight),
        }
        if "group" in found:
            groups = int(found["group"].max()) + 1
            for k in ("top1", "top5"):
                scores[f"worst_group_{k}"] = float(np.nanmin(class_recalls(found["group"], found[k], weight, groups)))
        return scores

    @property
    def chances(self) -> dict[str, float]:
        """Of a random answer."""
        count = len(self.names)
        return {"top1": 1 / count, "top5": min(5 / count, 1.0), "mean_per_class_recall": 1 / count}

    @property
    def parts(self) -> Mapping[str, Sequence[Floats]]:
        """Hits of all samples, of each class, or of the worst group."""
        found = self.arrays
        of_class = [found["top1"][found["label"] == one] for one in np.unique(found["label"])]
        same = np.ptp(found["top1"]) == 0  # else the F1 is no mean over samples
        parts = {"top1": [found["top1"]], "top5": [found["top5"]], "mean_per_class_recall": of_class}
        parts |= {"macro_f1": of_class} if same else {}
        for k in ("top1", "top5") if "group" in found else ():
            groups = [found[k][found["group"] == one] for one in np.unique(found["group"])]
            # Of groups that are all right the smallest is the least known; of those all wrong one is known to be bad.
            parts[f"worst_group_{k}"] = [min(groups, key=lambda hits: (hits.mean(), len(hits) * (hits.mean() or -1)))]
        return parts


class Labelled(Outcome):
    """``score`` Float[N, L] and ``label`` Float[N, L]: 1 yes, 0 no, NaN unknown."""

    kind = "multilabel"

    @cached_property
    def _ranked(self) -> list[tuple[str, NDArray[np.bool_], Ranked]]:
        score, label = self.arrays["score"], self.arrays["label"]
        known = ~np.isnan(label)
        return [
            (name, known[:, i], Ranked(score[known[:, i], i], label[known[:, i], i]))
            for i, name in enumerate(self.names)
        ]

    def scores(self, weights: Weights) -> dict[str, float]:
        """``map`` and ``auroc``, means over labels, and ``ap/LABEL``, ``auroc/LABEL``."""
        weight = weights["samples"]
        precise = {f"ap/{name}": ranked.average_precision(weight[known]) for name, known, ranked in self._ranked}
        curves = {f"auroc/{name}": ranked.auroc(weight[known]) for name, known, ranked in self._ranked}
        return {"map": _mean(precise.values()), "auroc": _mean(curves.values())} | precise | curves

    @property
    def chances(self) -> dict[str, float]:
        """Of random scores: precision is then the share of yes, whatever the threshold."""
        shares = {f"ap/{name}": _mean(self.arrays["label"][:, i]) for i, name in enumerate(self.names)}
        halves = {f"auroc/{name}": 0.5 for name in self.names}
        return {"map": _mean(shares.values()), "auroc": 0.5} | shares | halves


class Retrieved(Outcome):
    """``i2t_r{1,5,10}`` Float[N] of images and ``t2i_r{1,5,10}`` Float[T] of texts, hits; ``…_chance`` likewise."""

    kind = "retrieval"

    @property
    def sizes(self) -> dict[str, int]:
        """Images and texts are drawn apart."""
        return {"images": len(self.arrays["i2t_r1"]), "texts": len(self.arrays["t2i_r1"])}

    def scores(self, weights: Weights) -> dict[str, float]:
        """Recall at k both ways, and ``mean_r1`` of both."""
        scores = {name: mean(self.arrays[name], weights[_POPULATION[name[:3]]]) for name in self._names()}
        return scores | {"mean_r1": (scores["i2t_r1"] + scores["t2i_r1"]) / 2}

    @property
    def chances(self) -> dict[str, float]:
        """Expected hits of a random ranking."""
        luck = {name: float(self.arrays[f"{name}_chance"].mean()) for name in self._names()}
        return luck | {"mean_r1": (luck["i2t_r1"] + luck["t2i_r1"]) / 2}

    @property
    def parts(self) -> Mapping[str, Sequence[Floats]]:
        """Hits of images, or of texts."""
        parts = {name: [self.arrays[name]] for name in self._names()}
        return parts | {"mean_r1": [self.arrays["i2t_r1"], self.arrays["t2i_r1"]]}

    def _names(self) -> list[str]:
        return [name for name in self.arrays if not name.endswith("_chance")]


class Associated(Outcome):
    """``jaccard`` Float[N] of the images that were chosen for each cue with those that go with it, ``jaccard_chance``
    of a random choice, and ``candidates`` Int[N], among how many it was."""

    kind = "associations"

    def scores(self, weights: Weights) -> dict[str, float]:
        """``jaccard``, the mean of all, and ``jaccard_of_N``, of the cues with N candidates."""
        found, weight = self.arrays["jaccard"], weights["samples"]
        parts = {name: mean(found[rows], weight[rows]) for name, rows in self._parts.items()}
        return {"jaccard": mean(found, weight)} | parts

    @property
    def chances(self) -> dict[str, float]:
        """Of choosing as many at random."""
        luck = self.arrays["jaccard_chance"]
        return {"jaccard": float(luck.mean())} | {name: float(luck[rows].mean()) for name, rows in self._parts.items()}

    @property
    def parts(self) -> Mapping[str, Sequence[Floats]]:
        """What was found of the cues."""
        found = self.arrays["jaccard"]
        return {"jaccard": [found]} | {name: [found[rows]] for name, rows in self._parts.items()}

    @cached_property
    def _parts(self) -> dict[str, NDArray[np.int64]]:
        among = self.arrays["candidates"]
        return {f"jaccard_of_{n}": np.flatnonzero(among == n) for n in np.unique(among)}


_POPULATION = {"i2t": "images", "t2i": "texts"}
OUTCOMES: dict[str, type[Outcome]] = {one.kind: one for one in (Classified, Labelled, Retrieved, Associated)}


def resampled(outcome: Outcome, resamples: int = RESAMPLES, seed: int = 0) -> list[dict[str, float]]:
    """Scores of queries drawn with replacement, as many times; the same draws for outcomes of the same sizes."""
    return [outcome.scores(weights) for weights in _draws(outcome, resamples, seed)]


def intervals(drawn: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """Bootstrap intervals (percentile method) of each score, from :func:`resampled`."""
    found = {}
    for name in drawn[0]:
        values = np.array([scores[name] for scores in drawn])
        values = values[~np.isnan(values)]
        found[name] = interval(values) if len(values) else (math.nan, math.nan)
    return found


def score_intervals(outcome: Outcome, drawn: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """The :func:`intervals` of scores, ``drawn`` from :func:`resampled`; from Wilson's of a score's parts where the
    queries of each part are alike, since to draw them again tells nothing. A score that must be 1 is a point."""
    found = intervals(drawn)
    for name, parts in outcome.parts.items():
        if outcome.chances.get(name) != 1 and all(np.ptp(part) == 0 for part in parts):
            values = [float(part[0]) for part in parts]
            sizes = (len(part) for part in parts)
            found[name] = combined(values, [wilson(*one) for one in zip(values, sizes, strict=True)])
    return found


def _draws(outcome: Outcome, resamples: int, seed: int) -> Iterator[dict[str, Floats]]:
    random = np.random.default_rng(seed)
    for _ in range(resamples):
        yield {
            name: np.bincount(random.integers(0, size, size), minlength=size).astype(np.float64)
            for name, size in outcome.sizes.items()
        }


def _is_truth(name: str) -> bool:
    """Whether an array tells what is right, not what was answered; a chance is the number of right ones."""
    return name in ("label", "group") or name.endswith("_chance")


def _mean(values: Any) -> float:
    found = np.array(list(values), dtype=np.float64)
    found = found[~np.isnan(found)]
    return float(found.mean()) if len(found) else float("nan")


def digest(keys: Sequence[str]) -> str:
    """Tells the queries with these keys, in this order, from others."""
    return hashlib.blake2b("\n".join(keys).encode(errors="surrogateescape"), digest_size=8).hexdigest()
