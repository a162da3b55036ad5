"""A canonical stream: raw samples in the order's sequence, from any position on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from clipscale.data.manifest import sample_key, shard_index
from clipscale.data.order import SampleOrder, Window
from clipscale.data.samples import Member
from clipscale.data.tar import TarError, members
from clipscale.errors import DataError

READ_AHEAD = 1 << 16  # bytes, per stream


def read_samples(path: Path, start: int, stop: int) -> Iterator[Member]:
    """Raw samples ``start <= index < stop`` of a shard, read from where the first one begins.

    Raises DataError when the shard holds other samples than its index says.
    """
    offsets = shard_index(path).offsets
    if stop >= len(offsets):
        raise DataError(f"{path} holds {len(offsets) - 1} samples, sample {stop - 1} was asked for: it changed")
    found = 0
    try:
        with path.open("rb", buffering=READ_AHEAD) as raw:
            for sample in _group(raw, int(offsets[start]), int(offsets[stop]), path.name):
                found += 1
                yield sample
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except TarError as error:
        raise DataError(f"{path} is not what its index says ({error}): it changed; start again") from None
    if found != stop - start:
        raise DataError(f"{path} gave {found} samples, its index says {stop - start}: it changed; start again")


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


def read_stream(order: SampleOrder, paths: Sequence[Path], stream: int, position: int) -> Iterator[tuple[int, Member]]:
    """``(position, raw sample)`` of a stream for ever, from ``position`` on.

    One window is held in memory; the next one is read a sample at a time while this one is handed out, so that
    reading never comes in bursts.
    """

    def read(window: Window) -> Iterator[Member]:
        for piece in window.pieces:
            yield from read_samples(paths[piece.shard], piece.start, piece.stop)

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
