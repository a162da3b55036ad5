"""Questions of which images go with a word: against WinoGAViL's score as scikit-learn has it, ties, and mistakes."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score

from clipscale.apps.asking import ask
from clipscale.apps.evaluation.tasks import Task, run_task
from clipscale.data.associations import association_table, open_associations
from clipscale.data.collections import IMAGE_KEYS
from clipscale.data.evalset import EvalSet
from clipscale.errors import ClipscaleError, DataError
from clipscale.evals.ranking import jaccard
from tests.shards import jpeg

TABLE = "winogavil_dataset.csv"
CUES = ("Owl", "night", "a crowd, loud", "owl house")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "winogavil_images").mkdir()
    for number in range(14):
        (tmp_path / "winogavil_images" / f"image {number}.jpg").write_bytes(jpeg(number, 48))
    rows, draw = ["ID,cue,associations,candidates,num_candidates"], random.Random(0)
    for number in range(12):
        names = [f"image {n}" for n in draw.sample(range(14), (5, 6, 10, 12)[number % 4])]
        lists = [json.dumps(some).replace('"', '""') for some in (names[: 2 + number % 3], sorted(names))]
        rows.append(f'{number},"{CUES[number % len(CUES)]}","{lists[0]}","{lists[1]}",{len(names)}')
    (tmp_path / TABLE).write_text("\n".join(rows) + "\n")
    return tmp_path


def test_the_score_is_winogavils(place: Path, tiny_model: Path) -> None:
    context = ask(str(tiny_model), "cpu")
    answer = run_task(Task(str(place)), context)
    assert (answer.metric, answer.bad, answer.outcome.sizes) == ("jaccard", 0, {"samples": 12})
    samples = open_associations(place / TABLE)
    features, items, _ = context.encode_images(EvalSet(samples, IMAGE_KEYS, context.model.config.vision, 10**6, []))
    image = {item.place: row for item, row in zip(items, features, strict=True)}
    expected = []
    for question in samples.questions:
        article = "An" if question.cue[0] in "Oo" else "A"
        text = context.encode_captions([f"{article} {question.cue.lower()}"])[0]
        scores = np.array([float(image[n] @ text) for n in question.candidates])
        chosen = np.isin(np.arange(len(scores)), np.argsort(scores)[-sum(question.right) :])
        expected.append(jaccard_score(question.right, chosen))
    np.testing.assert_allclose(answer.outcome.arrays["jaccard"], expected, atol=1e-12)
    scores = answer.outcome.scores(answer.outcome.all)
    assert scores["jaccard"] == pytest.approx(np.mean(expected)) and list(scores)[1:] == [
        f"jaccard_of_{n}" for n in (5, 6, 10, 12)
    ]
    assert scores["jaccard_of_6"] == pytest.approx(np.mean(expected[1::4]))
    assert set(answer.outcome.chances) == set(scores)


@pytest.mark.parametrize(("scores", "right"), [
    ([0.1, 0.5, 0.5, 0.5, 0.9], [1, 1, 0, 1, 0]), ([0, 0, 0, 0], [1, 0, 1, 0]), ([3, 2, 1], [0, 0, 1]),
    ([2, 2, 1], [1, 1, 0]), ([1, 1], [1, 1]),
])  # fmt: skip
def test_ties_share_the_places(scores: list[float], right: list[int]) -> None:
    """The mean over every order of the candidates, of which each would be cut at the same place."""
    found = []
    for order in itertools.permutations(range(len(scores))):
        chosen = sorted(order, key=lambda n: -scores[n])[: sum(right)]  # stable: ties stay as drawn
        found.append(jaccard_score(right, [n in chosen for n in range(len(scores))]))
    assert jaccard(scores, [bool(one) for one in right]) == pytest.approx(np.mean(found))


def test_a_question_without_its_image_is_left_out_and_told(place: Path, tiny_model: Path) -> None:
    (place / "winogavil_images" / "image 3.jpg").write_bytes(b"no image")
    samples = open_associations(place / TABLE)
    bad = next(n for n in range(len(samples)) if samples.location(n).endswith("image 3.jpg"))
    left = sum(bad in question.candidates for question in samples.questions)
    answer = run_task(Task(str(place), kind="associations"), ask(str(tiny_model), "cpu"))
    assert left and answer.outcome.sizes == {"samples": 12 - left}
    assert answer.bad == left and answer.warnings == [f"samples that could not be used: undecodable_image ({left})"]
    for number in range(14):
        (place / "winogavil_images" / f"image {number}.jpg").write_bytes(b"" if number < 13 else jpeg(0, 48))
    with pytest.raises(DataError, match="each of 12 questions has an image that cannot be used"):
        run_task(Task(str(place), kind="associations"), ask(str(tiny_model), "cpu"))


def test_own_templates(place: Path, tiny_model: Path, tmp_path: Path) -> None:
    context = ask(str(tiny_model), "cpu")
    own, other = run_task(Task(str(place)), context), run_task(Task(str(place), templates="imagenet"), context)
    assert own.outcome.same_queries(other.outcome)
    assert not torch.equal(*(torch.tensor(one.outcome.arrays["jaccard"]) for one in (own, other)))


@pytest.mark.parametrize(("row", "said"), [
    ('owl,"[""image 1""]","[""image 2""]"', "row 1: image 1 is none of the candidates"),
    ('owl,[],"[""image 2""]"', "row 1: no association"),
    (',"[""image 1""]","[""image 1""]"', "row 1: the cue is empty"),
    ('owl,"[""image 1""]","[""image 1"", ""image 1""]"', "row 1: an image is named twice"),
    ("owl,image 1,image 1", r'row 1: candidates is no JSON list of names, such as \["owl", "moon"\]'),
    ('owl,1,"[""image 1""]"', "row 1: associations is no JSON list"), ("owl", "row 1: no association"),
    ('owl,"[""image 1""]","[""image 1"", ""image 1.jpg""]"', "row 1: an image is named twice"),
    ('owl,"[""image 1""]",' + "[" * 100_000, "row 1: candidates is no JSON list"),
    ('owl,"[""image 1""]","[""' + "1" * 300 + '"", ""image 1""]"', "does not exist$"),
    ('owl,"[""image 99""]","[""image 99""]"', "image 99, which winogavil_dataset.csv names, does not exist"),
    ("", "holds no questions"),
])  # fmt: skip
def test_mistakes(place: Path, row: str, said: str) -> None:
    (place / TABLE).write_text(f"cue,associations,candidates\n{row}\n")
    with pytest.raises(DataError, match=said):
        open_associations(place / TABLE)


def test_the_table_is_found(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place.parent))
    assert association_table(f"~/{place.name}") == association_table(str(place / TABLE)) == place / TABLE
    (place / "other.csv").write_bytes(b"cue,associations,candidates\nh\xe9ron,[],[]\n")
    with pytest.raises(DataError, match=r"holds questions in other\.csv and in winogavil_dataset\.csv; name one"):
        association_table(str(place))
    with pytest.raises(DataError, match=r"other\.csv cannot be read: 'utf-8' codec"):
        open_associations(place / "other.csv")
    assert association_table("a/" * 5000) is None


def test_what_is_no_number_is_no_score() -> None:
    assert np.isnan(jaccard([0.1, float("nan"), 0.3], [True, False, False]))


def test_another_directory(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "some.csv").write_text("image,caption\n")
    with pytest.raises(ClipscaleError, match=r"neither is nor holds a \.csv with the columns cue, cand"):
        run_task(Task(str(tmp_path), kind="associations"), ask(str(tiny_model), "cpu"))
