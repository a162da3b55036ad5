"""A canonical stream: raw samples in the order's sequence, from any position on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import BinaryIO

from clipscale.data.index import sample_key
from clipscale.data.io import GZIP_ERRORS, PIPE, REMOTE, ShardStore, parent, resolve
from clipscale.data.manifest import ShardFile
from clipscale.data.order import SampleOrder, Window, stretches
from clipscale.data.samples import Member
from clipscale.data.table import read_rows
from clipscale.data.tar import TarError, members
from clipscale.errors import DataError, MissingError


def read_samples(file: ShardFile, start: int, stop: int) -> Iterator[Member]:
    """Raw samples ``start <= index < stop`` of a shard, read from where the first one begins.

    Where a hint said that there are more than there are, the missing ones come as samples with that problem; those of
    which it did not know are named by the last one that it did. Raises DataError when the shard is not what its index
    says.
    """
    if file.rows is not None:
        yield from _rows(file, file.rows[0] + start, file.rows[0] + stop)
        return
    there, said = file.index.samples, file.summary.samples
    if stop > said:
        raise DataError(f"{file.location} holds {said} samples, sample {stop - 1} was asked for: it changed")
    beyond = stop == said < there
    for number, sample in enumerate(_read(file, min(start, there), min(stop, there)), start):
        if beyond and number == stop - 1:
            sample = replace(sample, beyond=tuple(one.key for one in _read(file, stop, there)))
        yield sample
    for number in range(max(start, there), stop):
        yield Member(f"{file.name}/#{number}", {}, "missing")


def _read(file: ShardFile, start: int, stop: int) -> Iterator[Member]:
    index, where, found = file.index, file.location, 0
    begin, end = int(index.offsets[start]), int(index.offsets[stop])
    try:
        with file.store.open(where, index.version, end, keep=True) as raw:
            for sample in _group(raw, begin, end, file.name):
                found += 1
                yield sample
    except (TarError, *GZIP_ERRORS) as error:
        raise DataError(f"{where} is not what its index says ({error}): it changed; start again") from None
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error}") from None
    if found != stop - start:
        raise DataError(f"{where} gave {found} samples, its index says {stop - start}: it changed; start again")


def fetch_image(store: ShardStore, path: str, folder: str) -> bytes | None:
    """The bytes at an image's path in a table that lies in ``folder``; None where there is nothing."""
    place = resolve(path, folder)
    if place.startswith(PIPE):  # a table must not run commands
        return None
    try:
        with store.open(place) as raw:
            return raw.read()
    except MissingError:
        return None
    except (DataError, OSError, ValueError):
        if place.startswith(REMOTE):  # it may be there the next time
            raise
        return None  # a directory, a name too long, not ours to read


def _rows(file: ShardFile, start: int, stop: int) -> Iterator[Member]:
    index, folder = file.index, parent(file.location)

    with file.store.open(file.location, index.version) as raw:
        header, begin, end = (int(index.offsets[i]) for i in (0, start, stop))
        rows = read_rows(raw, header, begin, end, partial(fetch_image, file.store, folder=folder))
        for number, row in zip(range(start, stop), rows, strict=True):
            yield replace(row, key=f"{file.name}/{number}")


def _group(raw: BinaryIO, start: int, stop: int, shard: str) -> Iterator[Member]:
    """The samples between two places: runs of files with one key."""
    current: str | None = None
    parts: dict[str, bytes] = {}
    problem = ""
    for member in members(raw, start, stop):
        key, suffix = sample_key(member.name) if member.is_file else (None, "")
        if key is None:
            continue
        if current is not None and key != current:
            yield Member(f"{shard}/{current}", parts, problem)
            parts, problem = {}, ""
        current = key
        if suffix in parts:
            problem = "duplicate_member"
        raw.seek(member.data)
        parts[suffix] = raw.read(member.size)
        if len(parts[suffix]) < member.size:
            raise TarError(f"byte {member.data}: a file cut short")
    if current is not None:
        yield Member(f"{shard}/{current}", parts, problem)


def read_stream(
    order: SampleOrder,
    files: Sequence[ShardFile],
    stream: int,
    position: int,
    skipped: Sequence[tuple[int, int]] = (),
) -> Iterator[tuple[int, Member]]:
    """``(position, raw sample)`` of a stream for ever, from ``position`` on, but for the ``skipped`` ranges."""
    for start, stop in stretches(position, skipped):
        stretch = _read_on(order, files, stream, start)
        yield from stretch if stop is None else islice(stretch, stop - start)


def _read_on(
    order: SampleOrder, files: Sequence[ShardFile], stream: int, position: int
) -> Iterator[tuple[int, Member]]:
    """A stream for ever.

    One window is held in memory; the next one is read a sample at a time while this one is handed out, so that
    reading never comes in bursts.
    """

    def read(window: Window) -> Iterator[Member]:
        for piece in window.pieces:
            yield from read_samples(files[piece.shard], piece.start, piece.stop)

    window = order.window(stream, position)
    held: list[Member | None] = list(read(window))
    while True:
        following = order.window(stream, window.stop)
        incoming = read(following)
        upcoming: list[Member | None] = []
        for offset in range(position - window.start, window.stop - window.start):
            upcoming.extend(islice(incoming, 1))
            place = int(window.permutation[offset])
            sample, held[place] = held[place], None
            assert sample is not None
            yield window.start + offset, sample
        upcoming.extend(incoming)
        window, held, position = following, upcoming, following.start
