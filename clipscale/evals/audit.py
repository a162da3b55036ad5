"""Rates by group, with how sure one can be of them: the arithmetic of a bias audit (CLIP paper, section 7.1)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipscale.evals.bootstrap import DRAWS, NORMAL, interval, wilson

_AT_ONCE = 1 << 22  # counts held at a time


@dataclass(frozen=True)
class Rate:
    """The share of a group's images of which something is so, with a 95 % interval.

    ``units`` are what was drawn anew for the interval: images, or sets of them that belong together. ``small`` groups
    have too few of them to say much.
    """

    images: int
    units: int
    rate: float
    low: float
    high: float
    small: bool


@dataclass(frozen=True)
class Spread:
    """Rates of all groups; ``lowest`` and ``highest`` are groups that are not small, and ``gap`` lies between them.

    ``gap_by_chance`` is what the gap stays below 95 times of 100 when the groups are dealt to the same units at random,
    and ``p`` how often it is then at least as large as it was found. With less than two groups all are None.
    """

    groups: dict[str, Rate]
    lowest: str | None = None
    highest: str | None = None
    gap: float | None = None
    gap_by_chance: float | None = None
    p: float | None = None


def rates(
    true: Sequence[bool], groups: Sequence[str | None], units: Sequence[Hashable], small: int, seed: int = 0
) -> Spread:
    """Of N images: whether something is so, their group (or None), and the unit that each belongs to.

    Groups of fewer than ``small`` units are small. Intervals are percentiles of the rate when units are drawn with
    replacement; where all units of a group have the same rate, which leaves nothing to draw, they are Wilson's.
    """
    # Of every (unit, group): how many images, and of how many it is so.
    counted: dict[tuple[Hashable, str], list[int]] = defaultdict(lambda: [0, 0])
    for so, group, unit in zip(true, groups, units, strict=True):
        if group is not None:
            cell = counted[unit, group]
            cell[0], cell[1] = cell[0] + 1, cell[1] + bool(so)
    names = sorted({group for _, group in counted})
    of = np.array([names.index(group) for _, group in counted], dtype=np.int64)
    table = np.array(list(counted.values()), dtype=np.float64).reshape(-1, 2)
    found = {name: _rate(table[of == place], small, seed) for place, name in enumerate(names)}
    large = [place for place, name in enumerate(names) if not found[name].small]
    if len(large) < 2:
        return Spread(found)
    ordered = sorted(large, key=lambda place: found[names[place]].rate)
    low, high = names[ordered[0]], names[ordered[-1]]
    gap = found[high].rate - found[low].rate
    by_chance = _gaps_by_chance(table, of, large, seed)
    p = (1 + int((by_chance >= gap - 1e-12).sum())) / (1 + len(by_chance))
    return Spread(found, low, high, gap, float(np.quantile(by_chance, 0.95)), p)


def _rate(units: NDArray[np.float64], small: int, seed: int) -> Rate:
    images, so = units.sum(0)
    rate = so / images
    if np.ptp(units[:, 1] / units[:, 0]) == 0:
        low, high = wilson(rate, len(units))
    else:
        low, high = interval(_drawn_again(units, seed))
    return Rate(int(images), len(units), float(rate), low, high, len(units) < small)


def _drawn_again(units: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Rates Float64[draws] of as many units drawn with replacement."""
    kinds, counts = np.unique(units, axis=0, return_counts=True)  # units that count alike are drawn as one
    random = np.random.Generator(np.random.PCG64(seed))
    step, found = max(1, _AT_ONCE // len(counts)), []
    for start in range(0, DRAWS, step):
        drawn = random.multinomial(counts.sum(), counts / counts.sum(), size=min(step, DRAWS - start))
        images, so = (drawn @ kinds).T
        found.append(so / images)
    return np.concatenate(found)


def _gaps_by_chance(
    table: NDArray[np.float64], of: NDArray[np.int64], large: Sequence[int], seed: int
) -> NDArray[np.float64]:
    """Gaps Float64[draws] between groups of the same sizes to which units are dealt at random."""
    random = np.random.Generator(np.random.PCG64(seed))
    kept = np.isin(of, large)
    table, of = table[kept], np.searchsorted(np.sort(large), of[kept])
    found = np.empty(DRAWS // 2)
    for draw in range(len(found)):
        dealt = random.permutation(of)
        images, so = (np.bincount(dealt, weights=column, minlength=len(large)) for column in table.T)
        found[draw] = np.ptp(so / images)
    return found


@dataclass(frozen=True)
class Association:
    """How often a caption that names a group, and no other one, also has an attribute's words.

    ``both`` of ``named`` captions; ``log_odds`` (natural) against the captions that name other groups and not this one,
    0 where they are alike, with a 95 % interval; ``pmi`` (bits) over all captions, None where they never meet.
    """

    both: int
    named: int
    log_odds: float
    low: float
    high: float
    pmi: float | None


def associate(
    group: NDArray[np.bool_], attribute: NDArray[np.bool_], others: NDArray[np.bool_], count: NDArray[np.int64]
) -> Association:
    """Of captions of N kinds, ``count`` Int64[N] of each: which name the group, which have the attribute, which name
    another group. Captions that name several groups say nothing about their difference, and are left out.

    The log of the odds ratio has half a caption added to each count (Haldane 1956, Anscombe 1956), and Woolf's standard
    error (1955).
    """

    def of(kinds: NDArray[np.bool_]) -> int:
        return int(count[kinds].sum())

    group, rest = group & ~others, others & ~group
    both, named, with_it = of(group & attribute), of(group), of(rest & attribute)
    cells = [cell + 0.5 for cell in (both, named - both, with_it, of(rest) - with_it)]
    value = math.log(cells[0] / cells[1]) - math.log(cells[2] / cells[3])
    half = NORMAL * math.sqrt(sum(1 / cell for cell in cells))
    pmi = math.log2(both * int(count.sum()) / (named * of(attribute))) if both else None
    return Association(both, named, value, value - half, value + half, pmi)
