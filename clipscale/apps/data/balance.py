"""``clipscale data balance``: at most so many samples of each concept, as CLIP's data were made.

Every sample has a 64-bit hash of (seed, shard number, place). A concept draws the ``per_concept`` samples of it with
the smallest hashes, all if there are no more; a sample is kept if any of its concepts draws it. So the cap on what a
concept draws is exact, and a concept that comes along with rarer ones can have more than that in the end.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rich.console
import rich.markup
import rich.table
from numpy.typing import NDArray

from clipscale.apps.data.account import Account, at_least, open_shards, train_command
from clipscale.apps.data.concepts import read_concepts
from clipscale.apps.data.jobs import MARKERS, Jobs, share
from clipscale.apps.data.reshard import Piece, plan_groups, write_groups
from clipscale.apps.data.shards import all_samples, identity
from clipscale.apps.writing import whole, whole_text
from clipscale.config.data import Data
from clipscale.data.manifest import ShardFile
from clipscale.data.order import mix
from clipscale.data.samples import BadSample, Member, find_captions, find_field
from clipscale.errors import ConfigError, DataError

DIGIT = 8  # bits of the hashes that a pass over all matches settles
SHOWN = 10  # concepts at either end of the printed table
ALL = np.uint64((1 << 64) - 1)


class MatchTask(NamedTuple):
    """One shard in which concepts are looked for, and the file of what was found."""

    file: ShardFile
    number: int
    matches: Path
    data: Data
    concepts: Path | None
    label_key: str | None
    seed: int


class Matches(NamedTuple):
    """What was found in a shard: P pairs of a sample and a concept.

    ``names`` are the C concepts of this shard, ``concept`` Int[P] counts in them, ``sample`` Int[P] is the place in the
    shard, and ``hash`` UInt64[P] the sample's.
    """

    names: list[str]
    concept: NDArray[np.int64]
    sample: NDArray[np.int64]
    hash: NDArray[np.uint64]


class DrawTask(NamedTuple):
    """One shard, what was found in it, and the file of the largest hash that each concept draws."""

    matches: Path
    limits: Path


def balance(
    shards: str,
    output: Path,
    overrides: Sequence[str],
    *,
    per_concept: int = 20_000,
    concepts: Path | None = None,
    label_key: str | None = None,
    shard_samples: int = 1000,
    seed: int = 0,
    jobs: int = 0,
    ray: bool = False,
) -> Account:
    """Write the samples that any concept draws, in their order, into shards of ``shard_samples``.

    ``output/concepts.csv`` has every concept with its samples before and after. Memory is a shard's, and some hundred
    bytes for each concept.
    """
    at_least("--per-concept", per_concept, 1)
    at_least("--shard-samples", shard_samples, 1)
    if (concepts is None) == (label_key is None):
        raise ConfigError("give --concepts FILE or --label-key json:FIELD, one of them")
    known = list(read_concepts(concepts).names.values()) if concepts else []
    files, config = open_shards(shards, output, overrides, "balance")
    options = {
        "shards": identity(files), "per_concept": per_concept, "label_key": label_key, "seed": seed,
        "concepts": hashlib.sha256(json.dumps(known).encode()).hexdigest(), "shard_samples": shard_samples,
        "caption_key": config.data.caption_key,
    }  # fmt: skip
    work = Jobs(output, "balance", options, jobs, ray)
    place = output / MARKERS / "balance"
    tasks = {
        f"{i:06d}": MatchTask(file, i, place / "matches" / f"{i:06d}.npz", config.data, concepts, label_key, seed)
        for i, file in enumerate(files)
    }
    matches = [task.matches for task in tasks.values()]
    account = Account.of(files, work.run("match", match_concepts, tasks))
    if account.read == account.dropped.total():
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in account.dropped.most_common())
        raise DataError(f"no sample is left of {account.read:,} ({reasons}); see --concepts, --label-key")
    limits = place / "limits.npz"
    work.run("limits", find_limits, {"all": LimitTask(tuple(matches), tuple(known), per_concept, limits)})
    draws = {path.stem: DrawTask(path, limits) for path in matches}
    drawn = list(work.run("draw", draw, draws).values())
    account.dropped.update({"over_the_cap": sum(result["over"] for result in drawn)})
    sources = [
        Piece(file, 0, result["kept"], _kept(path)) for file, path, result in zip(files, matches, drawn, strict=True)
    ]
    written = Account()
    write_groups(work, plan_groups(output, sources, shard_samples), written)
    account.kept, account.shards = written.kept, written.shards
    account.dropped = +account.dropped
    if not share()[0]:
        _report(output / "concepts.csv", limits, matches, account)
    account.close(output, "balance", train_command(output, {"train": account.shards}, overrides))
    return account


def match_concepts(task: MatchTask) -> dict[str, Any]:
    """Look for the concepts of every sample of a shard; those without any are dropped here, none is kept yet."""
    dropped: Counter[str] = Counter()
    names: dict[str, int] = {}
    pairs: list[tuple[int, int, int]] = []
    read = 0
    for place, sample in enumerate(all_samples(task.file)):
        read += 1
        try:
            found = sorted(_concepts(sample, task))
        except BadSample as reason:
            dropped[str(reason)] += 1
            continue
        drawn = mix(task.seed, task.number, place)
        pairs += [(names.setdefault(name, len(names)), place, drawn) for name in found]
    concept, place_of, hashes = zip(*pairs, strict=True) if pairs else ((), (), ())
    with whole(task.matches) as out:
        np.savez(
            out, names=_as_array(list(names)), concept=np.array(concept, np.int64),
            sample=np.array(place_of, np.int64), hash=np.array(hashes, np.uint64),
        )  # fmt: skip
    return {"read": read, "kept": 0, "dropped": dropped, "damage": task.file.summary.damage}


def _concepts(sample: Member, task: MatchTask) -> set[str]:
    """The concepts of a sample, at least one. Raises BadSample."""
    if sample.problem:
        raise BadSample(sample.problem)
    if task.label_key:
        value = find_field(sample, task.label_key)
        labels = value if isinstance(value, list) else [value]
        found = {str(label).strip() for label in labels if label is not None} - {""}
    else:
        assert task.concepts is not None
        concepts = read_concepts(task.concepts)
        found = set().union(*map(concepts.find, find_captions(sample, task.data.caption_key)))
    if not found:
        raise BadSample("no_concept")
    return found


class LimitTask(NamedTuple):
    """All that was found, the concepts that were looked for, and the file of what each may draw."""

    matches: tuple[Path, ...]
    known: tuple[str, ...]
    per_concept: int
    path: Path


def find_limits(task: LimitTask) -> None:
    """Count every concept, and find the ``per_concept``-th smallest hash of each that has more, digit by digit."""
    index = {name: i for i, name in enumerate(task.known)}
    counts = Counter[int]()
    for path in task.matches:
        found = load_matches(path)
        ids = [index.setdefault(name, len(index)) for name in found.names]
        counts.update(dict(zip(ids, np.bincount(found.concept, minlength=len(ids)).tolist(), strict=True)))
    before = np.array([counts[i] for i in range(len(index))], np.int64)
    limits = np.full(len(index), ALL)
    over = np.flatnonzero(before > task.per_concept)
    slots = np.full(len(index), -1)
    slots[over] = np.arange(len(over))
    prefix, left = np.zeros(len(over), np.uint64), np.full(len(over), task.per_concept)
    unsettled = np.ones(len(over), bool)
    for shift in range(64 - DIGIT, -1, -DIGIT):
        if not unsettled.any():
            break
        counted = np.zeros((len(over), 1 << DIGIT), np.int64)
        for slot, hashes in _of_the_unsettled(task.matches, index, slots, unsettled):
            inside = prefix[slot] == (hashes >> np.uint64(shift) >> np.uint64(DIGIT))
            digits = hashes[inside] >> np.uint64(shift) & np.uint64((1 << DIGIT) - 1)
            np.add.at(counted, (slot[inside], digits.astype(np.int64)), 1)
        upto = counted.cumsum(1)
        digit = (upto >= left[:, None]).argmax(1)
        rows = np.arange(len(over))
        left -= np.where(unsettled, upto[rows, digit] - counted[rows, digit], 0)
        prefix = np.where(unsettled, prefix << np.uint64(DIGIT) | digit.astype(np.uint64), prefix)
        settled = unsettled & ((left == counted[rows, digit]) | (shift == 0))
        limits[over[settled]] = (prefix[settled] + np.uint64(1) << np.uint64(shift)) - np.uint64(1)
        unsettled &= ~settled
    with whole(task.path) as out:
        np.savez(out, names=_as_array(list(index)), before=before, limits=limits)


def _of_the_unsettled(
    matches: Sequence[Path], index: dict[str, int], slots: NDArray[np.int64], unsettled: NDArray[np.bool_]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint64]]]:
    """``(slot, hash)`` of every pair whose concept's limit is not known yet, a shard at a time."""
    for path in matches:
        found = load_matches(path)
        slot = slots[_ids(found, index)]
        chosen = slot >= 0
        chosen[chosen] = unsettled[slot[chosen]]
        yield slot[chosen], found.hash[chosen]


