"""A shuffle of all samples of all shards in two passes, with one shard of each in memory.

Every sample has a 64-bit hash of (seed, shard number, place), and the order is that of the hashes: a uniform
permutation. Pass 1 reads each shard once and writes its samples in that order, as a *run*. Pass 2 merges: an output
shard is a range of hashes, cut out of every run where it lies.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from clipscale.apps.data.account import Account
from clipscale.apps.data.jobs import MARKERS, Jobs
from clipscale.apps.data.shards import all_samples, distinct, write_shard
from clipscale.apps.writing import whole
from clipscale.data.manifest import ShardFile
from clipscale.data.order import mix
from clipscale.data.samples import Member
from clipscale.errors import DataError

BUCKETS_PER_SHARD = 4  # in which hashes are counted; a shard is sorted out of those that it touches
MOST_BITS = 20


class Scatter(NamedTuple):
    """Pass 1 over one shard."""

    file: ShardFile
    number: int
    run: Path
    seed: int


class Plan(NamedTuple):
    """The runs that are to be cut into shards."""

    runs: Path
    run_count: int
    samples: int
    shard_samples: int


class Gather(NamedTuple):
    """Pass 2 for one shard: of ``run_count`` runs, hashes ``low <= h <= high``; of those, ``size`` after ``skip``."""

    path: Path
    runs: Path
    run_count: int
    low: int
    high: int
    skip: int
    size: int


def shuffle_shards(work: Jobs, files: Sequence[ShardFile], shard_samples: int, seed: int) -> Account:
    """Write all samples in a random order into shards of exactly ``shard_samples``; only the last one is smaller.

    The runs take as much room as the samples, below ``output/.clipscale``, until the end. Raises DataError when what
    was written is not what was read: counts, and a sum of hashes over every key and byte.
    """
    runs = work.output / MARKERS / work.tool / "runs"
    tasks = {f"{i:06d}": Scatter(file, i, runs / f"{i:06d}", seed) for i, file in enumerate(files)}
    scattered = work.run("scatter", scatter, tasks)
    account, total = Account.of(files, scattered), sum(result["sum"] for result in scattered.values())
    if not account.kept:
        raise DataError("the shards hold no sample; clipscale data check says what is wrong with them")
    plan = Plan(runs, len(files), account.kept, shard_samples)
    cuts = work.run("plan", plan_shards, {"shards": plan})["shards"]
    names = [f"{i:06d}.tar" for i in range(len(cuts))]
    shards = {name: Gather(work.output / name, runs, len(files), *cut) for name, cut in zip(names, cuts, strict=True)}
    written = work.run("gather", gather, shards)
    account.shards = {name: result["kept"] for name, result in written.items()}
    again = sum(result["sum"] for result in written.values())
    if sum(account.shards.values()) != account.kept or again % (1 << 64) != total % (1 << 64):
        raise DataError(
            f"the {sum(account.shards.values()):,} samples in {work.output} are not the {account.kept:,} that were "
            "read; delete it and begin anew"
        )
    work.leave(runs)
    return account


def scatter(task: Scatter) -> dict[str, Any]:
    """Write a shard's samples in the order of their hashes, and where they lie: UInt64[2, samples + 1]."""
    records: list[bytes] = []
    hashes: list[int] = []
    dropped: Counter[str] = Counter()
    for place, sample in enumerate(all_samples(task.file)):
        if sample.problem:  # one of its members hides another: it cannot be written as it was
            dropped[sample.problem] += 1
            continue
        records.append(_pack(sample))
        hashes.append(mix(task.seed, task.number, place))
    order = np.argsort(np.array(hashes, np.uint64), kind="stable").tolist()
    sizes = [0, *(len(records[i]) for i in order)]
    ranked = np.array([*(hashes[i] for i in order), (1 << 64) - 1], np.uint64)
    index = np.stack([ranked, np.cumsum(np.array(sizes, np.uint64), dtype=np.uint64)])
    with whole(task.run.with_suffix(".bin")) as out:
        out.writelines(records[i] for i in order)
    with whole(task.run.with_suffix(".npy")) as out:
        np.save(out, index)
    return {
        "read": len(records) + dropped.total(), "kept": len(records), "dropped": dropped,
        "damage": task.file.summary.damage, "sum": sum(map(_digest, records)),
    }  # fmt: skip


def plan_shards(plan: Plan) -> list[tuple[int, int, int, int]]:
    """``(low, high, skip, size)`` of every shard: hashes are counted by their first bits, then cut at the samples."""
    shards = -(-plan.samples // plan.shard_samples)
    bits = min(MOST_BITS, (BUCKETS_PER_SHARD * shards).bit_length())
    shift = np.uint64(64 - bits)
    counts = np.zeros(1 << bits, np.int64)
    for run in range(plan.run_count):
        counts += np.bincount((_index(plan.runs, run)[0, :-1] >> shift).astype(np.int64), minlength=1 << bits)
    before = np.concatenate([[0], np.cumsum(counts)])
    cuts = []
    for start in range(0, plan.samples, plan.shard_samples):
        stop = min(start + plan.shard_samples, plan.samples)
        low, high = (int(np.searchsorted(before, place, "right")) - 1 for place in (start, stop - 1))
        cuts.append((low << 64 - bits, (high + 1 << 64 - bits) - 1, start - int(before[low]), stop - start))
    return cuts


def gather(task: Gather) -> dict[str, Any]:
    """Write one output shard: its samples are read run by run and laid in the order of their hashes."""
    found: list[NDArray[np.uint64]] = []
    for run in range(task.run_count):
        index = _index(task.runs, run)
        hashes = index[0, :-1]
        first = int(np.searchsorted(hashes, np.uint64(task.low)))
        stop = int(np.searchsorted(hashes, np.uint64(task.high), "right"))
        numbers = np.full(stop - first, run, np.uint64)
        found.append(np.stack([hashes[first:stop], numbers, index[1, first:stop], index[1, first + 1 : stop + 1]]))
    table = np.concatenate(found, axis=1)
    order = np.lexsort((table[2], table[1], table[0]))[task.skip : task.skip + task.size]
    records: list[bytes] = [b""] * len(order)
    places = sorted(((*map(int, table[1:, column]), rank) for rank, column in enumerate(order)))
    for run, slices in groupby(places, itemgetter(0)):
        with (task.runs / f"{run:06d}.bin").open("rb") as raw:
            for _, start, stop, rank in slices:
                raw.seek(start)
                records[rank] = raw.read(stop - start)
    kept = write_shard(task.path, distinct(map(_unpack, records)))
    return {"kept": kept, "sum": sum(map(_digest, records))}


def _index(runs: Path, run: int) -> NDArray[np.uint64]:
    """Hashes and offsets of a run, in order; the last column is where it ends."""
    return np.load(runs / f"{run:06d}.npy", mmap_mode="r")


def _pack(sample: Member) -> bytes:
    """A sample as bytes: the length of a head, the head (key, names and sizes of the members), the members."""
    head = json.dumps([sample.key, [(name, len(data)) for name, data in sample.members.items()]]).encode()
    return b"".join([len(head).to_bytes(4, "little"), head, *sample.members.values()])


def _unpack(record: bytes) -> Member:
    at = 4 + int.from_bytes(record[:4], "little")
    key, members = json.loads(record[4:at])

    def cut() -> Iterator[tuple[str, bytes]]:
        start = at
        for name, size in members:
            yield name, record[start : start + size]
            start += size

    return Member(key, dict(cut()))


def _digest(record: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(record, digest_size=8).digest(), "little")
