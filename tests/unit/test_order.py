"""The sample order is a pure function with the promised properties."""

from __future__ import annotations

import pickle
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipscale.data.order import KeyedRandom, SampleOrder, mix, permutation


def everything(order: SampleOrder, epoch: int) -> list[tuple[int, int]]:
    located = []
    for v in range(order.streams):
        for position in range(order.stream_start(epoch, v), order.stream_start(epoch + 1, v)):
            location = order.locate(v, position)
            assert location.epoch == epoch
            located.append((location.shard, location.sample))
    return located


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any),
    seed=st.integers(0, 2**40),
    streams=st.integers(1, 9),
    window=st.integers(1, 50),
    epoch=st.integers(0, 5),
)
def test_each_epoch_holds_each_sample_once(counts: list[int], seed: int, streams: int, window: int, epoch: int) -> None:
    order = SampleOrder([(f"{i}.tar", n) for i, n in enumerate(counts)], None, seed, streams, window)
    found = everything(order, epoch)
    assert sorted(found) == [(i, j) for i, n in enumerate(counts) for j in range(n)]


@settings(max_examples=30, deadline=None)
@given(total=st.integers(1, 400), streams=st.integers(1, 16), epoch=st.integers(0, 50))
def test_streams_stay_within_one_sample(total: int, streams: int, epoch: int) -> None:
    order = SampleOrder([("a", total)], None, 0, streams, 8)
    starts = [order.stream_start(epoch, v) for v in range(streams)]
    assert max(starts) - min(starts) <= 1
    assert sum(starts) == order.epoch_start(epoch) == epoch * total


@settings(max_examples=20, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.25, 0.3, 0.5, 1, 1.5, 2, 3.7]), min_size=2, max_size=2),
    sizes=st.lists(st.integers(1, 30), min_size=2, max_size=2),
)
def test_fractional_weights_rotate(weights: list[float], sizes: list[int]) -> None:
    order = SampleOrder([("a", sizes[0], 0), ("b", sizes[1], 1)], weights, 3, 4, 5)
    seen: Counter[tuple[int, int]] = Counter()
    epochs = 20
    for epoch in range(epochs):
        seen.update(everything(order, epoch))
    for source in (0, 1):
        counts = [seen[source, i] for i in range(sizes[source])]
        assert max(counts) - min(counts) <= 1
        assert sum(counts) == int(epochs * order.weights[source] * sizes[source])


def test_epochs_and_seeds_differ_and_windows_shuffle() -> None:
    shards = [(f"{i}", 100) for i in range(10)]
    order = SampleOrder(shards, None, 0, 2, 50)
    first, second = everything(order, 0), everything(order, 1)
    assert first != second != everything(SampleOrder(shards, None, 1, 2, 50), 0)
    assert first != sorted(first)


def test_window_holds_consecutive_samples() -> None:
    order = SampleOrder([("a", 10), ("b", 7)], None, 5, 3, 4)
    window = order.window(1, 2)
    assert window.start <= 2 < window.stop
    assert sum(p.stop - p.start for p in window.pieces) == window.stop - window.start == len(window.permutation)


def test_the_order_is_pinned() -> None:
    """A change here would break the resume of every run that exists."""
    assert mix(1, 2, 3) == 1884114840797188290
    assert permutation(8, 7).tolist() == [0, 5, 4, 3, 2, 7, 6, 1]
    order = SampleOrder([("a.tar", 5), ("b.tar", 4), ("c.tar", 3, 1)], [1, 0.5], 42, 2, 3)
    assert [tuple(order.locate(0, p)) for p in range(6)] == PINNED
    assert order.fingerprint == PINNED_FINGERPRINT


PINNED = [(0, 0, 0), (0, 2, 0), (0, 0, 1), (0, 0, 3), (0, 0, 2), (1, 1, 0)]
PINNED_FINGERPRINT = "604b4a0a701c7dca"


def test_fingerprint_ignores_nothing_that_matters() -> None:
    base = dict(weights=None, seed=0, streams=2, window=4)
    prints = {
        SampleOrder([("a", 5), ("b", 6)], **base).fingerprint,
        SampleOrder([("a", 6), ("b", 5)], **base).fingerprint,
        SampleOrder([("b", 6), ("a", 5)], **base).fingerprint,
        SampleOrder([("a", 5), ("b", 6, 1)], **base).fingerprint,
        SampleOrder([("a", 5), ("b", 6)], **base | {"seed": 1}).fingerprint,
        SampleOrder([("a", 5), ("b", 6)], **base | {"window": 5}).fingerprint,
        SampleOrder([("a", 5), ("b", 6)], **base | {"streams": 3}).fingerprint,
        SampleOrder([("a", 5), ("b", 6)], **base | {"weights": [2]}).fingerprint,
    }
    assert len(prints) == 8


def test_order_travels_to_workers() -> None:
    order = SampleOrder([("a", 50)], None, 0, 2, 8)
    order.locate(0, 3)
    assert pickle.loads(pickle.dumps(order)).locate(1, 17) == order.locate(1, 17)


@pytest.mark.parametrize(
    ("shards", "weights", "streams", "window", "message"),
    [
        ([], None, 1, 1, "no samples"),
        ([("a", 0)], None, 1, 1, "no samples"),
        ([("a", 1)], [1, 2], 1, 1, "2 weights for 1 sources"),
        ([("a", 1)], [0], 1, 1, "above 0"),
        ([("a", 1)], None, 0, 1, "at least 1"),
    ],
)
def test_senseless_orders_are_refused(shards, weights, streams, window, message) -> None:
    with pytest.raises(ValueError, match=message):
        SampleOrder(shards, weights, 0, streams, window)


def test_keyed_random_is_uniform_and_its_own() -> None:
    draws = [KeyedRandom(0, i).uniform() for i in range(4000)]
    assert abs(sum(draws) / 4000 - 0.5) < 0.02
    assert KeyedRandom(1, 2).uniform() == KeyedRandom(1, 2).uniform() != KeyedRandom(2, 1).uniform()
    one = KeyedRandom(9)
    assert {one.below(3) for _ in range(50)} == {0, 1, 2}