def draw(task: DrawTask) -> dict[str, int]:
    """Write the places of a shard's samples that any of their concepts draws."""
    found = load_matches(task.matches)
    index, _, limits = _load_limits(task.limits)
    kept = np.unique(found.sample[found.hash <= limits[_ids(found, index)]])
    with whole(_kept(task.matches)) as out:
        np.save(out, kept)
    return {"kept": len(kept), "over": len(np.unique(found.sample)) - len(kept)}


def load_matches(path: Path) -> Matches:
    """What ``match_concepts`` found in a shard."""
    with np.load(path) as stored:
        return Matches(_as_list(stored["names"]), stored["concept"], stored["sample"], stored["hash"])


def _load_limits(path: Path) -> tuple[dict[str, int], NDArray[np.int64], NDArray[np.uint64]]:
    with np.load(path) as stored:
        return {name: i for i, name in enumerate(_as_list(stored["names"]))}, stored["before"], stored["limits"]


def _ids(found: Matches, index: dict[str, int]) -> NDArray[np.int64]:
    return np.array([index[name] for name in found.names], np.int64)[found.concept]


def _kept(matches: Path) -> Path:
    return matches.with_suffix(".kept.npy")


def _as_array(names: list[str]) -> NDArray[np.uint8]:
    return np.frombuffer(json.dumps(names).encode(), np.uint8)


