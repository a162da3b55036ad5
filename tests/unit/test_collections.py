"""What a name of a data set opens, and what its samples are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from clipscale.data.collections import Collection, listed_captions, open_collection
from clipscale.data.labels import places_among
from clipscale.errors import ConfigError, DataError
from tests.shards import jpeg, sample, write_shard, write_shards


def keys(found: Collection) -> list[str]:
    return [one.key for one in found.read(0, len(found))]


def labels(found: Collection) -> list[str]:
    return [one.members["cls"].decode() for one in found.read(0, len(found))]


def fill(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    return root


@pytest.mark.parametrize("where", ["", "{00000..00001}.tar", "00000.tar::00001.tar"])
def test_shards(where: str, tmp_path: Path) -> None:
    write_shards(tmp_path, [3, 2])
    found = open_collection("::".join(f"{tmp_path}/{name}" for name in where.split("::")))
    assert keys(found) == [f"00000.tar/{n:06d}" for n in range(3)] + [f"00001.tar/{n:06d}" for n in (3, 4)]
    assert [one.key for one in found.read(2, 4)] == ["00000.tar/000002", "00001.tar/000003"]
    assert [one.members["jpg"] for one in found.read(4, 99)] == [jpeg(4)]


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    """CLIP_benchmark's layout."""
    for split, counts in {"test": [2, 1], "train": [4]}.items():
        (tmp_path / split).mkdir()
        for number, count in enumerate(counts):
            samples = [(f"s{n}", {"webp": jpeg(n), "cls": str(n % 2).encode()}) for n in range(count)]
            write_shard(tmp_path / split / f"{number}.tar", samples)
        (tmp_path / split / "nshards.txt").write_text(f"{len(counts)}\n")
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    return tmp_path


def test_a_directory_of_clip_benchmark(benchmark: Path) -> None:
    found = open_collection(str(benchmark))
    assert len(found) == 3 and len(open_collection(str(benchmark), split="train")) == 4
    assert labels(found) == ["0", "1", "0"]
    assert found.about.classes == ("cat", "dog") and found.about.templates == ("a photo of a {}.",)
    (benchmark / "dataset_type.txt").write_text("retrieval\n")
    assert open_collection(str(benchmark)).about.kind == "retrieval"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "test/nshards.txt").unlink(), "test has no nshards.txt, which says how many"),
        (lambda root: (root / "test/nshards.txt").write_text("3"), "2.tar does not exist, and nshards.txt .* 3 shards"),
        (lambda root: (root / "test/nshards.txt").write_text("no"), "says 'no', no number of shards"),
        (lambda root: (root / "test").rename(root / "val"), "has no split 'test'; it has train"),
    ],
)
def test_a_split_that_is_not_whole_is_an_error(benchmark: Path, change: object, message: str) -> None:
    change(benchmark)  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        open_collection(str(benchmark))


def test_folders(tmp_path: Path) -> None:
    root = fill(tmp_path, "sea_lion/b.PNG", "cat/deep/a.jpg", "cat/z.webp", ".hidden/x.jpg", "cat/notes.md")
    (root / "cat/z.txt").write_text("a cat\na black cat\n")
    found = open_collection(str(root))
    assert keys(found) == ["cat/deep/a.jpg", "cat/z.webp", "sea_lion/b.PNG"] and labels(found) == ["0", "0", "1"]
    assert found.about.classes == ("cat", "sea lion")
    (one,) = found.read(1, 2)
    assert listed_captions(one) == ["a cat", "a black cat"] and one.members["webp"] == one.members["jpg"]
    fill(root, "flat.jpg")
    assert open_collection(str(root)).about.classes == ()


