"""``clipscale data index``: count samples and keep where they begin, so that training starts at once."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipscale.apps.data.jobs import Jobs, share
from clipscale.apps.data.shards import digest, identity, named_shards
from clipscale.apps.writing import whole
from clipscale.data.index import FORMAT, INDEX, OFFSETS, SIZES, cache_dir, indexed_name, pack_offsets, sample_key, walk
from clipscale.data.io import PIPE, ShardStore, parent, resolve
from clipscale.data.manifest import ShardFile
from clipscale.data.table import is_table
from clipscale.data.tar import TarError, members
from clipscale.errors import ConfigError, MissingError


@dataclass(frozen=True)
class _Task:
    file: ShardFile
    image_keys: tuple[str, ...]
    offsets: Path  # a file of the shard's, until they are put together


def index(
    shards: str, overrides: Sequence[str], *, output: Path | None = None, jobs: int = 0, ray: bool = False
) -> None:
    """Write ``shards.json``, ``shards.offsets`` and OpenCLIP's ``sizes.json`` beside the shards.

    With ``output`` the first two are written there, for all directories of shards together. Shards that were indexed
    there before stay listed. Raises ConfigError or DataError.
    """
    files, config = named_shards(shards, overrides)
    files = list({file.location: file for file in files}.values())
    for file in files:
        if file.location.startswith(PIPE) or is_table(file.location):
            raise ConfigError(f"{file.location}: pipe: shards and tables cannot be indexed, and need no index")
    image_keys = tuple(config.data.image_keys)
    versions = identity(files)
    state = hashlib.sha256(json.dumps([versions, image_keys]).encode()).hexdigest()[:16]
    place = (output or cache_dir()) / "indexing" / state
    tasks = {file.location: _Task(file, image_keys, place / "offsets" / _hashed(file.location)) for file in files}
    found = Jobs(place, "index", {"shards": versions}, jobs, ray).run("index", _index, tasks)
    if share()[0] == 0:
        folders: dict[str, dict[str, _Task]] = defaultdict(dict)
        for location, task in tasks.items():
            folder = parent(location) if output is None else config.data.root and resolve("", config.data.root)
            folders[str(output or folder)][indexed_name(location, folder or None)] = task
        for folder, named in folders.items():
            _write_index(files[0].store, folder, named, found, place, with_sizes=output is None)
        shutil.rmtree(place, ignore_errors=True)


def _hashed(location: str) -> str:
    return hashlib.sha256(location.encode()).hexdigest()[:24]


def _index(task: _Task) -> dict[str, Any]:
    file = task.file
    found = walk(file.store, file.location)
    bad = defaultdict(list)
    for key, suffixes in _suffixes(file, int(found.offsets[-1])):
        if len(set(suffixes)) < len(suffixes):
            bad["duplicate_member"].append(key)
        elif not set(suffixes) & set(task.image_keys):
            bad["no_image"].append(key)
    size, sha256 = digest(file)
    with whole(task.offsets) as out:
        out.write(pack_offsets(found.offsets))
    return {
        "samples": found.samples, "bytes": size, "tag": found.version.tag, "sha256": sha256, "damage": found.damage,
        "bad": bad,
    }  # fmt: skip


def _suffixes(file: ShardFile, end: int) -> list[tuple[str, list[str]]]:
    """The keys of a shard and their members' suffixes."""
    found: list[tuple[str, list[str]]] = []
    try:
        with file.store.open(file.location) as raw:
            for member in members(raw, 0, end):
                key, suffix = sample_key(member.name) if member.is_file else (None, "")
                if key is not None and (not found or found[-1][0] != key):
                    found.append((key, []))
                if key is not None:
                    found[-1][1].append(suffix)
    except TarError:
        pass  # the walk has told of it
    return found


def _write_index(
    store: ShardStore, folder: str, tasks: Mapping[str, _Task], found: Mapping[str, Any], place: Path, with_sizes: bool
) -> None:
    entries = {name: dict(found[task.file.location]) for name, task in tasks.items()}
    listed = _listed(store, folder)
    joined = place / OFFSETS
    with joined.open("wb") as out:
        if listed:
            with store.open(resolve(OFFSETS, folder)) as raw:
                shutil.copyfileobj(raw, out)
        # What is there stays where it is: a training that goes on has read the older index.
        for name, task in tasks.items():
            start = out.tell()
            out.write(task.offsets.read_bytes())
            entries[name]["offsets"] = [start, out.tell()]
    document = {"format": FORMAT, "shards": dict(sorted((listed | entries).items()))}
    store.write(resolve(OFFSETS, folder), joined)  # first: what an index names is there
    store.write(resolve(INDEX, folder), json.dumps(document, indent=1).encode())
    if with_sizes:
        sizes = _read(store, resolve(SIZES, folder)) | {name: entry["samples"] for name, entry in entries.items()}
        store.write(resolve(SIZES, folder), json.dumps(dict(sorted(sizes.items())), indent=1).encode())
    _tell(resolve(INDEX, folder), entries)


def _tell(where: str, entries: Mapping[str, dict[str, Any]]) -> None:
    damaged = {name: entry["damage"] for name, entry in entries.items() if entry["damage"]}
    for name, damage in damaged.items():
        print(f"warning: {name} {damage}")
    for name, entry in entries.items():
        for reason, keys in entry["bad"].items():
            print(f"warning: {name}: {len(keys)} x {reason}, first {keys[0]}")
    total = sum(entry["samples"] for entry in entries.values())
    print(f"{where}: {total:,} samples in {len(entries):,} shards ({len(damaged)} damaged)")


def _listed(store: ShardStore, folder: str) -> dict[str, Any]:
    """What an index that is there lists."""
    document = _read(store, resolve(INDEX, folder))
    return dict(document["shards"]) if document.get("format") == FORMAT else {}


def _read(store: ShardStore, location: str) -> dict[str, Any]:
    try:
        with store.open(location) as raw:
            document = json.loads(raw.read())
    except (MissingError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
