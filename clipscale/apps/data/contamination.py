"""Which images of an evaluation set are in the training shards, and which have the same caption there."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rich.console
import rich.table

from clipscale.apps.data.account import Account, open_shards
from clipscale.apps.data.jobs import Jobs, share
from clipscale.apps.data.likeness import Pictures, alike, load_pictures, look_at
from clipscale.apps.data.shards import all_samples, identity, named_shards
from clipscale.apps.data.sheet import MOST_PAIRS, Pair, Place, write_sheet
from clipscale.apps.writing import whole_text
from clipscale.config.data import Data
from clipscale.data.manifest import ShardFile
from clipscale.errors import DataError

BLOCK = 1 << 22  # pairs of an evaluation and a training image that are compared by their hashes in one go
PAIRS = 1 << 18  # of those whose hashes are alike, that are compared by their colours in one go


class CompareTask(NamedTuple):
    """One training shard, by its pictures, and all evaluation shards, by theirs."""

    train: Path
    evaluation: tuple[Path, ...]
    distance: int


class Match(NamedTuple):
    """The training sample that an evaluation image is most like: kind 0 is exact, 1 near; its shard and its place."""

    kind: int
    distance: int
    shard: int
    place: int


def contamination(
    shards: str, output: Path, overrides: Sequence[str], *, against: str, distance: int, jobs: int, ray: bool
) -> dict[str, Any]:
    """Write ``contamination.csv`` and ``.html``, ``contaminated.txt`` and ``clean.txt``, and print how much it is.

    The lists are of evaluation images, by ``shard/key``; an image that cannot be used is in neither. Memory is a
    training shard's and the evaluation set's, less its pictures, some 300 bytes for each image, and 300 MB beside.
    """
    files, config = open_shards(shards, output, overrides, "contamination", writes=False)
    held_out, _ = named_shards(against, overrides, "--against")
    data = config.data
    options = {
        "shards": identity(files), "against": identity(held_out), "distance": distance, "image_keys": data.image_keys,
        "caption_key": data.caption_key, "max_pixels": data.max_pixels,
    }  # fmt: skip
    work = Jobs(output, "contamination", options, jobs, ray)
    train, looked_at = look_at(work, "train", files, data)
    evaluation, judged = look_at(work, "evaluation", held_out, data)
    if not judged.kept:
        raise DataError(f"--against {against}: none of {judged.read:,} samples has an image that can be used")
    compares = {path.stem: CompareTask(path, evaluation, distance) for path in train}
    pictures, captions = _merge(work.run("compare", compare, compares).values())
    if not share()[0]:
        _write(output, _Found(files, held_out, evaluation, pictures, captions), data)
        numbers = _summary(output, judged.kept, looked_at, judged, pictures, captions)
        told = {"tool": "contamination", "train": _told(looked_at), "evaluation": _told(judged), **numbers}
        with whole_text(output / "account.json") as out:
            out.write(json.dumps(told, indent=1) + "\n")
        again = [
            "clipscale",
            "data",
            "filter",
            against,
            "CLEAN_SHARDS",
            *overrides,
            "--keep",
            str(output / "clean.txt"),
        ]
        print(f"next: {shlex.join(again)}")
    return {"pictures": pictures, "captions": captions}


@cache
def _evaluation(paths: tuple[Path, ...]) -> Pictures:
    """The pictures of all evaluation shards as of one; their captions' owners are counted through."""
    parts = [load_pictures(path) for path in paths]
    before = np.cumsum([0, *(len(part.keys) for part in parts)])
    owners = [part.caption_of + first for part, first in zip(parts, before, strict=False)]
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in Pictures._fields[1:-1]}
    return Pictures([key for part in parts for key in part.keys], caption_of=np.concatenate(owners), **columns)


def compare(task: CompareTask) -> dict[str, Any]:
    """The best match in one training shard of each evaluation image, and the first sample with a caption of its."""
    ours, theirs = load_pictures(task.train), _evaluation(task.evaluation)
    shard = int(task.train.stem)
    copies = best_copies(ours, theirs, task.distance)
    best = [(image, (kind, bits, shard, int(ours.places[other]))) for image, (kind, bits, other) in copies.items()]
    known: dict[int, int] = {}
    for caption, owner in zip(ours.captions.tolist(), ours.caption_of.tolist(), strict=True):
        known.setdefault(caption, owner)
    said: dict[int, tuple[int, int]] = {}
    for caption, owner in zip(theirs.captions.tolist(), theirs.caption_of.tolist(), strict=True):
        if caption in known:
            first = (shard, int(ours.places[known[caption]]))
            said[owner] = min(said.get(owner, first), first)
    return {"pictures": sorted(best), "captions": sorted(said.items())}


