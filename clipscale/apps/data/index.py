"""``clipscale data index``: count samples and keep where they begin, so that training starts at once."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipscale.apps.data.jobs import Jobs, share
from clipscale.apps.data.shards import digest, identity, named_shards
from clipscale.data.index import FORMAT, INDEX, OFFSETS, SIZES, cache_dir, pack_offsets, sample_key, walk
from clipscale.data.io import PIPE, ShardStore, parent, resolve
from clipscale.data.manifest import ShardFile
from clipscale.data.table import is_table
from clipscale.data.tar import TarError, members
from clipscale.errors import ConfigError, MissingError


@dataclass(frozen=True)
class _Task:
    file: ShardFile
    image_keys: tuple[str, ...]


def index(shards: str, overrides: Sequence[str], *, output: Path | None = None, jobs: int = 0) -> None:
    """Write ``shards.json``, ``shards.offsets`` and OpenCLIP's ``sizes.json`` beside the shards, or into ``output``.

    Shards that were indexed there before stay listed. Raises ConfigError or DataError.
    """
    files, config = named_shards(shards, overrides)
    files = list({file.location: file for file in files}.values())
    _refuse(files, output)
    image_keys = tuple(config.data.image_keys)
    versions = identity(files)
    place = hashlib.sha256(json.dumps([versions, image_keys]).encode()).hexdigest()[:16]
    work = Jobs((output or cache_dir()) / "indexing" / place, "index", {"shards": versions}, jobs)
    tasks = {file.location: _Task(file, image_keys) for file in files}
    found = work.run("index", _index, tasks)
    if share()[0] == 0:
        for folder, entries in _by_folder(files, found, output).items():
            _write_index(files[0].store, folder, entries)


def _refuse(files: Sequence[ShardFile], output: Path | None) -> None:
    for file in files:
        if file.location.startswith(PIPE) or is_table(file.location):
            raise ConfigError(f"{file.location}: pipe: shards and tables cannot be indexed, and need no index")
    if output is not None:
        seen: set[str] = set()
        for file in files:
            if file.name in seen:
                raise ConfigError(
                    f"two shards are called {file.name}; index each directory by itself, or without --output"
                )
            seen.add(file.name)


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
    return {
        "samples": found.samples, "bytes": size, "sha256": sha256, "damage": found.damage, "bad": bad,
        "offsets": base64.b64encode(pack_offsets(found.offsets)).decode(),
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


def _by_folder(
    files: Sequence[ShardFile], found: Mapping[str, Any], output: Path | None
) -> dict[str, dict[str, dict[str, Any]]]:
    folders: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for file in files:
        folders[str(output) if output else parent(file.location)][file.name] = found[file.location]
    return folders


def _write_index(store: ShardStore, folder: str, entries: Mapping[str, dict[str, Any]]) -> None:
    packed: dict[str, bytes] = {}
    listed = _listed(store, folder, packed)
    for name, entry in entries.items():
        packed[name] = base64.b64decode(entry["offsets"])
        listed[name] = {key: value for key, value in entry.items() if key != "offsets"}
    place = 0
    for name in sorted(listed):
        listed[name]["offsets"] = [place, place + len(packed[name])]
        place += len(packed[name])
    document = {"format": FORMAT, "shards": {name: listed[name] for name in sorted(listed)}}
    sizes = {name: listed[name]["samples"] for name in sorted(listed)}
    # The offsets first: an index that is there is whole.
    store.write(resolve(OFFSETS, folder), b"".join(packed[name] for name in sorted(packed)))
    store.write(resolve(SIZES, folder), json.dumps(sizes, indent=1).encode())
    store.write(resolve(INDEX, folder), json.dumps(document, indent=1).encode())
    damaged = {name: entry["damage"] for name, entry in entries.items() if entry["damage"]}
    for name, damage in damaged.items():
        print(f"warning: {name} {damage}")
    for name, entry in entries.items():
        for reason, keys in entry["bad"].items():
            print(f"warning: {name}: {len(keys)} x {reason}, first {keys[0]}")
    total = sum(entry["samples"] for entry in entries.values())
    print(f"{resolve(INDEX, folder)}: {total:,} samples in {len(entries):,} shards ({len(damaged)} damaged)")


def _listed(store: ShardStore, folder: str, packed: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    """What an index that is there lists; its offsets go to ``packed``."""
    try:
        with store.open(resolve(INDEX, folder)) as raw:
            document = json.loads(raw.read())
        with store.open(resolve(OFFSETS, folder)) as raw:
            stored = raw.read()
    except (MissingError, ValueError):
        return {}
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        return {}
    for name, entry in document["shards"].items():
        start, stop = entry["offsets"]
        packed[name] = stored[start:stop]
    return dict(document["shards"])
