"""Scores of predictions, each sample with a weight: 1 gives the score itself, counts of a resampling its bootstrap.

All take numpy arrays and give Python floats; NaN where a score is not defined. They equal scikit-learn's of the same
names with ``sample_weight``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
BINS = 15  # of confidence, as in the literature since Guo et al. 2017


def mean(values: Floats, weight: Floats) -> float:
    """Weighted mean of Float[N]."""
    total = weight.sum()
    return float((values * weight).sum() / total) if total else float("nan")


def class_recalls(labels: NDArray[np.int64], hits: Floats, weight: Floats, count: int) -> Floats:
    """Recall of each of ``count`` classes, Float[count]: the share of its samples that are hits; NaN without any."""
    of_class = np.bincount(labels, weight, minlength=count)
    hit = np.bincount(labels, weight * hits, minlength=count)
    return np.divide(hit, of_class, out=np.full(count, np.nan), where=of_class > 0)


def macro_f1(labels: NDArray[np.int64], answers: NDArray[np.int64], weight: Floats, count: int) -> float:
    """Mean over the classes that occur as a label of 2 TP / (labels + answers), as of WILDS (Koh et al. 2021).

    A class that is only ever an answer takes from the scores of those it was taken for, and has none of its own.
    """
    of_class = np.bincount(labels, weight, minlength=count)
    there = of_class + np.bincount(answers, weight, minlength=count)
    right = np.bincount(labels, weight * (labels == answers), minlength=count)
    seen = of_class > 0
    return float((2 * right[seen] / there[seen]).mean()) if seen.any() else float("nan")


def calibration_error(confidence: Floats, hits: Floats, weight: Floats, bins: int = BINS) -> float:
    """Expected calibration error (Guo et al. 2017, equation 3): over equal bins of confidence, the mean distance
    between confidence and accuracy."""
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)  # bins are open below: (0, 1/15]
    gap = np.bincount(place, weight * (hits - confidence), minlength=bins)
    return float(np.abs(gap).sum() / weight.sum()) if weight.sum() else float("nan")


class Ranked:
    """Scores Float[N] and labels 0 or 1 of one yes-or-no question, sorted once, for many weights.

    Scores that are no numbers have no order: with one of them, what is asked for is NaN.
    """

    def __init__(self, scores: Floats, labels: Floats) -> None:
        self._order = np.argsort(-scores, kind="stable")
        in_order = scores[self._order]
        self._yes = labels[self._order] if not np.isnan(scores).any() else np.full(len(scores), np.nan)
        # Equal scores are one threshold.
        self._ends = np.append(np.flatnonzero(np.diff(in_order)), len(scores) - 1) if len(scores) else np.arange(0)

    def _counts(self, weight: Floats) -> tuple[Floats, Floats]:
        """Weight of the yes, and of all, that score at least as high as each threshold, highest first."""
        ordered = weight[self._order]
        return np.cumsum(ordered * self._yes)[self._ends], np.cumsum(ordered)[self._ends]

    def average_precision(self, weight: Floats) -> float:
        """Sum over thresholds of precision times the recall gained there."""
        yes, everything = self._counts(weight)
        if not len(yes) or yes[-1] == 0:
            return float("nan")
        precision = np.divide(yes, everything, out=np.zeros_like(yes), where=everything > 0)
        return float((np.diff(yes, prepend=0.0) * precision).sum() / yes[-1])

    def auroc(self, weight: Floats) -> float:
        """Chance that a yes scores above a no; ties count half."""
        yes, everything = self._counts(weight)
        no = everything - yes
        if not len(yes) or yes[-1] == 0 or no[-1] == 0:
            return float("nan")
        steps = np.diff(no, prepend=0.0)
        before = np.concatenate([[0.0], yes[:-1]])
        return float((steps * (before + yes) / 2).sum() / (yes[-1] * no[-1]))
