"""Composition and counting: the questions, and what is made of the answers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageChops

from clipscale.apps.probing.composition import composition
from clipscale.data.compositions import COUNTS, NUMBERS, PAIRS, SWAPPED, ensure_compositions, write_compositions
from clipscale.data.evalset import EvalItem
from clipscale.data.questions import Question, read_questions
from clipscale.errors import DataError
from clipscale.evals.composition import answer, exceed
from tests.shards import jpeg


def by_counting(right: list[float], wrong: list[float]) -> float:
    """The same, over all orders of what is equal."""
    scores = [(score, True) for score in right] + [(score, False) for score in wrong]
    orders = list(itertools.permutations(range(len(scores))))
    places = [sorted(range(len(scores)), key=lambda i: (scores[i][0], order[i])) for order in orders]
    return sum(all(scores[i][1] for i in found[len(wrong) :]) for found in places) / len(orders)


@pytest.mark.parametrize("right", [[1.0], [1.0, 1.0], [1.0, 2.0]])
@pytest.mark.parametrize("wrong", [[0.0], [1.0, 0.0], [1.0, 1.0], [2.0, 1.0], [2.0, 2.0, 0.0]])
def test_ties_are_drawn(right: list[float], wrong: list[float]) -> None:
    assert exceed(right, wrong) == pytest.approx(by_counting(right, wrong))


def asked(scores: list[list[float]]) -> dict[str, float]:
    """Scores of one question, whose captions and images have these similarities, ``scores[c][i]``."""
    table = torch.tensor(scores)
    captions = tuple(f"caption {i}" for i in range(len(table)))
    context = SimpleNamespace(
        encode_images=lambda images: (
            torch.eye(table.shape[1]), [EvalItem(torch.zeros(3, 0, 0), (), "", i) for i in range(table.shape[1])], [],
        ),
        encode_captions=lambda texts: table,
    )  # fmt: skip
    question = Question("kind", tuple(range(table.shape[1])), captions)
    found, left_out = answer(context, None, [question])  # type: ignore[arg-type]
    assert not left_out
    return {score.name: score.value for score in found}


def test_the_scores_of_winoground() -> None:
    """Figure 3 of its paper: captions prefer their images, but one image prefers the other's caption."""
    assert asked([[0.9, 0.1], [0.2, 0.8]]) == {"kind/text": 1, "kind/image": 1, "kind/group": 1}
    assert asked([[0.9, 0.3], [0.1, 0.2]]) == {"kind/text": 0, "kind/image": 1, "kind/group": 0}
    assert asked([[0.9, 0.1], [0.95, 0.97]]) == {"kind/text": 0, "kind/image": 1, "kind/group": 0}
    assert asked([[0.9, 0.97], [0.1, 0.98]]) == {"kind/text": 1, "kind/image": 0, "kind/group": 0}
    assert asked([[0.5, 0.5], [0.5, 0.5]]) == pytest.approx(
        {"kind/text": 1 / 4, "kind/image": 1 / 4, "kind/group": 1 / 6}
    )


def test_one_image_and_several_captions() -> None:
    assert asked([[0.9], [0.5], [0.2]]) == {"kind/accuracy": 1}
    assert asked([[0.4], [0.5], [0.2]]) == {"kind/accuracy": 0}
    assert asked([[0.5], [0.5], [0.5]]) == pytest.approx({"kind/accuracy": 1 / 3})


def test_built_in_questions(tmp_path: Path) -> None:
    write_compositions(tmp_path / "one", per_kind=5, image_size=48)
    write_compositions(tmp_path / "two", per_kind=5, image_size=48)
    files, questions = read_questions(tmp_path / "one" / PAIRS)
    assert len(questions) == 5 * len(SWAPPED) and len(files) == 2 * len(questions)
    for question in questions:
        one, other = (Image.open(Path(tmp_path, "one", PAIRS, "images", files._paths[i].name)) for i in question.images)
        assert one.size == (48, 48) and ImageChops.difference(one.convert("RGB"), other.convert("RGB")).getbbox()
        first, second = question.captions
        assert first != second
        if question.kind != "place":
            assert sorted(first.replace("an ", "a ").split()) == sorted(second.replace("an ", "a ").split())
    _, counted = read_questions(tmp_path / "one" / COUNTS)
    assert [q.captions[0].split()[0] for q in counted] == list(NUMBERS) * 5
    assert all(sorted(c.split()[0] for c in q.captions) == sorted(NUMBERS) for q in counted)
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == Path(str(path).replace("/one/", "/two/")).read_bytes()
    assert ensure_compositions(32, tmp_path) == ensure_compositions(32, tmp_path)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Both layouts as they are published, with an image that cannot be decoded."""
    images = tmp_path / "winoground" / "images"
    images.mkdir(parents=True)
    for number in range(4):
        (images / f"ex_{number // 2}_img_{number % 2}.png").write_bytes(jpeg(number))
    rows = [
        {"id": i, "image_0": f"ex_{i}_img_0", "image_1": f"ex_{i}_img_1", "caption_0": f"a {i}", "caption_1": f"b {i}",
         "tag": ["Object", "Relation"][i]} for i in range(2)
    ]  # fmt: skip
    (tmp_path / "winoground" / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    coco = tmp_path / "val2017"
    coco.mkdir()
    for number in range(3):
        (coco / f"{number:012d}.jpg").write_bytes(jpeg(number) if number < 2 else b"no image")
    (tmp_path / "sugarcrepe").mkdir()
    entry = {"filename": "000000000000.jpg", "caption": "a cat", "negative_caption": "a dog"}
    for name in ("add_att", "swap_obj"):
        entries = {"0": entry, "1": entry | {"filename": f"{2 if name == 'add_att' else 1:012d}.jpg"}}
        (tmp_path / "sugarcrepe" / f"{name}.json").write_text(json.dumps(entries))
    return tmp_path


def test_published_layouts(published: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model
    found = composition(str(model), [str(published / "winoground")], None, "cpu", None, False)
    assert [(score.name, score.count) for score in found[str(published / "winoground")]] == [
        (f"{kind}/{score}", count)
        for kind, count in (("Object", 1), ("Relation", 1), ("all", 2))
        for score in ("text", "image", "group")
    ]
    capsys.readouterr()
    found = composition(str(model), [str(published / "sugarcrepe")], published / "val2017", "cpu", None, True)
    told = capsys.readouterr()
    counts = {name: score["count"] for name, score in json.loads(told.out)[str(published / "sugarcrepe")].items()}
    assert counts == {"add_att/accuracy": 1, "all/accuracy": 3, "swap_obj/accuracy": 2}
    assert "1 of 4 questions are about unusable images" in told.err


def test_what_is_wrong_is_one_line(published: Path) -> None:
    with pytest.raises(DataError, match="say where its images lie: --images"):
        read_questions(published / "sugarcrepe")
    with pytest.raises(DataError, match="holds no questions; name a directory with Winoground"):
        read_questions(published / "nothing")
    (published / "sugarcrepe" / "add_att.json").write_text('{"0": {"filename": "a", "caption": "b"}}')
    with pytest.raises(DataError, match="entry 0: no negative_caption"):
        read_questions(published / "sugarcrepe", published / "val2017")
    (published / "winoground" / "examples.jsonl").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"examples\.jsonl cannot be read"):
        read_questions(published / "winoground")
    (published / "winoground" / "examples.jsonl").write_text('{"image_0": "a"}\n')
    with pytest.raises(DataError, match="line 1: no image_1"):
        read_questions(published / "winoground")
