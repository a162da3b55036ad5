"""The commands probe and generalise on a fresh model: what they read, compare and leave behind."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

from clipscale.apps.probing.cli import _numbers
from clipscale.apps.probing.generalise import Options as Gap
from clipscale.apps.probing.generalise import generalise
from clipscale.apps.probing.probe import Options, probe
from clipscale.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from clipscale.data.evalset import EvalItem
from clipscale.errors import ConfigError, DataError
from clipscale.evals.bootstrap import share_interval
from clipscale.evals.generalisation import Part, Question, gap, quarters
from tests.shards import jpeg, sample, write_shard, write_shards


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training shards, and held-out ones: of 24 images one is a training image, others one encoded anew or mirrored."""
    place = tmp_path_factory.mktemp("data")
    write_shards(place / "train", [40, 30])
    images = {5: Image.open(io.BytesIO(jpeg(5))), 6: ImageOps.mirror(Image.open(io.BytesIO(jpeg(6))))}
    again = {number: io.BytesIO() for number in images}
    for number, image in images.items():
        image.save(again[number], "PNG")
    numbers = [*range(100, 121), 3, 5, 6]
    held_out = [(f"{n:06d}", sample(n) | ({"jpg": again[n].getvalue()} if n in again else {})) for n in numbers]
    write_shard(place / "held-out.tar", held_out)
    classes = {"classnames": [f"thing {n}" for n in range(7)], "templates": ["a {}", "the {}"]}
    (place / "classes.json").write_text(json.dumps(classes))
    return place


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_damage_grows_and_is_the_same_again(kind: str) -> None:
    across = torch.arange(112).div(8).long() % 2 * 180 + 30  # stripes with sharp edges, and a slope
    slope = torch.arange(112) * 2
    image = torch.stack([across.expand(112, 112), across.expand(112, 112).T, slope.expand(112, 112)]).byte()
    before, damage = image.clone(), []
    for severity in SEVERITIES:
        found = corrupt(image, kind, severity, "shard/key")
        assert found.dtype == torch.uint8 and found.shape == image.shape
        assert found.equal(corrupt(image, kind, severity, "shard/key"))
        damage.append((found.float() - image.float()).square().mean().item())
    assert image.equal(before)
    assert 0 < damage[0] < damage[2] < damage[4]
    assert corrupt(image, kind, 3, "other").equal(corrupt(image, kind, 3, "shard/key")) == (kind != "noise")


def test_the_gap_of_equal_sets_is_nothing() -> None:
    hits = torch.zeros(400, dtype=torch.float64).index_fill(0, torch.arange(100), 1.0)
    value, low, high = gap(hits, hits)
    assert value == 0 and low < 0 < high
    value, low, _ = gap(torch.ones(400), hits)
    assert value == 0.75 and low > 0.7


