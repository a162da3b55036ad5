"""Ranks, ties and chance levels."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from clipscale.data.evalset import EvalItem
from clipscale.data.samples import BadSample, Member, find_label
from clipscale.errors import DataError
from clipscale.evals import Examples, RetrievalEvaluator
from clipscale.evals.ranking import chance, hit_probability, hits
from clipscale.evals.zeroshot import Classes
from tests.shards import STORE


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
    assert {k: found.tolist() for k, found in hits(scores, right, (1, 2, 4)).items()} == {
        1: [0, 0],
        2: [1, 0],
        4: [1, 1],
    }


def test_a_collapsed_model_scores_chance() -> None:
    right = torch.eye(50, dtype=torch.bool)
    found = hits(torch.ones(50, 50), right, (1, 5))
    luck = chance(torch.ones(1, dtype=torch.int64), 50, (1, 5))
    assert found[1].mean() == pytest.approx(float(luck[1])) == pytest.approx(1 / 50)
    assert found[5].mean() == pytest.approx(float(luck[5])) == pytest.approx(5 / 50)


def test_chance_with_groups() -> None:
    # Two of four are right: a random first place hits half of the time, two places miss both with 2/4 · 1/3.
    assert chance(torch.tensor([2]), 4, (1, 2)) == {1: pytest.approx(0.5), 2: pytest.approx(1 - 1 / 6)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (json.dumps({"classnames": ["a"], "templates": ["{} and {}"]}), "one {} each"),
        (json.dumps({"classnames": ["a"], "templates": ["{} {"]}), "one {} each"),
        (json.dumps({"classnames": ["a"], "templates": [5]}), "templates that hold"),
        (json.dumps({"classnames": ["a"], "templates": ["{}"], "baselines": [1]}), "one {} each"),
        ("{", "needs a list classnames"),
        (json.dumps({"classnames": ["a"]}), "needs a list classnames"),
        (json.dumps({"classnames": ["a"], "templates": ["no slot"]}), "templates that hold"),
        (json.dumps({"classnames": [], "templates": ["{}"]}), "templates that hold"),
    ],
)
def test_wrong_class_files_are_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "classes.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        Classes.load(STORE, str(path))


def test_several_right_captions_per_image() -> None:
    """Three images; the second and the third share a caption, the first has two of its own."""
    captions = [["a", "b"], ["c", "d"], ["d"]]
    features = {"a": [1.0, 0, 0], "b": [0.6, 0.8, 0], "c": [0, 1.0, 0], "d": [0, 0.6, 0.8]}
    images = torch.tensor([[0.6, 0.8, 0], [0, 1.0, 0], [1.0, 0, 0]])
    items = [EvalItem(torch.zeros(3, 0, 0), (texts, texts), "") for texts in captions]
    context = SimpleNamespace(
        encode_images=lambda data: (images, items, []),
        encode_captions=lambda texts: torch.tensor([features[text] for text in texts]),
        loss=lambda image, text: (image * text).sum(),
        device=torch.device("cpu"),
        examples=Examples(),
    )
    metrics = RetrievalEvaluator(None, 2).run(context)  # type: ignore[arg-type]
    assert metrics["val/retrieval/i2t_r1"] == pytest.approx(2 / 3), "its second caption is as right; the third is lost"
    # a -> image 3, wrong; b -> image 1; c -> image 2; d -> image 2, one of its two
    assert metrics["val/retrieval/t2i_r1"] == pytest.approx(3 / 4)
    assert metrics["val/retrieval/i2t_r1_chance"] == pytest.approx((2 / 4 + 2 / 4 + 1 / 4) / 3)
    assert metrics["val/retrieval/t2i_r1_chance"] == pytest.approx((1 / 3 * 3 + 2 / 3) / 4)


def test_an_item_without_its_image_is_small() -> None:
    item = EvalItem(torch.zeros(3, 224, 224, dtype=torch.uint8), ("a",), "k")
    assert len(pickle.dumps(item.without_image())) < 2000


@pytest.mark.parametrize(("value", "label"), [(3, 3), ("7", 7), (3.7, None), ("cat", None), (float("inf"), None)])
def test_labels_are_numbers(value: object, label: int | None) -> None:
    sample = Member("s/k", {"json": json.dumps({"label": value}).encode()})
    if label is not None:
        assert find_label(sample, "json:label") == label
    else:
        with pytest.raises(BadSample, match="label_is_no_number"):
            find_label(sample, "json:label")
