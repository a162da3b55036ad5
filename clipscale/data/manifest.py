"""Which shards there are, and how many samples each holds and where they begin."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import braceexpand
import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import base_plus_ext

from clipscale.data.tar import TarError, members
from clipscale.errors import DataError

# Members whose first path component looks like this carry a shard's metadata, not samples (WebDataset's rule).
META = re.compile(r"__[^/]*__($|/)")


class ShardFile(NamedTuple):
    """A shard on disk: its path, and the source (entry of the list) it belongs to."""

    path: Path
    source: int


class ShardIndex(NamedTuple):
    """Where the samples of a shard begin: ``offsets`` int64 [samples + 1] in bytes, the last one being the end."""

    offsets: NDArray[np.int64]
    damage: str

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


def expand_shards(shards: str | Sequence[str], root: str | None, key: str) -> list[ShardFile]:
    """Expand brace patterns and ``::`` into files; each entry of a list is a source of its own.

    Raises DataError, in one line naming ``key``, when the list is empty or a file does not exist.
    """
    sources = [shards] if isinstance(shards, str) else list(shards)
    files: list[ShardFile] = []
    for number, source in enumerate(sources):
        for pattern in source.split("::"):
            try:
                names = list(braceexpand.braceexpand(pattern))
            except ValueError:
                raise DataError(f"{key}: unbalanced braces in {pattern!r}") from None
            files += [ShardFile(Path(root or ".", name).expanduser(), number) for name in names if name]
    if not files:
        raise DataError(f"{key}={shards!r} names no shard")
    missing = [file.path for file in files if not file.path.is_file()]
    if missing:
        hint = "" if root else " (data.root is not set; relative names are looked up in the current directory)"
        raise DataError(
            f"{key}: {len(missing)} of {len(files)} shards do not exist, first {missing[0]}{hint}; "
            f"set data.root or {key}"
        )
    return files


@lru_cache(maxsize=4096)
def shard_index(path: Path) -> ShardIndex:
    """The index of a local shard: read from the cache, or made by walking the tar's headers, bodies skipped.

    What is no tar at all has no samples, and says so in ``damage``. Raises DataError when it cannot be read.
    """
    try:
        return _cached_index(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def damages(files: Sequence[ShardFile]) -> dict[str, str]:
    """What is wrong with the archives in which something is, by file name."""
    found = {file.path.name: shard_index(file.path).damage for file in files}
    return {name: damage for name, damage in found.items() if damage}


def _cached_index(path: Path) -> ShardIndex:
    stat = path.stat()
    identity = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    cached = cache_dir() / "index" / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.npz"
    try:
        with np.load(cached) as stored:
            return ShardIndex(stored["offsets"], str(stored["damage"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        pass
    index = scan_shard(path)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        scratch = cached.with_suffix(f".{os.getpid()}.tmp.npz")
        np.savez(scratch, offsets=index.offsets, damage=np.array(index.damage))
        scratch.replace(cached)
    except OSError:
        pass  # a cache that cannot be written costs time, nothing else
    return index


def scan_shard(path: Path) -> ShardIndex:
    """Walk a tar's headers. Samples are runs of files with one key; a file cut short by the end is left out."""
    size = path.stat().st_size
    offsets: list[int] = []
    damage, last_key, end = "", None, 0
    with path.open("rb") as raw:
        try:
            for member in members(raw):
                if member.data + member.size > size:
                    damage = "cut short in the middle of a file"
                    break
                key, _ = sample_key(member.name) if member.is_file else (None, "")
                if key is not None and key != last_key:
                    offsets.append(member.start)
                    last_key = key
                end = member.end
        except TarError as error:
            damage = f"unreadable after {len(offsets)} samples: {error}"
        if not damage:
            raw.seek(end)
            rest = iter(lambda: raw.read(1 << 20), b"")
            if (mark := next(rest, b"")) == b"":
                damage = "has no end-of-archive mark"
            elif any(block.strip(b"\0") for block in (mark, *rest)):
                damage = "holds more after its end-of-archive mark, which is not read"
    return ShardIndex(np.array([*offsets, end], dtype=np.int64), damage)


def cache_dir() -> Path:
    """Where indexes and built-in data are kept: ``$XDG_CACHE_HOME/clipscale`` or ``~/.cache/clipscale``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipscale"
