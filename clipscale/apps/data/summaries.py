"""Summaries of many values that stay small and can be merged: distributions, most frequent values, draws."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

DIGITS = 3  # significant ones that a distribution keeps


def hash64(text: str) -> int:
    """64 bits that tell texts apart: among 10⁹ distinct ones, two are taken for one with a chance of 3 %."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def quantum(value: float) -> float:
    """The step between neighbouring values near ``value`` that a Spread keeps apart."""
    return 10.0 ** (math.floor(math.log10(abs(value))) - DIGITS + 1) if value else 0.0


@dataclass
class Spread:
    """A distribution: counts of values rounded to three significant digits; extremes and sum exact."""

    counts: Counter[float] = field(default_factory=Counter)
    total: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    def add(self, value: float) -> None:
        """Count one finite value."""
        self.counts[value if value.__class__ is int and -1000 < value < 1000 else float(f"{value:.{DIGITS}g}")] += 1
        self.total += value
        self.low, self.high = min(self.low, value), max(self.high, value)

    def merge(self, other: Spread) -> None:
        """Take in another distribution."""
        self.counts.update(other.counts)
        self.total += other.total
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def __len__(self) -> int:
        return self.counts.total()

    def quantile(self, share: float) -> float:
        """The smallest value that at least this share of all values does not exceed, as rounded above."""
        left = share * len(self)
        for value in sorted(self.counts):
            left -= self.counts[value]
            if left <= 0:
                break
        return min(max(value, self.low), self.high)

    def describe(self) -> dict[str, float]:
        """``count min p1 p5 p25 median p75 p95 p99 max mean``; of no values, the count alone."""
        if not self.counts:
            return {"count": 0}
        shares = {"p1": 0.01, "p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99}
        found = {name: _plain(self.quantile(share)) for name, share in shares.items()}
        ends = {"min": _plain(self.low)}, {"max": _plain(self.high), "mean": _plain(self.total / len(self))}
        return {"count": len(self), **ends[0], **found, **ends[1]}

    def to_json(self) -> list[Any]:
        """What :meth:`from_json` reads."""
        return [[[value, count] for value, count in self.counts.items()], self.total, self.low, self.high]

    @classmethod
    def from_json(cls, value: Any) -> Spread:
        """The inverse of :meth:`to_json`."""
        pairs, total, low, high = value
        return cls(Counter({_plain(value): count for value, count in pairs}), total, low, high)


@dataclass
class Top:
    """The most frequent of many texts: at least ``limit`` are kept; ``lost`` is how far a count can be too low."""

    limit: int
    counts: Counter[str] = field(default_factory=Counter)
    lost: int = 0

    def add(self, texts: Iterable[str]) -> None:
        """Count texts."""
        self.counts.update(texts)
        self._prune(8 * self.limit)

    def merge(self, other: Top) -> None:
        """Take in other counts."""
        self.counts.update(other.counts)
        self.lost += other.lost
        self._prune(8 * self.limit)

    def best(self, count: int) -> list[tuple[str, int]]:
        """``(text, count)``, the most frequent first, equals in the order of the alphabet."""
        return heapq.nsmallest(count, self.counts.items(), key=lambda pair: (-pair[1], pair[0]))

    def _prune(self, most: int) -> None:
        if len(self.counts) > most:
            kept = self.best(self.limit + 1)
            self.lost += kept.pop()[1]
            self.counts = Counter(dict(kept))

    def to_json(self) -> list[Any]:
        """What :meth:`from_json` reads, no more than ``limit`` texts."""
        self._prune(self.limit)
        return [self.limit, dict(self.counts), self.lost]

    @classmethod
    def from_json(cls, value: Any) -> Top:
        """The inverse of :meth:`to_json`."""
        limit, counts, lost = value
        return cls(limit, Counter(counts), lost)


@dataclass
class Draw:
    """The ``limit`` samples of the lowest rank, equals by hash: the same in whatever order samples come.

    An entry is ``(rank, hash, shard, place)``, shard and place being numbers.
    """

    limit: int
    entries: list[tuple[float, int, int, int]] = field(default_factory=list)

    def add(self, rank: float, tie: int, shard: int, place: int) -> None:
        """Consider a sample."""
        self.entries.append((rank, tie, shard, place))
        if len(self.entries) > 8 * self.limit:
            self._cut()

    def merge(self, other: Draw) -> None:
        """Consider another draw's samples."""
        self.entries += other.entries
        self._cut()

    def _cut(self) -> None:
        self.entries = sorted(self.entries)[: self.limit]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """``(shard, place)``, the lowest rank first."""
        self._cut()
        return iter([(shard, place) for _, _, shard, place in self.entries])

    def to_json(self) -> list[Any]:
        """What :meth:`from_json` reads."""
        self._cut()
        return [self.limit, self.entries]

    @classmethod
    def from_json(cls, value: Any) -> Draw:
        """The inverse of :meth:`to_json`."""
        limit, entries = value
        return cls(limit, [(rank, tie, shard, place) for rank, tie, shard, place in entries])


def _plain(value: float) -> float:
    return int(value) if value == int(value) else float(f"{value:.6g}")
