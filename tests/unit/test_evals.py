"""Ranks, ties and chance levels."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from clipscale.errors import DataError
from clipscale.evals.ranking import chance, hit_probability, hits
from clipscale.evals.zeroshot import Classes


def by_counting(k: int, better: int, tied: int, right: int) -> float:
    """The same, over all orders of the ties."""
    orders = list(itertools.permutations([True] * right + [False] * (tied - right)))
    return sum(any(order[: max(k - better, 0)]) for order in orders) / len(orders)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_ties_share_their_places(k: int) -> None:
    cases = [(b, t, r) for b in range(4) for t in range(1, 6) for r in range(1, t + 1)]
    columns = [torch.tensor(column) for column in zip(*cases, strict=True)]
    expected = [by_counting(k, *case) for case in cases]
    torch.testing.assert_close(hit_probability(k, *columns), torch.tensor(expected, dtype=torch.float64))


def test_hits_with_several_right_answers() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.4], [0.1, 0.2, 0.3, 0.4]])
    right = torch.tensor([[False, True, True, False], [True, False, False, False]])
    assert hits(scores, right, (1, 2, 4)) == {1: 0.0, 2: 1.0, 4: 2.0}


def test_a_collapsed_model_scores_chance() -> None:
    right = torch.eye(50, dtype=torch.bool)
    found = hits(torch.ones(50, 50), right, (1, 5))
    luck = chance(torch.ones(1, dtype=torch.int64), 50, (1, 5))
    assert found[1] / 50 == pytest.approx(luck[1]) == pytest.approx(1 / 50)
    assert found[5] / 50 == pytest.approx(luck[5]) == pytest.approx(5 / 50)


def test_chance_with_groups() -> None:
    # Two of four are right: a random first place hits half of the time, two places miss both with 2/4 · 1/3.
    assert chance(torch.tensor([2]), 4, (1, 2)) == {1: pytest.approx(0.5), 2: pytest.approx(1 - 1 / 6)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "needs classnames and templates"),
        (json.dumps({"classnames": ["a"]}), "needs classnames and templates"),
        (json.dumps({"classnames": ["a"], "templates": ["no slot"]}), "templates that hold"),
        (json.dumps({"classnames": [], "templates": ["{}"]}), "templates that hold"),
    ],
)
def test_wrong_class_files_are_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "classes.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        Classes.load(path)