def test_clips(tmp_path: Path) -> None:
    root = fill(tmp_path, "run/one/0.jpg", "run/one/1.jpg", "sit/two/0.jpg")
    found = open_collection(str(root), clips=True)
    assert [one.members["clip"].decode() for one in found.read(0, 3)] == ["run/one", "run/one", "sit/two"]
    assert found.about.classes == ("run", "sit")
    (root / "run/one.txt").write_text("somebody runs")
    assert [listed_captions(one) for one in found.read(1, 3)] == [["somebody runs"], []]
    assert open_collection(str(root / "run"), clips=True).about.classes == ()
    with pytest.raises(DataError, match="is in no clip"):
        open_collection(str(root / "run/one"), clips=True)


def test_tables(tmp_path: Path) -> None:
    fill(tmp_path, "images/0.jpg", "images/1.jpg")
    table = tmp_path / "set.tsv"
    table.write_text(
        "file\tone\ttwo\tkind\nimages/0.jpg\ta  b\t\tdog\nimages/1.jpg\tc\td\tcat\n"
        "images/0.jpg\te\tf\tdog\nno\tg\th\t\n"
    )
    options = dict(image_column="file", caption_columns=["one", "two"], label_column="kind")
    found = open_collection(str(table), **options)  # type: ignore[arg-type]
    members = list(found.read(0, 9))
    assert [one.key for one in members] == [f"set.tsv/{n}" for n in range(4)]
    assert [listed_captions(one) for one in members] == [["a b"], ["c", "d"], ["e", "f"], ["g", "h"]]
    assert found.about.classes == ("cat", "dog") and [m.members.get("cls") for m in members] == [b"1", b"0", b"1", None]
    assert members[3].problem == "missing_image" and json.loads(members[1].members["json"])["two"] == "d"
    merged = open_collection(str(table), one_per_image=True, **options)  # type: ignore[arg-type]
    assert keys(merged) == ["set.tsv/0", "set.tsv/1", "set.tsv/3"]
    assert listed_captions(next(merged.read(0, 1))) == ["a b", "e", "f"]
    with pytest.raises(DataError, match="no column of image paths; its columns are file, one, two, kind"):
        open_collection(str(table))
    with pytest.raises(DataError, match="no column 'three'"):
        open_collection(str(table), image_column="file", caption_columns=["three"])


def test_numbers_are_labels_as_they_are(tmp_path: Path) -> None:
    fill(tmp_path, "0.jpg")
    (tmp_path / "set.csv").write_text("image,label\n0.jpg,7\n0.jpg,03\n")
    found = open_collection(str(tmp_path / "set.csv"))
    assert labels(found) == ["7", "3"] and found.about.classes == ()


def test_numbers_with_a_point_are_labels_too(tmp_path: Path) -> None:
    """As pandas writes a column of whole numbers that has gaps: as names, 10.0 would come before 2.0."""
    fill(tmp_path, "0.jpg")
    (tmp_path / "set.csv").write_text(
        "image,label\n" + "".join(f"0.jpg,{n}\n" for n in ("10.0", "2.0", "", "nan", "-1"))
    )
    found = open_collection(str(tmp_path / "set.csv"))
    assert [one.members.get("cls") for one in found.read(0, 9)] == [b"10", b"2", None, None, None]
    assert found.about.classes == () and not found.about.by_name
    (tmp_path / "set.csv").write_text("image,label\n0.jpg,2.5\n0.jpg,10\n")
    assert open_collection(str(tmp_path / "set.csv")).about.classes == ("10", "2.5")


