"""What could not be used: counted by shard and reason, and held against a budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

JUDGED_AFTER = 2_000  # samples; fewer say little about a data set


@dataclass
class BadSamples:
    """Counts of bad samples, as ``counts[shard, reason]``."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, bad: Iterable[tuple[str, str]]) -> None:
        """Count ``(reason, key)`` pairs as batches carry them; a key begins with its shard's name."""
        self.counts.update((key.partition("/")[0], reason) for reason, key in bad)

    def by_reason(self) -> dict[str, int]:
        """Counts by reason, the most frequent first."""
        return self._sum(1)

    def by_shard(self) -> dict[str, int]:
        """Counts by shard, the worst first."""
        return self._sum(0)

    def _sum(self, place: int) -> dict[str, int]:
        sums: Counter[str] = Counter()
        for pair, count in self.counts.items():
            sums[pair[place]] += count
        return dict(sums.most_common())


def over_budget(bad: int, used: int, limit: float | None, at_the_end: bool) -> bool:
    """Whether ``bad`` samples beside ``used`` ones are more than the share ``limit`` of all; None is no limit."""
    tried = bad + used
    return limit is not None and bad > limit * tried and (at_the_end or tried >= JUDGED_AFTER)


def worst_shard(bad: BadSamples, read: Mapping[str, int], limit: float) -> tuple[str, int, int] | None:
    """The shard with the largest share of bad samples, if that is above ``limit``: ``(name, bad, samples read)``."""
    shares = {name: count / read[name] for name, count in bad.by_shard().items() if read.get(name)}
    name = max(shares, key=shares.__getitem__, default="")
    return (name, bad.by_shard()[name], read[name]) if name and shares[name] > limit else None