def _as_list(stored: NDArray[np.uint8]) -> list[str]:
    return json.loads(stored.tobytes())


def _report(path: Path, limits: Path, matches: Sequence[Path], account: Account) -> None:
    """Write ``concepts.csv``, the most frequent first, and print both ends of it."""
    index, before, _ = _load_limits(limits)
    after = np.zeros(len(index), np.int64)
    for part in matches:
        found = load_matches(part)
        ids = _ids(found, index)[np.isin(found.sample, np.load(_kept(part)))]
        np.add.at(after, ids, 1)
    names = list(index)
    order = sorted(range(len(names)), key=lambda i: (-before[i], names[i]))
    rows = [(names[i], int(before[i]), int(after[i])) for i in order]
    with whole_text(path) as out:
        csv.writer(out, lineterminator="\n").writerows([("concept", "before", "after"), *rows])
    met = [row for row in rows if row[1]]
    table = rich.table.Table("concept", "before", "after")
    for row in [*met[:SHOWN], ("…", "", ""), *met[-SHOWN:]] if len(met) > 2 * SHOWN else met:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else rich.markup.escape(str(value)) for value in row))
    table.add_section()
    table.add_row("no concept", f"{account.dropped['no_concept']:,}", "0")
    rich.console.Console().print(table)
    print(f"{len(met):,} of {len(rows):,} concepts were met: {path}")
