"""Training, validation and test: shares of the samples, of which no group is in two."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from clipscale.data.order import permutation
from clipscale.errors import ConfigError, DataError

NAMES = ("train", "val", "test")


def parse_split(text: str) -> dict[str, float]:
    """Shares by split: ``0.9/0.05/0.05`` are train, val and test; a share of 0 leaves one out. Raises ConfigError."""
    try:
        shares = [float(part) for part in text.split("/")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or not all(0 <= each <= 1 for each in shares) or not abs(sum(shares) - 1) < 1e-6:
        raise ConfigError(
            f"--split {text}: give up to three shares of train, val and test that add up to 1, e.g. 0.9/0.05/0.05"
        )
    return {name: share for name, share in zip(NAMES, shares, strict=False) if share}


def connect(keys: Iterable[Iterable[Hashable]]) -> NDArray[np.int64]:
    """Groups of what shares a key, directly or by way of others: the number of each one's first member, int64 [N]."""
    parents: list[int] = []
    first: dict[Hashable, int] = {}

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    for number, its_keys in enumerate(keys):
        parents.append(number)
        for key in its_keys:
            other, own = root(first.setdefault(key, number)), root(number)
            parents[max(other, own)] = min(other, own)
    return np.array([root(number) for number in range(len(parents))], dtype=np.int64)


def assign(groups: NDArray[np.int64], shares: Mapping[str, float], seed: int) -> NDArray[np.int64]:
    """Deal whole groups to the splits: the number of each sample's split, int64 [N].

    Groups come in a random order, each to the split that has least of its share. Raises ConfigError when a split would
    be empty.
    """
    _, members, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(shares) == 1:
        return np.zeros(len(groups), dtype=np.int64)
    wanted, have = list(shares.values()), [0.0] * len(shares)
    chosen = np.empty(len(sizes), dtype=np.int64)
    for group in permutation(len(sizes), seed, 1).tolist():
        half = float(sizes[group]) / 2
        split = min(range(len(have)), key=lambda each: (have[each] + half) / wanted[each])
        have[split] += 2 * half
        chosen[group] = split
    if empty := [name for name, count in zip(shares, have, strict=True) if not count]:
        raise ConfigError(
            f"--split {'/'.join(f'{share:g}' for share in wanted)}: {' and '.join(empty)} would be empty, with only "
            f"{len(sizes):,} groups to deal; give it a larger share"
        )
    return chosen[members]


def check_apart(found: Mapping[str, Sequence[int]], what: str) -> None:
    """Raises DataError when two splits hold one of ``what`` (hashes, by split) in common."""
    hashes = {name: np.unique(np.array(values, dtype=np.uint64)) for name, values in found.items()}
    names = list(hashes)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if common := len(np.intersect1d(hashes[one], hashes[other], assume_unique=True)):
                raise DataError(
                    f"{common:,} {what} are in both {one} and {other}: the source changed while it was packed; delete "
                    "the output and begin anew"
                )