def test_the_gap_of_newcombes_example() -> None:
    """Table II of the paper, its first example by method 10: 56 of 70 less 48 of 80 is 0.2, from 0.0524 to 0.3339."""
    sets = [torch.arange(count) < hits for hits, count in ((56, 70), (48, 80))]
    value, low, high = gap(*(hits.double() for hits in sets))
    assert value == pytest.approx(0.2) and (low, high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_a_few_images_that_all_agree_are_not_sure() -> None:
    for hit in (0.0, 1.0):
        part = Part.of(torch.full((3,), hit, dtype=torch.float64))
        assert part is not None and part.value == hit and part.high - part.low > 0.5
        value, low, high = gap(torch.ones(3), torch.full((3,), hit, dtype=torch.float64))
        assert value == 1 - hit and high - low > 0.5 and -1 <= low <= value <= high <= 1
    assert Part.of(torch.zeros(0)) is None
    assert share_interval(torch.ones(4, 3)) == share_interval(torch.ones(3)), "of four draws over the same three images"


def test_quarters_are_by_value() -> None:
    parts = quarters(torch.tensor([0.9, 0.1, 0.5, 0.7, 0.3]))
    assert [part.tolist() for part in parts] == [[1, 4], [2], [3], [0]]


def test_a_sample_for_retrieval_has_as_many_texts() -> None:
    """With fewer texts to choose from, an answer is easier: a sample of as many images would not be comparable."""
    items = [EvalItem(torch.zeros(3, 0, 0), ([f"text {n // 3}"],), "") for n in range(90)]
    held_out = [EvalItem(torch.zeros(3, 0, 0), ([f"other {n // 2}"],), "") for n in range(20)]
    places = Question(None, None).sample(items, held_out, seed=0)  # type: ignore[arg-type]
    assert len({items[place].fields[0][0] for place in places.tolist()}) == 10 and len(places) == 30


def test_probe(tiny_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = str(data / "train"), str(data / "held-out.tar")
    options = Options(classes=data / "classes.json", few=[1, 2], draws=1, plot=tmp_path / "few.png")
    found = probe(str(tiny_model), train, test, options, "cpu", None, True)
    assert json.loads(capsys.readouterr().out) == found
    assert (found["train_images"], found["test_images"], found["classes"]) == (70, 24, 7)
    assert found["dimensions"] == 32 and found["chance"] == pytest.approx(1 / 7), "before the projection"
    assert {1 / 24 * n for n in range(25)} >= {found["linear_probe"]["top1"]}
    assert [shots["shots"] for shots in found["few_shot"]] == [1, 2]
    assert Image.open(tmp_path / "few.png").size == (930, 630)
    options = Options(embedding=True, val=test, k=3)
    found = probe(str(tiny_model), train, test, options, "cpu", 64, False)
    assert found["dimensions"] == 16 and found["knn"]["k"] == 3 and "zeroshot" not in found
    assert found["train_images"] == 94, "images that C was chosen by are trained on in the end"
    assert "linear probe" in capsys.readouterr().out


def test_labels_of_a_table_are_a_column(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(12):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number) if number else b"no image")
    rows = [f"{number}.jpg,{'cat' if number % 2 else 'dog'},{number % 2}" for number in range(12)]
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text("\n".join(["image,species,whole", *rows]))
    train, test = str(tmp_path / "train.csv"), str(tmp_path / "test.csv")
    for key, named in (("species", True), ("whole", False), ("json:whole", False)):
        found = probe(str(tiny_model), train, test, Options(label_key=key, k=1), "cpu", None, False)
        assert (found["classes"], found["train_images"], found["knn"]["top1"]) == (2, 11, 1.0)
        assert found["unusable"] == {"train": 1, "test": 1} and ("zeroshot" in found) == named
        assert "could not be used: 1 of train, 1 of test" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(DataError, match=r"has no column 'kind'; its columns are image, species, whole"):
        probe(str(tiny_model), train, test, Options(label_key="kind"), "cpu", None, False)
    options = Gap(label_key="species", corruptions=False)
    told = generalise(str(tiny_model), train, test, tmp_path / "out", options, "cpu", None, False)
    assert told["question"] == "zeroshot" and told["sets"]["train"]["unusable"] == 1


def test_generalise(tiny_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, held_out = str(data / "train"), str(data / "held-out.tar")
    options = Gap(shifted=[f"again={held_out}"], text_key="json:name", most=10)
    found = generalise(str(tiny_model), train, held_out, tmp_path / "out", options, "cpu", None, True)
    told = capsys.readouterr()
    assert "warning" not in told.err
    assert json.loads(told.out) == found == json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["question"] == "retrieval"
    counts = {name: scores["retrieval/i2t_r1"]["count"] for name, scores in found["scores"].items()}
    assert counts == {"train": 24, "held out": 24, "again": 24}, "names are all different here"
    assert found["scores"]["again"] == found["scores"]["held out"]
    copies = found["contamination"]
    assert (copies["exact"], copies["near"], copies["mirrored"]) == (1, 1, 1)
    assert copies["clean"]["retrieval/i2t_r1"]["count"] == 21
    assert copies["in_training"]["retrieval/i2t_r1"]["count"] == 3
    assert sum(part["scores"]["retrieval/i2t_r5"]["count"] for part in found["by_similarity"]) == 24
    assert {kind: len(levels) for kind, levels in found["corruptions"].items()} == dict.fromkeys(CORRUPTIONS, 6)
    assert found["corruptions"]["blur"][5]["scores"]["retrieval/i2t_r1"]["count"] == 10
    with (tmp_path / "out" / "neighbours.csv").open() as file:
        rows = {row["key"].rpartition("/")[2]: row for row in csv.DictReader(file)}
    assert len(rows) == 24
    assert (rows["000003"]["copy"], rows["000003"]["copy_of"]) == ("exact", "00000.tar/000003")
    assert (rows["000005"]["copy"], rows["000005"]["copy_of"]) == ("near", "00000.tar/000005")
    assert (rows["000006"]["copy"], rows["000006"]["copy_of"]) == ("mirrored", "00000.tar/000006")
    assert rows["000003"]["nearest"] == "00000.tar/000003" and float(rows["000003"]["cosine"]) > 0.9999
    page = (tmp_path / "out" / "report.html").read_text()
    assert (
        page.count('alt="training"') == 3 + 12
        and "<script" not in page
        and "http:" not in page
        and "https:" not in page
    )


def test_generalise_by_classes(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    options = Gap(classes=data / "classes.json", corruptions=False)
    held_out = str(data / "held-out.tar")
    found = generalise(str(tiny_model), str(data / "train"), held_out, tmp_path, options, "cpu", None, False)
    assert found["corruptions"] == {} and found["chance"]["train"]["zeroshot/top1"] == pytest.approx(1 / 7)
    assert found["scores"]["train"]["zeroshot/top1"]["count"] == 24


def test_fewer_training_texts_are_told(
    tiny_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = Gap(text_key="json:name", corruptions=False, shifted=["[/x]=" + str(data / "held-out.tar")])
    train, held_out = str(data / "held-out.tar"), str(data / "train")
    generalise(str(tiny_model), train, held_out, tmp_path, options, "cpu", None, False)
    told = capsys.readouterr()
    assert "warning: --train has 24 texts and --held-out 70" in told.err and "[/x]" in told.out


def test_what_is_wrong_is_one_line(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    model, train, test = str(tiny_model), str(data / "train"), str(data / "held-out.tar")
    with pytest.raises(ConfigError, match="--shots 1;2: give numbers"):
        _numbers("1;2")
    with pytest.raises(ConfigError, match="--shots, --draws and --k"):
        probe(model, train, test, Options(few=[0]), "cpu", None, False)
    with pytest.raises(ConfigError, match="say how many shots"):
        probe(model, train, test, Options(plot=tmp_path / "few.png"), "cpu", None, False)
    (tmp_path / "two.txt").write_text("cat\ndog\n")
    with pytest.raises(
        DataError, match="labels of the train set run from 0 to 6, and there are 2 class names; --classes"
    ):
        probe(model, train, test, Options(classes=tmp_path / "two.txt"), "cpu", None, False)
    with pytest.raises(ConfigError, match="--shifted sketches: give NAME=DATASET"):
        generalise(model, train, test, tmp_path, Gap(shifted=["sketches"]), "cpu", None, False)
    for name in ("train", "held out", "again"):
        with pytest.raises(ConfigError, match=f"--shifted {name}=…: another set has this name"):
            generalise(model, train, test, tmp_path, Gap(shifted=[f"{name}=x", "again=y"]), "cpu", None, False)
    with pytest.raises(ConfigError, match=r"two\.txt is no directory"):
        generalise(model, train, test, tmp_path / "two.txt", Gap(), "cpu", None, False)
    with pytest.raises(DataError, match=r"train: none of 70 .* no_title; check --text-key"):
        generalise(model, train, test, tmp_path, Gap(text_key="json:title"), "cpu", None, False)
    with pytest.raises(DataError, match=r"--shots 16: class '0' has 10 training images"):
        probe(model, train, test, Options(few=[1, 16]), "cpu", None, False)
    with pytest.raises(DataError, match=r"train: none of 70 .* no_kind; check --label-key"):
        probe(model, train, test, Options(label_key="json:kind"), "cpu", None, False)


def test_a_folder_of_fewer_classes_is_not_taken_for_the_others(tiny_model: Path, tmp_path: Path) -> None:
    """Labels of folders are places among their names: with a folder less, all behind it would mean another class."""
    for place, names in (("train", "abc"), ("test", "bc")):
        for number, name in enumerate(names * 2):
            (tmp_path / place / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / place / name / f"{number}.jpg").write_bytes(jpeg(number))
    train, test, file = str(tmp_path / "train"), str(tmp_path / "test"), tmp_path / "classes.txt"
    file.write_text("a\nb\nc\n")
    with pytest.raises(DataError, match=r"different classes \(a\)"):
        probe(str(tiny_model), train, test, Options(classes=file), "cpu", None, False)
    for wrong in ("b\na\nc\n", "a\nb\n"):
        file.write_text(wrong)
        with pytest.raises(DataError, match="are not those of the data in their order"):
            probe(str(tiny_model), train, train, Options(classes=file), "cpu", None, False)


def test_labels_without_names_are_those_that_occur(tiny_model: Path, tmp_path: Path) -> None:
    """They may begin at 1 and have holes: no class stands for a number that nobody has."""
    labels = [1, 7, 1000000]
    for name, first in (("train", 0), ("test", 30)):
        members = [
            (f"{n:03d}", sample(n) | {"json": json.dumps({"label": labels[n % 3]}).encode()})
            for n in range(first, first + 30)
        ]
        write_shard(tmp_path / f"{name}.tar", members)
    train, test = str(tmp_path / "train.tar"), str(tmp_path / "test.tar")
    found = probe(str(tiny_model), train, test, Options(k=1), "cpu", None, False)
    assert found["classes"] == 3 and found["chance"] == pytest.approx(1 / 3)


def test_images_that_were_trained_on_are_told(tiny_model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = str(data / "train"), str(data / "held-out.tar")
    found = probe(str(tiny_model), train, test, Options(val=test, k=1), "cpu", None, True)
    assert found["seen_in_training"] == {"val": 1, "test": 24}
    told = " ".join(capsys.readouterr().err.split())
    assert "warning: 1 of 24 images of --val are in --train too" in told
    assert "warning: 24 of 24 images of --test are in --train or --val too" in told
