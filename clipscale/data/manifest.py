"""Which shards there are, and how many samples each holds."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import braceexpand

from clipscale.data.index import INDEX, Declared, ShardIndex, declared_index, indexed_name, read_hint, read_index, walk
from clipscale.data.io import ELSEWHERE, PIPE, REMOTE, ShardStore, parent, resolve
from clipscale.data.table import CHUNK, is_table
from clipscale.errors import DataError

WALKED_AT_MOST = 1000  # shards without an index; more take too long to count before training


@dataclass(frozen=True)
class ShardFile:
    """A shard: what opens it, where it lies, and the source (entry of the list) it belongs to.

    ``declared`` is what an index file or a hint says of it; ``rows``, of a table, those that this part of it holds.
    """

    store: ShardStore
    location: str
    source: int = 0
    declared: Declared | None = None
    rows: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The last part of the location; the same wherever the data is moved."""
        return self.location.rpartition("/")[2]

    @property
    def hinted(self) -> bool:
        """Whether its number of samples is hearsay."""
        return self.declared is not None and self.declared.places is None

    @property
    def index(self) -> ShardIndex:
        """Where its samples begin. Raises DataError when it cannot be read, or is not the one that was indexed."""
        if self.declared is None or self.hinted:
            return walk(self.store, self.location)
        return _declared_index(self)

    @property
    def summary(self) -> Summary:
        """What is known of it before it is read, or found by walking it. Raises DataError."""
        if self.declared is not None:
            return Summary(self.declared.samples, self.declared.size, self.declared.damage)
        if self.rows is not None:
            return Summary(self.rows[1] - self.rows[0], None, "")
        index = self.index
        return Summary(index.samples, int(index.offsets[-1]), index.damage)


class Summary(NamedTuple):
    """Samples of a shard, its size in bytes where that is known, and what is wrong with it."""

    samples: int
    size: int | None
    damage: str


@lru_cache(maxsize=1024)
def _declared_index(file: ShardFile) -> ShardIndex:
    assert file.declared is not None
    return declared_index(file.store, file.location, file.declared)


def expand_shards(
    shards: str | Sequence[str], root: str | None, key: str, store: ShardStore, index: str | None = None
) -> list[ShardFile]:
    """Expand brace patterns and ``::`` into shards; each entry of a list is a source of its own.

    What is known of them comes from the index file ``index``, or from those beside the shards. Raises DataError, in
    one line naming ``key``, when the list is empty, a shard does not exist, or too many would have to be counted.
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
        rooted = key != shards  # else the key is the pattern itself, to which no root belongs
        hint = (
            ""
            if root or not rooted
            else " (data.root is not set; relative names are looked up in the current directory)"
        )
        hint += " (shards are named by brace patterns, {000..099}, not by *)" if "*" in missing[0] else ""
        raise DataError(
            f"{key}: {len(missing)} of {len(files)} shards do not exist, first {missing[0]}{hint}"
            + (f"; check data.root and {key}" if rooted else "")
        )
    if signed := next((one.location for one in files if one.location.startswith("http") and "?" in one.location), None):
        raise DataError(f"{key}: {signed}: an address with a query cannot be read in parts; use s3://, gs:// or az://")
    folder = resolve("", root).rstrip("/") if root else None
    return [part for file in _declare(files, key, index, folder) for part in _parts(file)]


def _declare(files: Sequence[ShardFile], key: str, index: str | None, folder: str | None) -> list[ShardFile]:
    """The shards with what is known of them."""
    if index is not None and not read_index(files[0].store, index):
        raise DataError(f"data.index={index} does not exist, or lists no shard; make it with clipscale data index")
    found = [_from_index(file, index, folder) for file in files]
    unknown = [file for file in found if file.declared is None and not file.location.startswith(PIPE)]
    if len(unknown) <= WALKED_AT_MOST:
        return found
    with ThreadPoolExecutor(16) as pool:
        hints = list(pool.map(lambda file: file.declared or read_hint(file.store, file.location), found))
    found = [replace(file, declared=hint) for file, hint in zip(found, hints, strict=True)]
    unknown = [file for file in found if file.declared is None and file.location.startswith(REMOTE)]
    if len(unknown) > WALKED_AT_MOST:
        raise DataError(
            f"{key}: {len(unknown):,} remote shards have no index, the first {unknown[0].location}; counting more than "
            f"{WALKED_AT_MOST:,} before every training takes too long: run clipscale data index once"
        )
    return found


def _from_index(file: ShardFile, index: str | None, folder: str | None) -> ShardFile:
    if file.location.startswith(PIPE) or is_table(file.location):
        return file
    if index is None:
        return replace(file, declared=read_index(file.store, f"{parent(file.location)}/{INDEX}").get(file.name))
    listed = read_index(file.store, index)
    return replace(file, declared=listed.get(indexed_name(file.location, folder)) or listed.get(file.location))


def _parts(file: ShardFile) -> list[ShardFile]:
    """A table as parts of few rows, which the order moves about like shards; any other shard as it is."""
    if not is_table(file.location):
        return [file]
    index = file.index
    if not index.samples:
        raise DataError(f"{file.location} {index.damage or 'holds no row'}")
    return [replace(file, rows=(start, min(start + CHUNK, index.samples))) for start in range(0, index.samples, CHUNK)]


def summarise(files: Sequence[ShardFile]) -> list[Summary]:
    """What is known of many shards; remote ones that must be walked are walked side by side."""
    if not any(file.declared is None and file.location.startswith(REMOTE) for file in files):
        return [file.summary for file in files]
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda file: file.summary, files))


def damages(files: Sequence[ShardFile], summaries: Sequence[Summary]) -> dict[str, str]:
    """What is wrong with the archives in which something is, by file name."""
    return {file.name: summary.damage for file, summary in zip(files, summaries, strict=True) if summary.damage}
