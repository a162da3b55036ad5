"""A rank that keeps the others waiting is named, once, and only if it does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from clipscale.distributed.collectives import rank
from clipscale.telemetry import Stragglers
from clipscale.telemetry.stragglers import straggler
from tests.pool import Pool


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [([0.0], None), ([9.0], None), ([0.1, 3.0], 1), ([3.0, 3.1, 2.9, 3.0], None), ([0.1, 0.1, 0.1, 2.5], 3)],
)
def test_who_is_slow(seconds: list[float], expected: int | None) -> None:
    assert straggler(seconds, 10.0) == expected


def tell(path: Path) -> list[str]:
    said: list[str] = []
    stragglers = Stragglers(path, torch.device("cpu"))
    for _ in range(3):
        with stragglers.computing():
            pass
        own = {
            "train/data_wait_s": 4.0 * rank(),
            "train/memory_peak_bytes": 1.0 + rank(),
            "train/tokens_per_caption": 8.0,
        }
        found = stragglers.compare(own | {"train/tokens_per_caption": 8.0}, steps=4)
        assert (found["train/data_wait_s"], found["train/memory_peak_bytes"]) == (4.0, 2.0)
        assert (found["train/tokens_per_caption"], found["train/slowest_rank"]) == (8.0, 1.0)
        assert 0 <= found["train/rank_s_min"] < 1 <= found["train/rank_s_max"]
        stragglers.tell(10.0, said.append)
    return said


def test_the_rank_that_waits_for_data_is_named_once(pool2: Pool, tmp_path: Path) -> None:
    told = "warning: rank 1 waits for data for 4.0 of 10.0 s, the median rank for 0.0 s: all wait for it"
    assert pool2.run(tell, tmp_path) == [[told], []]
    (event,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert (event["event"], event["rank"], event["what"]) == ("straggler", 1, "waits for data")
