"""What comes more than once in many shards, exactly and in bounded memory: by 64-bit hashes, sorted shard by shard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from clipscale.apps.data.jobs import Jobs
from clipscale.apps.data.summaries import hash64
from clipscale.apps.writing import whole

PER_TASK = 1 << 24  # hashes that are looked at together: 256 MiB with their places
EXAMPLES = 10


class Repeats(NamedTuple):
    """How many ``values`` there are, how many of them come again, how many are an earlier one once more.

    ``examples`` holds, for some that come again, two places: ``((shard, place), (shard, place))``.
    """

    values: int
    repeated: int
    extra: int
    examples: list[list[tuple[int, int]]]


class _Part(NamedTuple):
    paths: Sequence[str]
    first: int
    last: int


def save_hashes(path: Path, values: Sequence[str]) -> None:
    """Keep a shard's values for :func:`find_repeats`: UInt64[2, N], hashes in order and where each stood."""
    hashes = np.array([hash64(value) for value in values], dtype=np.uint64)
    order = np.argsort(hashes, kind="stable")
    with whole(path) as out:
        np.save(out, np.stack([hashes[order], order.astype(np.uint64)]))


def within(path: Path) -> int:
    """How many of a shard's values are an earlier one of the same shard once more."""
    hashes = np.load(path, mmap_mode="r")[0]
    return int((hashes[1:] == hashes[:-1]).sum())


def find_repeats(jobs: Jobs, step: str, paths: Sequence[Path]) -> Repeats:
    """What comes more than once in all that was saved; ``paths`` in the order of the shards' numbers."""
    count = sum(np.load(path, mmap_mode="r").shape[1] for path in paths)
    parts = -(-count // PER_TASK) or 1
    edges = [(1 << 64) * i // parts for i in range(parts + 1)]
    names = [str(path) for path in paths]
    tasks = {f"{i:05d}": _Part(names, edges[i], edges[i + 1] - 1) for i in range(parts)}
    found = list(jobs.run(step, _look, tasks).values())
    examples = [pair for part in found for pair in part["examples"]][:EXAMPLES]
    return Repeats(count, sum(part["repeated"] for part in found), sum(part["extra"] for part in found), examples)


def _look(part: _Part) -> dict[str, Any]:
    """The hashes ``first <= hash <= last`` of all shards."""
    pieces: list[NDArray[np.uint64]] = []
    shards: list[NDArray[np.uint32]] = []
    for number, path in enumerate(part.paths):
        saved = np.load(path, mmap_mode="r")
        start = np.searchsorted(saved[0], np.uint64(part.first))
        stop = np.searchsorted(saved[0], np.uint64(part.last), side="right")
        pieces.append(saved[:, start:stop])
        shards.append(np.full(stop - start, number, dtype=np.uint32))
    hashes, places = np.concatenate(pieces, axis=1)
    order = np.argsort(hashes, kind="stable")
    hashes, places, shard = hashes[order], places[order], np.concatenate(shards)[order]
    again = np.flatnonzero(hashes[1:] == hashes[:-1]) + 1  # places of those that are an earlier one once more
    first = again[np.concatenate([[True], np.diff(again) > 1])] if len(again) else again
    examples = [[(int(shard[i]), int(places[i])) for i in (at - 1, at)] for at in first[:EXAMPLES].tolist()]
    return {"repeated": len(first), "extra": len(again), "examples": examples}
