"""``clipscale data reshard``: the same samples in shards of another size, in the same order or shuffled over all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipscale.apps.data.account import Account, at_least, open_shards, train_command
from clipscale.apps.data.jobs import Jobs
from clipscale.apps.data.shards import distinct, identity, write_shard
from clipscale.apps.data.shuffle import shuffle_shards
from clipscale.data.manifest import ShardFile
from clipscale.data.samples import Member
from clipscale.data.stream import read_samples
from clipscale.errors import DataError


class Piece(NamedTuple):
    """Samples ``start <= i < stop`` of a shard, or, where ``kept`` names a file of positions, of those it lists."""

    file: ShardFile
    start: int
    stop: int
    kept: Path | None = None


class Group(NamedTuple):
    """An output shard and the pieces that it is made of."""

    path: Path
    pieces: tuple[Piece, ...]


def reshard(
    shards: str,
    output: Path,
    overrides: Sequence[str],
    *,
    shuffle: bool = False,
    shard_samples: int = 1000,
    seed: int = 0,
    jobs: int = 0,
    ray: bool = False,
) -> Account:
    """Write all samples into shards ``000000.tar …`` of ``shard_samples``; only the last one is smaller.

    Without ``shuffle`` the order stays, and a sample that is left out as unusable makes its shard smaller. A key that
    comes twice in an output shard is changed as ``distinct`` says.
    """
    at_least("--shard-samples", shard_samples, 1)
    files, _ = open_shards(shards, output, overrides, "reshard")
    options = {"shards": identity(files), "shuffle": shuffle, "shard_samples": shard_samples, "seed": seed}
    work = Jobs(output, "reshard", options, jobs, ray)
    if shuffle:
        account = shuffle_shards(work, files, shard_samples, seed)
    else:
        counted = work.run("count", count_samples, {f"{i:06d}": file for i, file in enumerate(files)})
        account = Account(
            damaged={
                file.name: found["damage"]
                for file, found in zip(files, counted.values(), strict=True)
                if found["damage"]
            }
        )
        sources = [Piece(file, 0, found["samples"]) for file, found in zip(files, counted.values(), strict=True)]
        write_groups(work, plan_groups(output, sources, shard_samples), account)
    account.close(output, "reshard", train_command(output, {"train": account.shards}, overrides))
    return account


def count_samples(file: ShardFile) -> dict[str, Any]:
    """How many samples a shard holds, and what is wrong with it."""
    return {"samples": file.summary.samples, "damage": file.summary.damage}


def plan_groups(output: Path, sources: Iterable[Piece], shard_samples: int) -> dict[str, Group]:
    """Lay the sources end to end and cut them into shards ``000000.tar …`` of ``shard_samples``."""
    groups: dict[str, Group] = {}
    pieces: list[Piece] = []
    room = shard_samples

    def close() -> None:
        name = f"{len(groups):06d}.tar"
        groups[name] = Group(output / name, tuple(pieces))
        pieces.clear()

    for source in sources:
        start = source.start
        while start < source.stop:
            stop = min(start + room, source.stop)
            pieces.append(source._replace(start=start, stop=stop))
            room -= stop - start
            start = stop
            if not room:
                close()
                room = shard_samples
    if pieces:
        close()
    if not groups:
        raise DataError("no sample is left to be written; clipscale data check says what is wrong with the shards")
    return groups


def write_groups(work: Jobs, groups: dict[str, Group], account: Account) -> None:
    """Write the planned shards, and count what they were made of."""
    for name, result in work.run("write", write_group, groups).items():
        account.add(result)
        account.shards[name] = result["kept"]


def write_group(group: Group) -> dict[str, Any]:
    """Write one output shard, reading no more of its sources than it is made of."""
    dropped: Counter[str] = Counter()

    def usable() -> Iterator[Member]:
        for piece in group.pieces:
            for sample in _read(piece):
                if sample.problem:  # one of its members hides another: it cannot be written as it was
                    dropped[sample.problem] += 1
                else:
                    yield sample

    kept = write_shard(group.path, distinct(usable()))
    return {"read": kept + dropped.total(), "kept": kept, "dropped": dropped}


def _read(piece: Piece) -> Iterator[Member]:
    if piece.kept is None:
        yield from read_samples(piece.file, piece.start, piece.stop)
        return
    places = np.load(piece.kept)[piece.start : piece.stop].tolist()
    samples = read_samples(piece.file, places[0], places[-1] + 1)
    at = places[0]
    for place in places:
        yield next(islice(samples, place - at, None))
        at = place + 1
