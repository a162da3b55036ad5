"""``clipscale data dedup``: drop images that come twice, exactly or nearly; the first one in shard order stays."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipscale.apps.data.account import Account, open_shards, output_names, train_command
from clipscale.apps.data.contamination import contamination
from clipscale.apps.data.jobs import MARKERS, Jobs, share
from clipscale.apps.data.likeness import first_of_each, joined, load_pictures, look_at
from clipscale.apps.data.reshard import Group, Piece, write_group
from clipscale.apps.data.shards import identity
from clipscale.apps.data.sheet import MOST_PAIRS, Pair, Place, write_sheet
from clipscale.apps.writing import whole, whole_text
from clipscale.config.data import Data
from clipscale.data.manifest import ShardFile
from clipscale.errors import ConfigError

MOST_DISTANCE = 16


class ClusterTask(NamedTuple):
    """The pictures of all shards, and the directory of what stays of each."""

    pictures: tuple[Path, ...]
    names: tuple[str, ...]
    kept: Path
    distance: int


def dedup(
    shards: str,
    output: Path,
    overrides: Sequence[str],
    *,
    against: str | None = None,
    distance: int = 4,
    jobs: int = 0,
    ray: bool = False,
) -> Account | None:
    """Write each shard again under its name without duplicates, and ``duplicates.csv``, ``duplicates.html``.

    With ``against``, write no shards, but a report on which of those evaluation images are in these shards. Memory:
    about 300 bytes per image for the comparison, in one process.
    """
    if not 0 <= distance <= MOST_DISTANCE:
        raise ConfigError(f"--distance {distance}: 0 to {MOST_DISTANCE} bits; from 8 on, most pairs are no duplicates")
    if against is not None:
        contamination(shards, output, overrides, against=against, distance=distance, jobs=jobs, ray=ray)
        return None
    files, config = open_shards(shards, output, overrides, "dedup")
    data = config.data
    options = {
        "shards": identity(files), "distance": distance, "image_keys": data.image_keys, "max_pixels": data.max_pixels,
        "caption_key": data.caption_key,
    }  # fmt: skip
    work = Jobs(output, "dedup", options, jobs, ray)
    pictures, account = look_at(work, "look", files, data)
    names = output_names(files)
    task = ClusterTask(pictures, tuple(file.name for file in files), output / MARKERS / "dedup" / "kept", distance)
    clusters = work.run("compare", cluster, {"all": task})["all"]
    account.dropped.update(clusters["dropped"])
    account.kept -= sum(clusters["dropped"].values())
    groups = {
        name: Group(output / name, (Piece(file, 0, count, task.kept / f"{i:06d}.npy"),) if count else ())
        for i, (name, file, count) in enumerate(zip(names, files, clusters["kept"], strict=True))
    }
    account.shards = {name: result["kept"] for name, result in work.run("write", write_group, groups).items()}
    if not share()[0]:
        _report(output, files, task, account, data)
    account.close(output, "dedup", train_command(output, {"train": names}, overrides))
    return account


def cluster(task: ClusterTask) -> dict[str, Any]:
    """Find all duplicates; write the places that stay of each shard, and the rows of ``duplicates.csv``."""
    exact, hashes, starts = joined(task.pictures)
    cells = np.concatenate([load_pictures(path).cells for path in task.pictures])
    first = first_of_each(exact, hashes, cells, task.distance)
    kept = first == np.arange(len(first))
    for i, path in enumerate(task.pictures):
        with whole(task.kept / f"{i:06d}.npy") as out:
            np.save(out, load_pictures(path).places[kept[starts[i] : starts[i + 1]]])
    others = np.flatnonzero(~kept)
    same = (exact[others] == exact[first[others]]).all(axis=1)
    apart = np.bitwise_count(hashes[others] ^ hashes[first[others]])
    with whole(task.kept / "pairs.npy") as out:
        np.save(out, np.stack([first[others], others, same, apart], axis=1).astype(np.int64))
    counts = {"exact_duplicate": int(same.sum()), "near_duplicate": int((~same).sum())}
    return {
        "dropped": {reason: count for reason, count in counts.items() if count},
        "kept": [int(kept[a:b].sum()) for a, b in pairwise(starts)],
    }


def _report(output: Path, files: Sequence[ShardFile], task: ClusterTask, account: Account, data: Data) -> None:
    """Write the list of all that was dropped, and a page with the least alike of the near duplicates."""
    keys: list[str] = []
    places: list[Place] = []
    for file, path in zip(files, task.pictures, strict=True):
        found = load_pictures(path)
        keys += [f"{file.name}/{key}" for key in found.keys]
        places += [Place(file, number) for number in found.places.tolist()]
    pairs = np.load(task.kept / "pairs.npy").tolist()

    def rows() -> Iterator[tuple[str, str, str, int]]:
        yield from ((keys[b], keys[a], "exact" if same else "near", apart) for a, b, same, apart in pairs)

    with whole_text(output / "duplicates.csv") as out:
        csv.writer(out, lineterminator="\n").writerows([("key", "kept", "kind", "distance"), *rows()])
    near = sorted((pair for pair in pairs if not pair[2]), key=lambda pair: -pair[3])[:MOST_PAIRS]
    told = f"{len(near):,} of {account.dropped['near_duplicate']:,} near duplicates, the least alike first"
    shown = [Pair(places[a], places[b], f"kept, dropped: {apart} bits apart") for a, b, _, apart in near]
    write_sheet(output / "duplicates.html", "Duplicates", told, shown, data)
    largest = Counter(pair[0] for pair in pairs).most_common(1)
    if largest:
        print(f"largest cluster: {largest[0][1] + 1:,} images like {keys[largest[0][0]]}")
    print(f"pairs: {output / 'duplicates.csv'}; to look at: {output / 'duplicates.html'}")
