"""What the tools share: which shards a command names, the samples in them, and writing one."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path

from clipscale.apps.writing import whole
from clipscale.config import Config, validate
from clipscale.config.compose import override
from clipscale.data.io import REMOTE, ShardStore
from clipscale.data.manifest import ShardFile, expand_shards
from clipscale.data.samples import Member
from clipscale.data.stream import read_samples
from clipscale.errors import masked

KEYS = ("data.", "storage.", "tokenizer.", "model.")


def named_shards(shards: str, overrides: Sequence[str], what: str = "SHARDS") -> tuple[list[ShardFile], Config]:
    """The shards that the argument ``what`` of a command names, and the configuration of its ``KEY=VALUE`` arguments.

    Nothing is taken on hearsay: a hint will do for training, which counts what it got wrong, but a tool has to see
    every sample. Raises ConfigError for a key that is none, DataError for shards that are not there.
    """
    files, config = declared_shards(shards, overrides, what)
    return [replace(file, declared=None) if file.hinted else file for file in files], config


def declared_shards(shards: str, overrides: Sequence[str], what: str = "SHARDS") -> tuple[list[ShardFile], Config]:
    """As :func:`named_shards`, with what hints say of them."""
    config = override(Config(), overrides, KEYS)
    config.data.train.shards = shards
    validate(config)
    store = ShardStore(config.storage)
    return expand_shards(shards, config.data.root, what, store, config.data.index), config


def identity(files: Sequence[ShardFile]) -> list[list[object]]:
    """What tells these shards from others, for a tool's options: location, size and version of each."""

    def one(file: ShardFile) -> list[object]:
        return [masked(file.location), *file.store.version(file.location)]

    if not any(file.location.startswith(REMOTE) for file in files):
        return [one(file) for file in files]
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(one, files))


def digest(file: ShardFile) -> tuple[int, str]:
    """Bytes of a shard as it is stored, zipped if it is, and their SHA-256."""
    found, size = hashlib.sha256(), 0
    with file.store.open_stored(file.location) as raw:
        while part := raw.read(file.store.burst):
            found.update(part)
            size += len(part)
    return size, found.hexdigest()


def all_samples(file: ShardFile) -> Iterator[Member]:
    """Every raw sample of a shard, up to where it is damaged."""
    return read_samples(file, 0, file.summary.samples)


def distinct(samples: Iterable[Member]) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    """``(key, members)`` for one shard: a key that is taken gets its source shard's name before it, ``SHARD-KEY``.

    Where that is taken too, ``-2``, ``-3``, … stands behind it.
    """
    taken: set[str] = set()
    for sample in samples:
        shard, _, key = sample.key.partition("/")
        name = key
        if key in taken:  # no dot in the shard's name: a key ends at the first one
            stem = re.sub(r"[^\w-]", "_", shard.removesuffix(".tar"))
            prefixed = f"{stem}-{key}"
            again = (f"{prefixed}-{number}" for number in count(2))
            name = prefixed if prefixed not in taken else next(name for name in again if name not in taken)
        taken.add(name)
        yield name, sample.members


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    """Write ``(key, members by suffix)`` as a tar, whole or not at all, the same bytes each time; returns the count.

    Not by WebDataset's writer: it leaves out members whose names begin with ``_``, and spends a kilobyte of each
    member on its time. Raises DataError when the disk is full or the directory cannot be written.
    """
    written = 0
    with whole(path) as out, tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for key, members in samples:
            for suffix in sorted(members):
                entry = tarfile.TarInfo(f"{key}.{suffix}")  # its time and its owner are 0
                entry.size = len(members[suffix])
                archive.addfile(entry, io.BytesIO(members[suffix]))
            written += 1
    return written
