"""Where the samples of a shard begin: found by walking its headers, kept in a cache, or read from an index file.

An index file is ``shards.json`` beside the shards (``clipscale data index`` writes it), with the places of the samples
in ``shards.offsets``: per shard, as little-endian uint32 in blocks of 512 bytes, the first place and then the
distances, up to the end of the last sample.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import base_plus_ext

from clipscale.data.io import GZIP_ERRORS, REMOTE, ShardStore, Version, parent
from clipscale.data.table import is_table, scan_table
from clipscale.data.tar import BLOCK, TarError, members
from clipscale.errors import DataError, MissingError, RefusedError

INDEX, OFFSETS = "shards.json", "shards.offsets"
SIZES = "sizes.json"  # OpenCLIP's: samples by file name
FORMAT = 1  # of index files
_WALK = 2  # of the cache; higher when a walk finds other samples than before

# Members that are no part of a sample: a shard's metadata (WebDataset's rule), what systems leave in archives, and
# what people write about them.
_META = re.compile(r"__[^/]*__($|/)")
_LITTER = re.compile(
    r"(^|/)(\.|__MACOSX(/|$)|(thumbs\.db|desktop\.ini|(readme|licen[cs]e|notice)(\.\w+)?)$)", re.IGNORECASE
)


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


class Declared(NamedTuple):
    """What an index file says of a shard; of a mere hint, ``size`` is None and nothing but ``samples`` is known.

    ``size`` in bytes; ``tag`` changes with the version; ``places`` is the file that holds the offsets, and the range of
    its bytes.
    """

    samples: int
    size: int | None = None
    sha256: str = ""
    damage: str = ""
    tag: str = ""
    places: tuple[str, int, int] | None = None


def sample_key(member: str) -> tuple[str | None, str]:
    """``(sample key, suffix)`` of a tar member's name, as WebDataset splits it; key None is no part of a sample."""
    if _META.match(member) or _LITTER.search(member):
        return None, ""
    key, suffix = base_plus_ext(member)
    return key, (suffix or "").lower()


@lru_cache(maxsize=1024)
def walk(store: ShardStore, location: str) -> ShardIndex:
    """The index of a shard: read from the cache, or made by walking the tar's headers, bodies skipped.

    What is no tar at all has no samples, and says so in ``damage``. Raises DataError when it cannot be read.
    """
    version = store.version(location)
    if version.size is None:  # what a command prints may be something else the next time
        return _walk(store, location, version)
    place = location if location.startswith(REMOTE) else Path(location).resolve()
    identity = f"{_WALK}:{place}:{version.size}:{version.tag}"
    cached = cache_dir() / "index" / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.npz"
    try:
        with np.load(cached) as stored:
            return ShardIndex(stored["offsets"], str(stored["damage"]), version)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        pass
    index = _walk(store, location, version)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        scratch = cached.with_suffix(f".{os.getpid()}.tmp.npz")
        np.savez(scratch, offsets=index.offsets, damage=np.array(index.damage))
        scratch.replace(cached)
    except OSError:
        pass  # a cache that cannot be written costs time, nothing else
    return index


def _walk(store: ShardStore, location: str, version: Version) -> ShardIndex:
    try:
        with store.open(location, version) as raw:
            offsets, damage = (scan_table(raw, location), "") if is_table(location) else scan_shard(raw)
    except OSError as error:
        raise DataError(f"{location} cannot be read: {error}") from None
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


def pack_offsets(offsets: NDArray[np.int64]) -> bytes:
    """Offsets as an index file holds them."""
    return np.diff(offsets // BLOCK, prepend=0).astype("<u4").tobytes()


def unpack_offsets(packed: bytes) -> NDArray[np.int64]:
    """The inverse of :func:`pack_offsets`."""
    return np.cumsum(np.frombuffer(packed, dtype="<u4"), dtype=np.int64) * BLOCK


def indexed_name(location: str, folder: str | None) -> str:
    """What an index file calls a shard: its path below ``folder``, or its location where it does not lie there."""
    return location.removeprefix(f"{folder.rstrip('/')}/") if folder is not None else location


@lru_cache(maxsize=256)
def read_index(store: ShardStore, location: str) -> Mapping[str, Declared]:
    """What an index file says, by :func:`indexed_name`; empty where there is none. Raises DataError if damaged."""
    document = _read_json(store, location)
    if document is None:
        return {}
    try:
        if document["format"] != FORMAT:
            raise DataError(f"{location} is an index of format {document['format']}, not {FORMAT}: make it anew with "
                            "clipscale data index")  # fmt: skip
        places = f"{parent(location)}/{OFFSETS}"
        return {
            name: Declared(s["samples"], s["bytes"], s["sha256"], s["damage"], s["tag"], (places, *s["offsets"]))
            for name, s in document["shards"].items()
        }
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{location} is no index of shards; make it anew with clipscale data index") from None


def read_hint(store: ShardStore, location: str) -> Declared | None:
    """How many samples OpenCLIP's ``sizes.json`` or img2dataset's ``NNNNN_stats.json`` say that a shard holds."""
    sizes = _read_json(store, f"{parent(location)}/{SIZES}")
    count = sizes.get(location.rpartition("/")[2]) if isinstance(sizes, dict) else None
    if count is None:
        stats = _read_json(store, location.removesuffix(".gz").removesuffix(".tar") + "_stats.json")
        count = stats.get("successes") if isinstance(stats, dict) else None
    return Declared(count) if isinstance(count, int) and count >= 0 else None


@lru_cache(maxsize=256)
def _read_json(store: ShardStore, location: str) -> Any:
    """A JSON file beside the shards; None when it is not there (S3 refuses to say so of what may not be listed)."""
    try:
        with store.open(location) as raw:
            data = raw.read()
    except (MissingError, RefusedError):
        return None
    try:
        return json.loads(data)
    except ValueError:
        raise DataError(f"{location} is not JSON; make it anew with clipscale data index, or remove it") from None


def declared_index(store: ShardStore, location: str, declared: Declared) -> ShardIndex:
    """The index of a shard from its index file. Raises DataError when the shard is not the one that was indexed.

    One of the same size but another version was copied, or changed: it is walked, and must be the same.
    """
    assert declared.places is not None
    version = store.version(location)
    if version.size != declared.size:
        raise DataError(
            f"{location} holds {version.size:,} bytes, its index says {declared.size:,}: it was cut short or changed; "
            "restore it, or index it anew with clipscale data index"
        )
    where, start, stop = declared.places
    with store.open(where) as raw:
        raw.seek(start)
        offsets = unpack_offsets(raw.read(stop - start))
    if len(offsets) != declared.samples + 1:
        raise DataError(f"{where} does not belong to its {INDEX}; make both anew with clipscale data index")
    if version.tag != declared.tag and not np.array_equal(walk(store, location).offsets, offsets):
        raise DataError(
            f"{location} is not the shard that was indexed, though as large; index it anew with clipscale data index"
        )
    return ShardIndex(offsets, declared.damage, version)


def cache_dir() -> Path:
    """Where indexes and built-in data are kept: ``$XDG_CACHE_HOME/clipscale`` or ``~/.cache/clipscale``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipscale"