def test_names_are_found_in_a_list_of_classes() -> None:
    own = ("Big_dog", "cat")
    assert places_among(["cat", "emu", "big dog"], own, "f") == [2, 0]
    assert places_among(["tench", "goldfish"], ("n01440764", "n01443537"), "f") == [0, 1]
    assert places_among(["big dog", "a cat"], own, "f") == [0, 1]
    for listed in (["cat", "a big dog"], ["big dog"], ["dog", "goldfish", "emu"]):
        with pytest.raises(ConfigError, match="is none of its"):
            places_among(listed, own, "f")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nowhere", "does not exist; name shards"),
        ("one.jpg", "is a file of another kind; name shards"),
        ("empty", "holds no images"),
        ("{0..3}.tar", "4 of 4 shards do not exist, first .*0.tar$"),
        ("gone.csv", "cannot be read: No such file"),
        ("blank.csv", "holds no row"),
    ],
)
def test_what_is_not_there_is_one_line(where: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    fill(tmp_path, "one.jpg")
    (tmp_path / "blank.csv").write_text("image,label\n")
    with pytest.raises(DataError, match=message) as caught:
        open_collection(f"{tmp_path}/{where}")
    assert "\n" not in str(caught.value)


def test_what_a_folder_lost_is_said(tmp_path: Path) -> None:
    found = open_collection(str(fill(tmp_path, "a.jpg")))
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(DataError, match="it was there when this began"):
        list(found.read(0, 1))


def test_links_that_lead_nowhere_are_samples_that_cannot_be_used(tmp_path: Path) -> None:
    fill(tmp_path, "a.jpg", "c.jpg")
    (tmp_path / "b.jpg").symlink_to("gone.jpg")
    (tmp_path / "b.txt").write_text("a caption")
    (tmp_path / "itself.png").symlink_to("itself.png")
    found = list(open_collection(str(tmp_path)).read(0, 9))
    assert [(one.key, one.problem) for one in found] == [
        ("a.jpg", ""), ("b.jpg", "missing_image"), ("c.jpg", ""), ("itself.png", "missing_image"),
    ]  # fmt: skip
    assert found[1].members == {"txt": b"a caption"}
    assert open_collection(str(tmp_path)).identity == open_collection(str(tmp_path)).identity


def test_links_to_folders_are_followed_but_not_round_in_circles(tmp_path: Path) -> None:
    fill(tmp_path, "elsewhere/1.jpg", "set/dog/2.jpg")
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "set")
    found = open_collection(str(tmp_path / "set"))
    assert keys(found) == ["cat/1.jpg", "dog/2.jpg"] and labels(found) == ["0", "1"]


def test_what_may_not_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a user who may not: these tests may run as one who may read all."""
    root = fill(tmp_path, "a.jpg", "b.jpg", "own/c.jpg")
    read, scan = Path.read_bytes, os.scandir

    def refuse(done: Any, closed: str) -> Any:
        def do(path: Any) -> Any:
            if str(path).endswith(closed):
                raise PermissionError(13, "Permission denied")
            return done(path)

        return do

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse(read, "b.jpg"))
        assert [one.problem for one in open_collection(str(root)).read(0, 3)] == ["", "unreadable_image", ""]
    monkeypatch.setattr(os, "scandir", refuse(scan, "own"))
    with pytest.raises(DataError, match=r"own cannot be read: Permission denied; what lies in it would be left out"):
        open_collection(str(root))


@pytest.mark.parametrize(("shard", "image"), [("0.tar", "a.jpg"), ("0.tar", "cat/a.jpg"), ("deep/0.tgz", "a.jpg")])
def test_shards_among_images_are_refused(shard: str, image: str, tmp_path: Path) -> None:
    (tmp_path / shard).parent.mkdir(exist_ok=True)
    write_shard(tmp_path / shard, [("s", {"jpg": jpeg(0)})])
    fill(tmp_path, image)
    with pytest.raises(DataError, match=rf"holds shards \({shard}\) and images \({image}\), of which only one"):
        open_collection(str(tmp_path))
    (tmp_path / image).unlink()
    if "/" in shard:
        with pytest.raises(DataError, match=r"holds shards in folders, deep/0\.tgz among them; name the folder"):
            open_collection(str(tmp_path))
    else:
        assert len(open_collection(str(tmp_path))) == 1


def test_a_sample_is_what_training_reads(tmp_path: Path) -> None:
    write_shards(tmp_path, [1])
    (one,) = open_collection(str(tmp_path)).read(0, 1)
    assert one.members == sample(0)
