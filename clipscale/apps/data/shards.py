"""What the tools share: which shards a command names, the samples in them, and writing one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import webdataset as wds

from clipscale.apps.data.jobs import scratch_beside
from clipscale.config import Config
from clipscale.config.compose import override
from clipscale.data.io import ShardStore
from clipscale.data.manifest import ShardFile, expand_shards
from clipscale.data.samples import Member
from clipscale.data.stream import read_samples
from clipscale.errors import DataError

KEYS = ("data.", "storage.", "tokenizer.", "model.")


def named_shards(shards: str, overrides: Sequence[str]) -> tuple[list[ShardFile], Config]:
    """The shards that a command names, and the configuration that its ``KEY=VALUE`` arguments make.

    Raises ConfigError for a key that is none, DataError for shards that are not there.
    """
    config = override(Config(), overrides, KEYS)
    store = ShardStore(config.storage)
    return expand_shards(shards, config.data.root, "SHARDS", store), config


def identity(files: Sequence[ShardFile]) -> list[list[object]]:
    """What tells these shards from others, for a tool's options: location, size and version of each."""
    return [[file.location, *file.store.version(file.location)] for file in files]


def all_samples(file: ShardFile) -> Iterator[Member]:
    """Every raw sample of a shard, up to where it is damaged."""
    return read_samples(file, 0, file.index.samples)


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    """Write ``(key, members by suffix)`` as a tar, whole or not at all, the same bytes each time; returns the count.

    Raises DataError when it cannot be written.
    """
    scratch = scratch_beside(path)
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as raw, wds.TarWriter(raw, encoder=False, mtime=0.0) as writer:
            for key, members in samples:
                writer.write({"__key__": key, **members})
                count += 1
        scratch.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        scratch.unlink(missing_ok=True)
    return count
