"""A canonical stream: raw samples in the order's sequence, from any position on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from webdataset.tariterators import tar_file_iterator

from clipscale.data.manifest import sample_key, shard_index
from clipscale.data.order import SampleOrder, Window
from clipscale.data.samples import Member
from clipscale.errors import DataError


def read_samples(path: Path, start: int, stop: int) -> Iterator[Member]:
    """Raw samples ``start <= index < stop`` of a shard, read from where the first one begins.

    Raises DataError when the shard holds other samples than its index says.
    """
    offsets = shard_index(path).offsets
    if stop >= len(offsets):
        raise DataError(f"{path} holds {len(offsets) - 1} samples, sample {stop - 1} was asked for: it changed")
    with path.open("rb") as raw:
        raw.seek(int(offsets[start]))
        found = 0
        for sample in _group(_Stretch(raw, int(offsets[stop] - offsets[start])), path.name):
            found += 1
            yield sample
    if found != stop - start:
        raise DataError(f"{path} gave {found} samples, its index says {stop - start}: it changed; start again")


class _Stretch:
    """The next ``length`` bytes of a file: the tar reader must not run on into what may be damaged."""

    def __init__(self, raw: BinaryIO, length: int) -> None:
        self._raw, self._left = raw, length

    def read(self, size: int) -> bytes:
        data = self._raw.read(min(size, self._left))
        self._left -= len(data)
        return data


def _group(raw: _Stretch, shard: str) -> Iterator[Member]:
    key: str | None = None
    members: dict[str, bytes] = {}
    problem = ""
    for item in tar_file_iterator(raw, skip_meta=None):
        item_key, suffix = sample_key(item["fname"])
        if item_key is None:
            continue
        if key is not None and item_key != key:
            yield Member(f"{shard}/{key}", members, problem)
            members, problem = {}, ""
        key = item_key
        if suffix in members:
            problem = "duplicate_member"
        members[suffix] = item["data"]
    if key is not None:
        yield Member(f"{shard}/{key}", members, problem)


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
