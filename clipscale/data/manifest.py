"""Which shards there are, and how many samples each holds and where they begin."""

from __future__ import annotations

import hashlib
import io
import os
import re
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import braceexpand
import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import base_plus_ext

from clipscale.data.io import ELSEWHERE, GZIP_ERRORS, PIPE, REMOTE, ShardStore, Version, resolve
from clipscale.data.tar import TarError, members
from clipscale.errors import DataError

# Members whose first path component looks like this carry a shard's metadata, not samples (WebDataset's rule).
META = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class ShardFile:
    """A shard: what opens it, where it lies, and the source (entry of the list) it belongs to."""

    store: ShardStore
    location: str
    source: int = 0

    @property
    def name(self) -> str:
        """The last part of the location; the same wherever the data is moved."""
        return self.location.rpartition("/")[2]

    @property
    def index(self) -> ShardIndex:
        """Where its samples begin, from the cache or by walking it. Raises DataError when it cannot be read."""
        return shard_index(self)


class ShardIndex(NamedTuple):
    """Where the samples of a shard begin: ``offsets`` int64 [samples + 1] in bytes, the last one being the end.

    ``damage`` says what is wrong with the archive, if anything is; ``version`` is the one that this is the index of.
    """

    offsets: NDArray[np.int64]
    damage: str
    version: Version

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.offsets) - 1


def sample_key(member: str) -> tuple[str | None, str]:
    """``(sample key, suffix)`` of a tar member's name, as WebDataset splits it; key None is no part of a sample."""
    if META.match(member):
        return None, ""
    key, suffix = base_plus_ext(member)
    return key, (suffix or "").lower()


def expand_shards(shards: str | Sequence[str], root: str | None, key: str, store: ShardStore) -> list[ShardFile]:
    """Expand brace patterns and ``::`` into shards; each entry of a list is a source of its own.

    Raises DataError, in one line naming ``key``, when the list is empty or a shard does not exist.
    """
    sources = [shards] if isinstance(shards, str) else list(shards)
    files: list[ShardFile] = []
    for number, source in enumerate(sources):
        for pattern in [source] if source.startswith(PIPE) else source.split("::"):
            try:
                names = list(braceexpand.braceexpand(pattern))
            except ValueError:
                raise DataError(f"{key}: unbalanced braces in {pattern!r}") from None
            files += [ShardFile(store, resolve(name, root), number) for name in names if name]
    if not files:
        raise DataError(f"{key}={shards!r} names no shard")
    local = [file.location for file in files if not file.location.startswith(ELSEWHERE)]
    missing = [location for location in local if not Path(location).is_file()]
    if missing:
        hint = "" if root else " (data.root is not set; relative names are looked up in the current directory)"
        raise DataError(
            f"{key}: {len(missing)} of {len(files)} shards do not exist, first {missing[0]}{hint}; "
            f"set data.root or {key}"
        )
    return files


def index_all(files: Sequence[ShardFile]) -> list[ShardIndex]:
    """The indexes of many shards; remote ones are read side by side."""
    if not any(file.location.startswith(REMOTE) for file in files):
        return [file.index for file in files]
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(shard_index, files))


def damages(files: Sequence[ShardFile], indexes: Sequence[ShardIndex]) -> dict[str, str]:
    """What is wrong with the archives in which something is, by file name."""
    return {file.name: index.damage for file, index in zip(files, indexes, strict=True) if index.damage}


@lru_cache(maxsize=4096)
def shard_index(file: ShardFile) -> ShardIndex:
    """The index of a shard: read from the cache, or made by walking the tar's headers, bodies skipped.

    What is no tar at all has no samples, and says so in ``damage``. Raises DataError when it cannot be read.
    """
    version = file.store.version(file.location)
    if version.size is None:  # what a command prints may be something else the next time
        return _walk(file, version)
    place = file.location if file.location.startswith(REMOTE) else Path(file.location).resolve()
    identity = f"{place}:{version.size}:{version.tag}"
    cached = cache_dir() / "index" / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.npz"
    try:
        with np.load(cached) as stored:
            return ShardIndex(stored["offsets"], str(stored["damage"]), version)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        pass
    index = _walk(file, version)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        scratch = cached.with_suffix(f".{os.getpid()}.tmp.npz")
        np.savez(scratch, offsets=index.offsets, damage=np.array(index.damage))
        scratch.replace(cached)
    except OSError:
        pass  # a cache that cannot be written costs time, nothing else
    return index


def _walk(file: ShardFile, version: Version) -> ShardIndex:
    try:
        with file.store.open(file.location, version) as raw:
            offsets, damage = scan_shard(raw)
    except OSError as error:
        raise DataError(f"{file.location} cannot be read: {error}") from None
    return ShardIndex(offsets, damage, version)


def scan_shard(raw: BinaryIO) -> tuple[NDArray[np.int64], str]:
    """Walk a tar's headers: ``(offsets, damage)`` as in ShardIndex.

    Samples are runs of files with one key; a file cut short by the end is left out.
    """
    offsets: list[int] = []
    damage, last_key, end, last = "", None, 0, 0
    try:
        size = _size(raw)
        for member in members(raw):
            if size is not None and member.data + member.size > size:
                damage = "cut short in the middle of a file"
                break
            last = member.start
            key, _ = sample_key(member.name) if member.is_file else (None, "")
            if key is not None and key != last_key:
                offsets.append(member.start)
                last_key = key
            end = member.end
        if not damage:
            damage = _after(raw, end)
    except TarError as error:
        damage = f"unreadable after {len(offsets)} samples: {error}"
    except GZIP_ERRORS as error:
        end = last  # the error may lie in this file's bytes
        offsets = [offset for offset in offsets if offset < end]
        damage = f"unreadable after {len(offsets)} samples: {error}"
    return np.array([*offsets, end], dtype=np.int64), damage


def _size(raw: BinaryIO) -> int | None:
    """Bytes of a file; None of a damaged gzip, whose end cannot be reached."""
    try:
        return raw.seek(0, io.SEEK_END)
    except GZIP_ERRORS:
        return None


def _after(raw: BinaryIO, end: int) -> str:
    """What is wrong with what follows the last member."""
    raw.seek(end)
    rest = iter(lambda: raw.read(1 << 20), b"")
    if (mark := next(rest, b"")) == b"":
        return "has no end-of-archive mark"
    if any(block.strip(b"\0") for block in (mark, *rest)):
        return "holds more after its end-of-archive mark, which is not read"
    return ""


def cache_dir() -> Path:
    """Where indexes and built-in data are kept: ``$XDG_CACHE_HOME/clipscale`` or ``~/.cache/clipscale``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipscale"