def best_copies(ours: Pictures, theirs: Pictures, distance: int) -> dict[int, tuple[int, int, int]]:
    """``(kind, bits apart, training image)`` of each evaluation image that one training shard has, kind 0 exact and 1
    near: the exact before the near, then the one with the fewest bits, then the first."""
    best: dict[int, tuple[int, int, int]] = {}
    step = max(1, BLOCK // max(1, len(ours.hash)))
    for start in range(0, len(theirs.hash), step):
        apart = np.bitwise_count(theirs.hash[start : start + step, None] ^ ours.hash[None])
        close = np.flatnonzero(apart <= distance)
        for first in range(0, len(close), PAIRS):  # thousands of blank images are alike all with all
            rows, others = np.divmod(close[first : first + PAIRS], len(ours.hash))
            images, bits = rows + start, apart[rows, others]
            near = (theirs.exact[images] != ours.exact[others]).any(axis=1)
            chosen = ~near | alike(theirs.cells[images], ours.cells[others], distance)
            found = np.stack([images, near, bits, others])[:, chosen]
            found = found[:, np.lexsort(found[::-1])]
            _, firsts = np.unique(found[0], return_index=True)
            for image, *copy in found[:, firsts].T.tolist():
                best[image] = min(best.get(image, tuple(copy)), tuple(copy))
    return best


def _merge(results: Iterable[dict[str, Any]]) -> tuple[dict[int, Match], dict[int, tuple[int, int]]]:
    """Over all training shards: the best picture, exact before near, and the first caption, of each image."""
    pictures: dict[int, Match] = {}
    captions: dict[int, tuple[int, int]] = {}
    for result in results:
        for image, match in result["pictures"]:
            pictures[image] = min(pictures.get(image, Match(*match)), Match(*match))
        for image, place in result["captions"]:
            captions.setdefault(image, tuple(place))
    return pictures, captions


class _Found(NamedTuple):
    train: Sequence[ShardFile]
    held_out: Sequence[ShardFile]
    evaluation: tuple[Path, ...]
    pictures: dict[int, Match]
    captions: dict[int, tuple[int, int]]


def _write(output: Path, found: _Found, data: Data) -> None:
    places: list[Place] = []
    keys: list[str] = []
    for file, path in zip(found.held_out, found.evaluation, strict=True):
        part = load_pictures(path)
        places += [Place(file, number) for number in part.places.tolist()]
        keys += [f"{file.name}/{key}" for key in part.keys]
    for name, wanted in (("contaminated.txt", True), ("clean.txt", False)):
        with whole_text(output / name) as out:
            out.writelines(f"{key}\n" for i, key in enumerate(keys) if (i in found.pictures) is wanted)
    sources = {(match.shard, match.place) for match in found.pictures.values()} | {*found.captions.values()}
    named = _keys_of(found.train, sources)
    with whole_text(output / "contamination.csv") as out:
        rows = csv.writer(out, lineterminator="\n")
        rows.writerow(["key", "train_key", "kind", "distance"])
        for i, key in enumerate(keys):
            if match := found.pictures.get(i):
                kind = "near" if match.kind else "exact"
                rows.writerow([key, named[match.shard, match.place], kind, match.distance])
            if i in found.captions:
                rows.writerow([key, named[found.captions[i]], "caption", ""])
    ranked = sorted(found.pictures.items(), key=lambda item: (-item[1].kind, -item[1].distance, item[0]))
    pairs = [
        Pair(
            places[i],
            Place(found.train[match.shard], match.place),
            f"evaluation, training: {'near, ' + str(match.distance) + ' bits apart' if match.kind else 'exact'}"
            + ("; same caption" if i in found.captions else ""),
        )
        for i, match in ranked[:MOST_PAIRS]
    ]  # fmt: skip
    told = f"{len(pairs):,} of {len(ranked):,} evaluation images that are in the training data, the least alike first"
    write_sheet(output / "contamination.html", "Contamination", told, pairs, data)


def _keys_of(files: Sequence[ShardFile], wanted: Iterable[tuple[int, int]]) -> dict[tuple[int, int], str]:
    """``shard/key`` of samples by shard and place, reading each shard that is named once."""
    by_shard: dict[int, set[int]] = {}
    for shard, place in wanted:
        by_shard.setdefault(shard, set()).add(place)
    return {
        (shard, place): sample.key
        for shard, places in by_shard.items()
        for place, sample in enumerate(all_samples(files[shard]))
        if place in places
    }


def _told(account: Account) -> dict[str, Any]:
    return {
        "read": account.read, "compared": account.kept, "dropped": dict(account.dropped.most_common()),
        "damaged_shards": account.damaged,
    }  # fmt: skip


def _summary(
    output: Path,
    count: int,
    looked_at: Account,
    judged: Account,
    pictures: dict[int, Match],
    captions: dict[int, tuple[int, int]],
) -> dict[str, int]:
    """Print what was found; the same numbers by name."""
    exact = sum(not match.kind for match in pictures.values())
    both = len(pictures.keys() & captions.keys())
    numbers = {
        "exact": exact, "near": len(pictures) - exact, "contaminated": len(pictures), "clean": count - len(pictures),
        "same_caption": len(captions), "same_image_and_caption": both,
    }  # fmt: skip
    table = rich.table.Table("", "samples", show_header=False)
    table.columns[1].justify = "right"
    for title, account in (("training", looked_at), ("evaluation", judged)):
        table.add_row(f"{title}: read", f"{account.read:,}")
        table.add_row(f"{title}: compared", f"{account.kept:,}")
        for reason, dropped in account.dropped.most_common():
            table.add_row(f"{title}: {reason}", f"{dropped:,}")
        table.add_section()
    for name, number in numbers.items():
        table.add_row(name.replace("_", " "), f"{number:,}")
    rich.console.Console().print(table)
    for shard, damage in {**looked_at.damaged, **judged.damaged}.items():
        print(f"warning: shard {shard} {damage}")
    print(f"{len(pictures) / count:.1%} of the evaluation images are in the training data".replace("%", " %"))
    print(f"pairs: {output / 'contamination.csv'}; to look at: {output / 'contamination.html'}")
    return numbers
