"""Bad samples are counted by shard and reason, and judged against a budget."""

from __future__ import annotations

import pytest

from clipscale.data.accounting import BadSamples, over_budget, worst_shard


def test_counts_by_reason_and_shard() -> None:
    bad = BadSamples()
    bad.add([("no_image", "a.tar/1"), ("no_caption", "b.tar/2")])
    bad.add([("no_image", "b.tar/deep/3"), ("no_image", "b.tar/4")])
    assert list(bad.by_reason().items()) == [("no_image", 3), ("no_caption", 1)]
    assert list(bad.by_shard().items()) == [("b.tar", 3), ("a.tar", 1)]


@pytest.mark.parametrize(
    ("bad", "used", "limit", "at_the_end", "verdict"),
    [
        (300, 1600, 0.1, False, False),  # too early to judge
        (300, 1700, 0.1, False, True),
        (200, 1800, 0.1, False, False),  # a tenth is not more than a tenth
        (3, 10, 0.1, True, True),
        (0, 10, 0.0, True, False),
        (1, 10_000, 0.0, False, True),
        (9000, 1000, None, True, False),
    ],
)
def test_the_budget(bad: int, used: int, limit: float | None, at_the_end: bool, verdict: bool) -> None:
    assert over_budget(bad, used, limit, at_the_end) is verdict


def test_the_worst_shard() -> None:
    bad = BadSamples()
    bad.add([("no_image", "a.tar/1"), ("no_image", "a.tar/2"), ("no_caption", "b.tar/1")])
    samples = {"a.tar": 100, "b.tar": 10}
    assert worst_shard(bad, samples, 0.05) == ("b.tar", 1, 10)
    assert worst_shard(bad, samples, 0.1) is None
    assert worst_shard(BadSamples(), samples, 0.0) is None
