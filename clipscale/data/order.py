"""The global sample order, as a pure function.

``V`` canonical streams share the samples. Epoch ``e`` permutes the shards by a hash of ``(seed, e)`` and lays them end
to end; this line of samples is cut *by sample count* into V contiguous segments, one per stream, so a shard may be
split and all streams stay within one sample of each other for ever. Inside a segment every window of W samples is
permuted by a hash of ``(seed, e, v, window)``. Epochs run on into each other.

Nothing here does I/O or depends on how many ranks or workers read the streams: a position in a stream names one
sample, whoever reads it. That is what makes resuming and resizing exact.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


def mix(*values: int) -> int:
    """A 64-bit hash of integers (splitmix64, chained): the same on every machine and in every library version."""
    state = 0
    for value in values:
        state = _scramble((state ^ (value & _MASK)) * _GAMMA + _GAMMA & _MASK)
    return state


def _scramble(state: int) -> int:
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
    return state ^ state >> 31


def permutation(length: int, *key: int) -> NDArray[np.int64]:
    """A permutation of ``range(length)`` that depends on ``key`` alone."""
    state = np.uint64(mix(*key)) + np.arange(length, dtype=np.uint64) * np.uint64(_GAMMA)
    state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    # A stable sort of the hashes: numpy's own shuffles are not promised to be the same in the next version.
    return np.argsort(state ^ state >> np.uint64(31), kind="stable")


class KeyedRandom:
    """Uniform numbers from a key alone (splitmix64); ``KeyedRandom(seed, stream, position)`` is one sample's."""

    def __init__(self, *key: int) -> None:
        self._state = mix(*key)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high)."""
        self._state = self._state + _GAMMA & _MASK
        return low + (high - low) * ((_scramble(self._state) >> 11) * 2.0**-53)

    def below(self, bound: int) -> int:
        """An integer in [0, bound)."""
        return int(self.uniform() * bound)


def stretches(position: int, skipped: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int | None]]:
    """What there is of a stream from ``position`` on beside the ``skipped`` ranges ``(start, stop)``.

    Gives ``(start, stop)`` of each stretch; the last one has no end. What comes after a position depends on nothing
    else, so cursors need not say whether a range has been passed.
    """
    for start, stop in sorted(skipped):
        if position < start:
            yield position, start
        position = max(position, stop)
    yield position, None


class Shard(NamedTuple):
    """A shard as the order sees it: a name (no directory), a number of samples, the source it belongs to."""

    name: str
    samples: int
    source: int = 0


class Piece(NamedTuple):
    """Consecutive samples ``start <= index < stop`` of the shard with index ``shard``."""

    shard: int
    start: int
    stop: int


class Location(NamedTuple):
    """Where one sample lies: epoch, number of its shard in the list, number of the sample in the shard."""

    epoch: int
    shard: int
    sample: int


class Window(NamedTuple):
    """The stretch of a stream that is shuffled together.

    ``pieces`` are read in order; the sample that the stream emits at position ``start + i`` is number
    ``permutation[i]`` of what was read.
    """

    epoch: int
    start: int
    stop: int
    pieces: list[Piece]
    permutation: NDArray[np.int64]


class _Line(NamedTuple):
    pieces: list[Piece]
    ends: NDArray[np.int64]


class _Epoch(NamedTuple):
    line: _Line
    segments: NDArray[np.int64]  # where each stream's segment begins on the line


class SampleOrder:
    """The order of all samples for the life of a run.

    Args:
        shards_with_counts: ``(name, samples)`` or ``(name, samples, source)`` per shard.
        weights: passes over each source per epoch; None is 1 for each. Fractions rotate: over the epochs every sample
            of a source is seen equally often, give or take one.
        seed: permutes shards and windows.
        streams: V, the number of canonical streams.
        window: W, samples per shuffle window.

    Raises:
        ValueError: no samples, a weight that is not positive, or weights that do not match the sources.
    """

    def __init__(
        self,
        shards_with_counts: Sequence[tuple[str, int] | tuple[str, int, int]],
        weights: Sequence[float] | None,
        seed: int,
        streams: int,
        window: int,
    ) -> None:
        self.shards = [Shard(*shard) for shard in shards_with_counts]
        self.seed, self.streams, self.window_size = seed, streams, window
        sources = 1 + max((shard.source for shard in self.shards), default=0)
        self._by_source = [[i for i, s in enumerate(self.shards) if s.source == k] for k in range(sources)]
        self._sizes = [sum(self.shards[i].samples for i in members) for members in self._by_source]
        if weights is not None and len(weights) != sources:
            raise ValueError(f"{len(weights)} weights for {sources} sources")
        self.weights = [Fraction(str(w)) for w in weights] if weights is not None else [Fraction(1)] * sources
        if any(w <= 0 for w in self.weights):
            raise ValueError(f"weights must be above 0, got {weights}")
        if streams < 1 or window < 1:
            raise ValueError(f"streams={streams} and window={window} must be at least 1")
        if not all(self._sizes):
            raise ValueError(f"source {self._sizes.index(0)} has no samples")
        self._epochs: dict[int, _Epoch] = {}

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits of all that the order depends on; never a host or a directory."""
        parts = {
            "shards": [[s.source, s.name, s.samples] for s in self.shards],
            "weights": [str(w) for w in self.weights],
            "seed": self.seed, "streams": self.streams, "window": self.window_size,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def epoch_start(self, epoch: int) -> int:
        """Samples in all epochs before ``epoch``."""
        return sum(int(epoch * w * n) for w, n in zip(self.weights, self._sizes, strict=True))

    def stream_start(self, epoch: int, stream: int) -> int:
        """Position in ``stream`` at which ``epoch`` begins."""
        return (self.epoch_start(epoch) + self.streams - 1 - stream) // self.streams

    def epoch_at(self, stream: int, position: int) -> int:
        """The epoch to which a position of a stream belongs."""
        low, high = 0, 1
        while self.stream_start(high, stream) <= position:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.stream_start(middle, stream) <= position else (low, middle)
        return low

    def window(self, stream: int, position: int) -> Window:
        """The shuffle window that holds ``position`` of ``stream``."""
        epoch = self.epoch_at(stream, position)
        first, last = self.stream_start(epoch, stream), self.stream_start(epoch + 1, stream)
        number = (position - first) // self.window_size
        start = first + number * self.window_size
        stop = min(start + self.window_size, last)
        laid_out = self._epoch(epoch)
        on_line = int(laid_out.segments[stream]) + start - first
        return Window(
            epoch,
            start,
            stop,
            self._cut(laid_out.line, on_line, on_line + stop - start),
            permutation(stop - start, self.seed, epoch, stream, number),
        )

    def locate(self, stream: int, position: int) -> Location:
        """Where the sample at ``position`` of ``stream`` lies."""
        window = self.window(stream, position)
        rank = int(window.permutation[position - window.start])
        for piece in window.pieces:
            if rank < piece.stop - piece.start:
                return Location(window.epoch, piece.shard, piece.start + rank)
            rank -= piece.stop - piece.start
        raise AssertionError("a window's pieces hold fewer samples than its permutation")

    def _epoch(self, epoch: int) -> _Epoch:
        """An epoch laid out; the last few are kept, since streams cross the edge of an epoch one after another."""
        if epoch not in self._epochs:
            pieces: list[Piece] = []
            for source in range(len(self._by_source)):
                pieces += self._share(source, epoch)
            pieces = [pieces[i] for i in permutation(len(pieces), self.seed, epoch)]
            ends = np.cumsum([p.stop - p.start for p in pieces], dtype=np.int64)
            lengths = [self.stream_start(epoch + 1, v) - self.stream_start(epoch, v) for v in range(self.streams)]
            while len(self._epochs) > 2:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = _Epoch(_Line(pieces, ends), np.cumsum([0, *lengths], dtype=np.int64))
        return self._epochs[epoch]

    def _share(self, source: int, epoch: int) -> list[Piece]:
        """What an epoch takes of a source, which is an endless line of passes, each in an order of its own."""
        size, weight, members = self._sizes[source], self.weights[source], self._by_source[source]
        start, stop = int(epoch * weight * size), int((epoch + 1) * weight * size)
        pieces: list[Piece] = []
        for number in range(start // size, -(-stop // size)):
            order = [members[i] for i in permutation(len(members), self.seed, source, number, 1)]
            line = _Line(
                [Piece(i, 0, self.shards[i].samples) for i in order],
                np.cumsum([self.shards[i].samples for i in order], dtype=np.int64),
            )
            base = number * size
            pieces += self._cut(line, max(start - base, 0), min(stop - base, size))
        return pieces

    @staticmethod
    def _cut(line: _Line, start: int, stop: int) -> list[Piece]:
        """The pieces of ``line`` between two sample counts."""
        found: list[Piece] = []
        i = int(np.searchsorted(line.ends, start, side="right"))
        while start < stop:
            piece, end = line.pieces[i], int(line.ends[i])
            begin = piece.stop - (end - start)
            taken = min(end, stop) - start
            if taken:
                found.append(Piece(piece.shard, begin, begin + taken))
            start, i = start + taken, i + 1
        return found
