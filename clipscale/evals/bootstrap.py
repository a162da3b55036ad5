"""How far a mean would move with other data: percentile bootstrap (Efron and Tibshirani 1993, chapter 13)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

DRAWS = 2000
LEVEL = 0.95
NORMAL = 1.959963984540054  # of a normal distribution, 95 % lie within as many deviations
_AT_ONCE = 1 << 22  # counts held at a time


def resampled_means(values: torch.Tensor | Sequence[float], seed: int = 0, draws: int = DRAWS) -> NDArray[np.float64]:
    """Means of as many values drawn again with replacement, Float64[draws].

    ``values`` is Float[N], or Float[R, N] of R repetitions (such as draws of a training set) over the same N items:
    then both repetitions and items are drawn again, since both are there by chance. Cheap where values repeat, as hits
    do. The same seed gives the same numbers.
    """
    table = np.atleast_2d(torch.as_tensor(values).double().numpy())
    repetitions, items = table.shape
    columns, counts = np.unique(table, axis=1, return_counts=True)
    random = np.random.Generator(np.random.PCG64(seed))
    means = []
    step = max(1, _AT_ONCE // len(counts))
    for start in range(0, draws, step):
        some = min(step, draws - start)
        rows = random.multinomial(repetitions, np.full(repetitions, 1 / repetitions), size=some) / repetitions
        drawn = random.multinomial(items, counts / items, size=some) / items
        means.append(((rows @ columns) * drawn).sum(axis=1))
    return np.concatenate(means)


def interval(means: NDArray[np.float64], level: float = LEVEL) -> tuple[float, float]:
    """Where the middle ``level`` of resampled numbers lies."""
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def share_interval(hits: torch.Tensor) -> tuple[float, float]:
    """The 95 % interval of the mean of Float[N] or Float[R, N] hits (see :func:`resampled_means`): the bootstrap's, or
    where all are alike Wilson's."""
    if hits.min() == hits.max():
        return wilson(hits.max().item(), hits.shape[-1])
    return interval(resampled_means(hits))


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of ``count`` (Wilson 1927), which is no point even where all agree."""
    z = NORMAL**2 / count
    middle = (share + z / 2) / (1 + z)
    half = math.sqrt(share * (1 - share) * z + z * z / 4) / (1 + z)
    return max(min(middle - half, share), 0.0), min(max(middle + half, share), 1.0)  # rounding aside, share is inside


def combined(values: Sequence[float], bounds: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The interval of the mean of independent values, from the interval of each (Zou and Donner 2008, "Construction of
    confidence limits about effect measures")."""
    middle, count = sum(values) / len(values), len(values)
    below = math.hypot(*(value - low for value, (low, _) in zip(values, bounds, strict=True)))
    above = math.hypot(*(high - value for value, (_, high) in zip(values, bounds, strict=True)))
    return middle - below / count, middle + above / count
