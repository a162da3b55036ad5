"""What the tools share: which shards a command names, the samples in them, and writing one."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

from clipscale.apps.data.jobs import scratch_beside
from clipscale.config import Config, validate
from clipscale.config.compose import override
from clipscale.data.io import REMOTE, ShardStore
from clipscale.data.manifest import ShardFile, expand_shards
from clipscale.data.samples import Member
from clipscale.data.stream import read_samples
from clipscale.errors import DataError, masked

KEYS = ("data.", "storage.", "tokenizer.", "model.")


def named_shards(shards: str, overrides: Sequence[str], what: str = "SHARDS") -> tuple[list[ShardFile], Config]:
    """The shards that the argument ``what`` of a command names, and the configuration of its ``KEY=VALUE`` arguments.

    Raises ConfigError for a key that is none, DataError for shards that are not there.
    """
    config = override(Config(), overrides, KEYS)
    config.data.train.shards = shards
    validate(config)
    store = ShardStore(config.storage)
    files = expand_shards(shards, config.data.root, what, store, config.data.index)
    # A hint will do for training, which counts what it got wrong; a tool has to see every sample.
    return [replace(file, declared=None) if file.hinted else file for file in files], config


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
    return read_samples(file, 0, file.summary.samples)  # of hints there are none here: see named_shards


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
    scratch = scratch_beside(path)
    written = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(scratch, "w", format=tarfile.PAX_FORMAT) as archive:
            for key, members in samples:
                for suffix in sorted(members):
                    entry = tarfile.TarInfo(f"{key}.{suffix}")  # its time and its owner are 0
                    entry.size = len(members[suffix])
                    archive.addfile(entry, io.BytesIO(members[suffix]))
                written += 1
        scratch.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
    return written
