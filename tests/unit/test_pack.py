"""Packing: every kind of source, exact bytes, splits that keep groups together, and mistakes told in one line."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from braceexpand import braceexpand
from PIL import Image

from clipscale.apps.data.account import brace_pattern
from clipscale.apps.data.cli import data_app
from clipscale.apps.data.pack import pack
from clipscale.apps.data.packing import fill
from clipscale.apps.data.splits import assign, check_apart, connect, parse_split
from clipscale.cli import _is_override
from clipscale.config import compose
from clipscale.data.manifest import expand_shards
from clipscale.data.order import SampleOrder
from clipscale.data.samples import decode_image
from clipscale.errors import ClipscaleError, ConfigError, DataError
from tests.shards import STORE, jpeg

ROOT = Path(__file__).parents[2]
DEFAULTS: dict[str, Any] = dict(
    images=None, image_column=None, caption_column=None, caption_template=None, split="1", group_by=None, size=0,
    quality=95, window=None, shard_samples=10, seed=0, jobs=1, ray=False,
)  # fmt: skip
Packed = dict[str, dict[str, dict[str, bytes]]]


def run(source: Path, output: Path, **options: Any) -> Packed:
    pack(source, output, **DEFAULTS | options)
    return packed(output)


def packed(output: Path) -> Packed:
    """Members by suffix, by sample key, by shard."""
    found: Packed = {}
    for path in sorted(output.glob("*.tar")):
        shard = found.setdefault(path.name, {})
        with tarfile.open(path) as archive:
            for member in archive:
                key, _, suffix = member.name.partition(".")
                data = archive.extractfile(member)
                assert data is not None
                shard.setdefault(key, {})[suffix] = data.read()
    return found


def samples(found: Packed) -> dict[str, dict[str, bytes]]:
    return {key: members for shard in found.values() for key, members in shard.items()}


def fields(found: Packed) -> dict[str, dict[str, Any]]:
    return {key: json.loads(members["json"]) for key, members in sorted(samples(found).items())}


def pictures(folder: Path, count: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number:03d}.jpg").write_bytes(jpeg(number))
    return [f"{number:03d}.jpg" for number in range(count)]


def table(path: Path, rows: list[dict[str, Any]], delimiter: str = ",", encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def skipped(output: Path) -> list[dict[str, str]]:
    with (output / "skipped.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Thirty images, the captions of each in two rows of a table, and a label."""
    names = pictures(tmp_path / "in", 30)
    rows = [
        {"filepath": name, "caption": f"{kind} {number}, ünï", "label": number % 4, "patient": f"p{number // 3}"}
        for kind in ("first", "second")
        for number, name in enumerate(names)
    ]
    return table(tmp_path / "in" / "captions.csv", rows)


ROWS = [
    {"image": "000.jpg", "caption": 'a "cat", sitting', "n": 1},
    {"image": "001.jpg", "caption": "ein Hünd", "n": 2},
]


def write_rows(folder: Path, form: str) -> Path:
    path = folder / form.replace(" ", ".")
    if form.startswith("parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(ROWS), path := folder / "rows.parquet")
    elif form == "jsonl":
        path = folder / "rows.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n\n" for row in ROWS))
    elif form == "json":
        path = folder / "rows.json"
        path.write_text(json.dumps(ROWS))
    elif form == "coco":
        path = folder / "captions_train.json"
        images = [{"id": 7 + i, "file_name": row["image"], "n": row["n"]} for i, row in enumerate(ROWS)]
        captions = [{"image_id": 7 + i, "id": i, "caption": row["caption"]} for i, row in enumerate(ROWS)]
        path.write_text(json.dumps({"images": images, "annotations": captions}))
    else:
        suffix, mark, encoding = form.split()
        path = table(folder / f"rows.{suffix}", ROWS, {"tab": "\t"}.get(mark, mark), encoding)
    return path


@pytest.mark.parametrize(
    "form",
    ["csv , utf-8", "csv ; utf-8-sig", "csv tab utf-16", "tsv tab utf-8", "jsonl", "json", "coco", "parquet"],
)
def test_every_kind_of_table(tmp_path: Path, form: str) -> None:
    pictures(tmp_path / "in", 2)
    found = run(write_rows(tmp_path / "in", form), tmp_path / "out")
    assert [each["captions"] for each in fields(found).values()] == [[ROWS[0]["caption"]], [ROWS[1]["caption"]]]
    assert [int(each["n"]) for each in fields(found).values()] == [1, 2]
    assert [members["jpg"] for _, members in sorted(samples(found).items())] == [jpeg(0), jpeg(1)]
    assert samples(found)["000000001"]["txt"].decode() == "ein Hünd"


def test_a_folder_of_images_and_texts(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "deep"
    pictures(folder, 5)
    for number in range(4):
        (folder / f"{number:03d}.txt").write_text(f"text {number}\n")
    (folder / "001.json").write_text('{"captions": ["text 1", "another"], "score": 3}')
    (folder / "002.json").write_text("{")
    (folder / "003.txt").write_bytes("é".encode("latin-1"))
    (folder / "._000.jpg").write_bytes(b"what a Mac leaves behind")
    found = fields(run(tmp_path / "in", tmp_path / "out"))
    assert [each["captions"] for each in found.values()] == [["text 0"], ["text 1", "another"]]
    assert found["000000001"] == {"filepath": "deep/001.jpg", "score": 3, "captions": ["text 1", "another"]}
    assert {row["path"]: row["reason"] for row in skipped(tmp_path / "out")} == {
        "deep/002.jpg": "bad_json", "deep/003.jpg": "bad_text_encoding", "deep/004.jpg": "empty_caption",
    }  # fmt: skip


def test_a_folder_with_one_table(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = fields(run(source.parent, tmp_path / "out"))
    assert "captions.csv: 60 rows; images of column filepath, captions of column caption" in capsys.readouterr().out
    assert len(found) == 30, "rows of one image are one sample"
    assert found["000000007"] == {
        "filepath": "007.jpg", "label": "3", "patient": "p2", "captions": ["first 7, ünï", "second 7, ünï"],
    }  # fmt: skip


def test_columns_in_which_the_rows_of_an_image_differ_are_lists(tmp_path: Path) -> None:
    pictures(tmp_path, 1)
    rows = [{"image": "000.jpg", "caption": "a", "by": "x"}, {"image": "./000.jpg", "caption": "b", "by": "y"}]
    (found,) = fields(run(table(tmp_path / "t.csv", rows), tmp_path / "out")).values()
    assert found["captions"] == ["a", "b"] and found["by"] == ["x", "y"]


def test_shards_that_are_there_already(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As img2dataset leaves them, one of them not done and one missing."""
    run(source, tmp_path / "made", shard_samples=30)
    there = tmp_path / "fetched set"
    there.mkdir()
    for number in (0, 1, 3):
        (there / f"{number:05d}.tar").write_bytes((tmp_path / "made" / "train-000000.tar").read_bytes())
    for number in (0, 1):
        (there / f"{number:05d}_stats.json").write_text('{"successes": 30}')
        (there / f"{number:05d}.parquet").touch()
    capsys.readouterr()
    pack(there, tmp_path / "out", **DEFAULTS)
    told = capsys.readouterr().out
    assert "holds 3 shards already" in told and "1 of them have no _stats.json yet, first 00003.tar" in told
    assert not (tmp_path / "out").exists()
    assert named(told) == ["00000.tar", "00001.tar", "00003.tar"]


def named(told: str) -> list[str]:
    """The training shards that the printed command finds, taken apart by a shell."""
    (line,) = (line for line in told.splitlines() if "clipscale train" in line)
    code = "import sys, json; print(json.dumps(sys.argv[1:]))"
    typed = line.replace("clipscale", f"{sys.executable} -c '{code}'", 1)
    words = json.loads(subprocess.run(typed, shell=True, capture_output=True, text=True, check=True).stdout)
    assert words[0] == "train" and all(_is_override(word) for word in words[1:])
    config, _ = compose(words[1:])
    assert config.data.builtin.value == "none"
    for key, shards in (("data.train.shards", config.data.train.shards), ("data.val.shards", config.data.val.shards)):
        files = [file.name for file in expand_shards(shards, config.data.root, key, STORE)] if shards else []
        if key == "data.train.shards":
            found = files
    return found


def test_the_next_command_names_what_is_there(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "it's here, (yes)"
    run(source, output, split="0.8/0.2", shard_samples=7)
    told = capsys.readouterr().out
    assert named(told) == [path.name for path in sorted(output.glob("train-*.tar"))] and "val-000000.tar" in told
    assert "data.caption_key=json:captions" in told


def test_no_training_is_told_of_where_there_is_nothing_to_train_on(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(source, tmp_path / "out", split="0/1")
    told = capsys.readouterr().out
    assert "clipscale data index" in told and "clipscale train" not in told


def test_the_first_node_alone_tells(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        run(source, tmp_path / "out")
        assert ("next:" in capsys.readouterr().out) == (rank == "0")


def test_shards_from_elsewhere_are_not_written_over(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "train-000007.tar").write_bytes(b"theirs")
    with pytest.raises(ConfigError, match="holds shards that this command did not write"):
        run(source, output)
    assert [path.name for path in output.iterdir()] == ["train-000007.tar"]


def test_a_shard_that_is_gone_is_told(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(source, tmp_path / "out")
    (tmp_path / "out" / "train-000001.tar").unlink()
    capsys.readouterr()
    with pytest.raises(DataError, match=r"1 of \d shards that were written are gone, first .*/train-000001.tar"):
        run(source, tmp_path / "out")
    assert "next:" not in capsys.readouterr().out


def test_the_same_source_makes_the_same_bytes(source: Path, tmp_path: Path) -> None:
    made = {}
    for name, options in {"one": {}, "two": {"jobs": 2}, "other": {"seed": 1}}.items():
        run(source, tmp_path / name, split="0.8/0.1/0.1", size=8, **options)
        made[name] = {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.tar")}
    assert made["one"] == made["two"]
    assert set(made["one"]) == {"train-000000.tar", "train-000001.tar", "train-000002.tar", "val-000000.tar",
                                "test-000000.tar"}  # fmt: skip
    assert made["one"] != made["other"]


def test_the_order_is_shuffled_and_nothing_is_lost(source: Path, tmp_path: Path) -> None:
    found = run(source, tmp_path / "out")
    keys = [key for shard in found.values() for key in shard]
    assert sorted(keys) == [f"{number:09d}" for number in range(30)] and keys != sorted(keys)
    assert [len(shard) for shard in found.values()] == [10, 10, 10]


def command(source: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "clipscale.cli", "data", "pack", str(source), str(output), *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_in_the_middle_it_goes_on(tmp_path: Path, how: signal.Signals) -> None:
    names = pictures(tmp_path / "in", 400)
    source = table(tmp_path / "in" / "t.csv", [{"image": name, "caption": name} for name in names])
    options = ["--shard-samples", "4", "--split", "0.9/0.1", "-j", "2"]
    process = command(source, tmp_path / "out", *options)
    done = tmp_path / "out" / ".clipscale" / "pack" / "pack"
    deadline = time.monotonic() + 120
    while len(list(done.glob("*.json"))) < 5:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, how)
    _, told = process.communicate(timeout=60)
    assert process.returncode in (-9, 130) and "Traceback" not in told, told
    before = {path.name: path.stat().st_mtime_ns for path in done.glob("*.json")}
    assert 5 <= len(before) < 100
    if how is signal.SIGINT:
        assert {name.removesuffix(".json") for name in before} == {p.name for p in (tmp_path / "out").glob("*.tar")}
        assert not list((tmp_path / "out").glob(".*.tmp"))
    else:  # as a worker killed in the middle of a shard leaves it
        name = f".train-000000.tar.{socket.gethostname()}.{process.pid}.tmp"
        (tmp_path / "out" / name).write_bytes(b"half")
    process = command(source, tmp_path / "out", *options)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert all((done / name).stat().st_mtime_ns == when for name, when in before.items()), "done once"
    run(source, tmp_path / "whole", split="0.9/0.1", shard_samples=4)
    assert packed(tmp_path / "out") == packed(tmp_path / "whole")
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_splits_keep_groups_and_equal_files_together(tmp_path: Path) -> None:
    """Some patients have one image under another name as well; these count as one group."""
    names = pictures(tmp_path, 200)
    (tmp_path / "copy.jpg").write_bytes(jpeg(0))
    rows = [{"image": name, "caption": name, "patient": f"p{number // 4}"} for number, name in enumerate(names)]
    rows.append({"image": "copy.jpg", "caption": "again", "patient": "p49"})
    source = table(tmp_path / "t.csv", rows)
    found = run(source, tmp_path / "out", split="0.7/0.2/0.1", group_by="patient", shard_samples=1000)
    patients = {name: {json.loads(m["json"])["patient"] for m in shard.values()} for name, shard in found.items()}
    train, val, test = (patients[f"{name}-000000.tar"] for name in ("train", "val", "test"))
    assert not train & val and not train & test and not val & test
    assert len(train | val | test) == 50
    assert any({"p0", "p49"} <= each for each in patients.values())
    counts = [len(found[f"{name}-000000.tar"]) for name in ("train", "val", "test")]
    assert np.allclose(np.array(counts) / 201, [0.7, 0.2, 0.1], atol=0.03)


def test_equal_files_are_not_parted_without_groups(tmp_path: Path) -> None:
    pictures(tmp_path, 20)
    rows = []
    for number in range(100):
        (tmp_path / f"copy{number}.jpg").write_bytes(jpeg(number % 20))
        rows.append({"image": f"copy{number}.jpg", "caption": f"c{number}"})
    found = run(table(tmp_path / "t.csv", rows), tmp_path / "out", split="0.5/0.5", shard_samples=1000)
    train, val = ({m["jpg"] for m in found[f"{name}-000000.tar"].values()} for name in ("train", "val"))
    assert not train & val and len(train | val) == 20


def test_groups_are_connected_through_others() -> None:
    assert connect([["a"], ["b"], ["c"], ["b", "a"], [], ["c", "d"], ["d"]]).tolist() == [0, 0, 2, 0, 4, 2, 2]


@pytest.mark.parametrize("seed", range(5))
def test_shares_are_met_as_well_as_groups_allow(seed: int) -> None:
    sizes = np.random.default_rng(seed).geometric(0.2, 400)
    groups = np.repeat(np.arange(400), sizes)
    splits = assign(groups, {"train": 0.9, "val": 0.05, "test": 0.05}, seed)
    assert all(len(set(splits[groups == group])) == 1 for group in range(400))
    assert np.abs(np.bincount(splits) / len(groups) - [0.9, 0.05, 0.05]).max() < sizes.max() / len(groups)
    alone = assign(np.arange(1000), {"train": 0.9, "val": 0.05, "test": 0.05}, seed)
    assert np.bincount(alone).tolist() == [900, 50, 50]


def test_a_group_in_two_splits_is_an_error() -> None:
    check_apart({"train": [1, 2], "val": [3]}, "values")
    with pytest.raises(DataError, match=r"1 values are in both train and val"):
        check_apart({"train": [1, 2], "val": [2, 2]}, "values")


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def one(tmp_path: Path, name: str, data: bytes, **options: Any) -> tuple[str, Image.Image, bytes]:
    """Pack one image: its suffix, the image and the bytes."""
    (tmp_path / name).write_bytes(data)
    source = table(tmp_path / "t.csv", [{"image": name, "caption": "it"}])
    (members,) = samples(run(source, tmp_path / "out", **options)).values()
    (suffix,) = set(members) - {"txt", "json"}
    return suffix, Image.open(io.BytesIO(members[suffix])), members[suffix]


GRADIENT = np.add.outer(np.arange(60) * 2, np.arange(80) * 1).astype(np.uint8)
PHOTO = Image.fromarray(np.stack([GRADIENT, GRADIENT[::-1], 255 - GRADIENT], -1))
DEEP = GRADIENT.astype(np.uint16) * 10 + 500  # as of a 12-bit detector: 500 to 2,470


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jpg", encoded(PHOTO, "JPEG")),
        ("a.PNG", encoded(PHOTO)),
        ("wrongly-named.jpg", encoded(PHOTO)),
        ("a.webp", encoded(PHOTO, "WEBP")),
    ],
)
@pytest.mark.parametrize("size", [0, 60, 500])
def test_what_need_not_change_is_kept(tmp_path: Path, name: str, data: bytes, size: int) -> None:
    suffix, image, kept = one(tmp_path, name, data, size=size)
    assert kept == data and suffix == {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[image.format or ""]


def test_photos_are_shrunk_to_jpegs_the_right_way_up(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    suffix, image, data = one(tmp_path, "a.jpg", encoded(PHOTO, "JPEG", quality=98, exif=exif), size=30)
    assert suffix == "jpg" and image.size == (30, 40) and not image.getexif()
    expected = PHOTO.transpose(Image.Transpose.ROTATE_270).resize((30, 40), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(image, float) - np.asarray(expected, float)).mean() < 3
    (tmp_path / "coarse").mkdir()
    assert len(one(tmp_path / "coarse", "a.jpg", encoded(PHOTO, "JPEG"), size=30, quality=40)[2]) < len(data)


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "1"])
def test_drawings_stay_lossless(tmp_path: Path, mode: str) -> None:
    image = PHOTO.convert("L" if mode == "1" else "RGB").convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(GRADIENT))
    suffix, small, _ = one(tmp_path, "a.png", encoded(image), size=30)
    assert suffix == "png" and small.size == (40, 30) and small.mode == ("RGBA" if mode in ("RGBA", "LA") else "RGB")


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("size", [0, 30])
def test_sixteen_bits_are_scaled_and_never_clipped(tmp_path: Path, form: str, size: int) -> None:
    name = f"a.{form.lower()}"
    suffix, image, data = one(tmp_path, name, encoded(Image.fromarray(DEEP), form), size=size)
    own = (DEEP - 500.0) * 255 / (DEEP.max() - 500.0)
    assert image.mode == "L" and suffix == ("jpg" if size else "png")
    if not size:
        assert np.abs(np.asarray(image, float) - own).max() <= 0.5
    assert abs(np.asarray(image, float).mean() - own.mean()) < 2
    assert decode_image(data, 10**6).float().std() > 30, "training sees it"


def test_the_window_of_sixteen_bits(tmp_path: Path) -> None:
    _, image, _ = one(tmp_path, "a.png", encoded(Image.fromarray(DEEP)), window="1000/2000")
    expected = ((DEEP.astype(float) - 1000) * 255 / 1000).clip(0, 255)
    assert np.abs(np.asarray(image, float) - expected).max() <= 0.5


@pytest.mark.parametrize("value", [0, 700])
def test_flat_sixteen_bits_are_black(tmp_path: Path, value: int) -> None:
    _, image, _ = one(tmp_path, "a.png", encoded(Image.fromarray(np.full((8, 8), value, np.uint16))))
    assert np.asarray(image).max() == 0


@pytest.mark.parametrize(("name", "form"), [("a.bmp", "BMP"), ("a.tif", "TIFF"), ("a.gif", "GIF")])
def test_other_formats_become_png(tmp_path: Path, name: str, form: str) -> None:
    image = PHOTO.quantize(64) if form == "GIF" else PHOTO
    suffix, kept, _ = one(tmp_path, name, encoded(image, form))
    assert suffix == "png" and np.array_equal(np.asarray(kept.convert("RGB")), np.asarray(image.convert("RGB")))


def test_what_cannot_be_packed_is_counted_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(tmp_path, 4)
    (tmp_path / "bomb.png").write_bytes(encoded(Image.new("1", (12000, 12000))))
    (tmp_path / "html.jpg").write_bytes(b"<html>")
    (tmp_path / "cut.jpg").write_bytes(jpeg(5, 64)[:-200])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "dir.jpg").mkdir()
    bad = {"bomb.png": "too_many_pixels", "html.jpg": "undecodable_image", "cut.jpg": "undecodable_image",
           "empty.jpg": "empty_image", "gone.jpg": "missing_image", "dir.jpg": "unreadable_image",
           "": "no_image_path"}  # fmt: skip
    rows = [{"image": name, "caption": "it"} for name in (*bad, "000.jpg", "001.jpg")]
    rows += [{"image": "002.jpg", "caption": " "}]
    found = run(table(tmp_path / "t.csv", rows), tmp_path / "out", split="0.5/0.5")
    assert len(samples(found)) == 2
    listed = skipped(tmp_path / "out")
    assert {row["path"]: row["reason"] for row in listed} == bad | {"002.jpg": "empty_caption"}
    assert [int(row["row"]) for row in listed] == [1, 2, 3, 4, 5, 6, 7, 10]
    assert "skipped 8" in capsys.readouterr().out
    assert Counter(row["reason"] for row in listed)["undecodable_image"] == 2


def test_the_template() -> None:
    row = {"findings": " Clear  lungs. ", "impression": None, "age": 40}
    assert fill("{findings} {impression}", row) == "Clear lungs."
    assert fill("Age {age}: {findings}", row) == "Age 40: Clear lungs."
    assert fill("Impression: {impression}", row) == "", "words around nothing are no caption"


def test_captions_by_template(source: Path, tmp_path: Path) -> None:
    found = fields(run(source, tmp_path / "out", caption_template="{patient}: {caption}"))
    assert found["000000000"]["captions"] == ["p0: first 0, ünï", "p0: second 0, ünï"]
    assert found["000000000"]["caption"] == ["first 0, ünï", "second 0, ünï"]


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"split": "0.9/0.2"}, r"--split 0.9/0.2: give up to three shares"),
    ({"split": "0.9/x"}, r"--split 0.9/x"),
    ({"split": "nan"}, r"--split nan"),
    ({"split": "0.25/0.25/0.25/0.25"}, r"up to three"),
    ({"split": "0.99/0.01", "group_by": "label"}, r"val would be empty, with only 4 groups"),
    ({"group_by": "patient"}, r"--group-by patient is for more than one split"),
    ({"split": "0.5/0.5", "group_by": "ward"}, r"no column 'ward'; it has filepath, caption, label, patient"),
    ({"caption_template": "{caption} {nope}"}, r"no column 'nope'; it has filepath, caption, label, patient"),
    ({"caption_template": "caption"}, r"name columns in braces"),
    ({"caption_template": "{caption"}, r"--caption-template '{caption'"),
    ({"image_column": "nope"}, r"no column 'nope'; it has filepath.*--image-column"),
    ({"caption_column": "nope"}, r"no column 'nope'; it has filepath.*--caption-column"),
    ({"images": Path("/nonexistent")}, r"--images /nonexistent: no such directory"),
    ({"images": ROOT / "docs"}, r"none of the first 30 images is there; looked for .*/docs/000.jpg; set --images"),
    ({"window": "5"}, r"--window 5: give LOW/HIGH"),
    ({"window": "9/3"}, r"--window 9/3: give LOW/HIGH"),
    ({"size": -1}, r"--size -1"),
    ({"quality": 101}, r"--quality 101"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_a_mistake_is_one_line(source: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ClipscaleError, match=message) as error:
        run(source, tmp_path / "out", **options)
    assert "\n" not in str(error.value)


FILES: list[tuple[str, bytes, str]] = [
    ("a.csv", b"", r"has no rows"),
    ("a.csv", b"filepath,caption\n", r"has no rows"),
    ("a.csv", b"x,y\n1,2\n", r"none of the columns x, y is known to hold images; name one with --image-column"),
    ("a.csv", b"image,y\n1,2\n", r"none of the columns image, y is known to hold captions; .* --caption-column"),
    ("a.csv", b"image,caption\na.jpg,one, two\n", r"line 2: 3 fields where the header has 2"),
    ("a.csv", b'image,caption\na.jpg,"one\nb.jpg,two\n', r"line 3: .*must be doubled"),
    ("a.csv", b"image,image,caption\na,b,c\n", r"column 'image' comes twice"),
    ("a.csv", b"image,caption\na.jpg,caf\xe9\n", r"is not UTF-8 after line 0; convert it"),
    ("a.csv", b"url,image,caption\nu,https://x.org/a.jpg,it\n", r"column image holds addresses.*img2dataset"),
    ("a.jsonl", b'{"image": "a"}\n[1]\n', r"line 2: not an object"),
    ("a.jsonl", b'{"image": \n', r"line 1 is not JSON"),
    ("a.json", b'{"images": []}', r"neither COCO captions"),
    ("a.json", b'{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1}]}', r"'caption' is missing"),
    ("a.parquet", b"PAR1 no", r"cannot be read: "),
    ("a.xlsx", b"", r"is no table: known are .csv, .tsv"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), FILES)
def test_a_bad_table_is_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ClipscaleError, match=message) as error:
        run(tmp_path / name, tmp_path / "out")
    assert "\n" not in str(error.value) and name in str(error.value)


def test_sources_that_are_none(tmp_path: Path, source: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place, message in {
        tmp_path / "nowhere": "does not exist",
        tmp_path / "empty": "holds no images",
        source.parent: r"is the source",
    }.items():
        with pytest.raises(ClipscaleError, match=message):
            run(place, source.parent)
    (source.parent / "more.tsv").touch()
    with pytest.raises(DataError, match=r"holds 2 tables \(captions.csv, more.tsv\); name one of them"):
        run(source.parent, tmp_path / "out")


def test_a_row_without_a_group_is_named(tmp_path: Path) -> None:
    names = pictures(tmp_path, 4)
    rows = [{"image": name, "caption": "it", "patient": "" if name == "002.jpg" else name} for name in names]
    with pytest.raises(DataError, match=r"row 3 has no value in column patient"):
        run(table(tmp_path / "t.csv", rows), tmp_path / "out", split="0.5/0.5", group_by="patient")


def test_nothing_that_can_be_packed_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"<html>")
    source = table(tmp_path / "t.csv", [{"image": "a.jpg", "caption": "it"}])
    with pytest.raises(DataError, match=r"no sample of train could be packed \(1 undecodable_image\)"):
        run(source, tmp_path / "out")


def test_a_shard_of_which_nothing_could_be_packed_is_there_and_empty(tmp_path: Path) -> None:
    """Or the pattern that names the shards would have a hole."""
    pictures(tmp_path, 1)
    (tmp_path / "a.jpg").write_bytes(b"<html>")
    source = table(tmp_path / "t.csv", [{"image": name, "caption": "it"} for name in ("a.jpg", "000.jpg")])
    found = run(source, tmp_path / "out", shard_samples=1)
    assert sorted(len(shard) for shard in found.values()) == [0, 1]
    files = expand_shards("train-{000000..000001}.tar", str(tmp_path / "out"), "key", STORE)
    assert sorted((file.index.samples, file.index.damage) for file in files) == [(0, ""), (1, "")]
    order = SampleOrder([(file.name, file.index.samples) for file in files], None, seed=0, streams=2, window=4)
    assert {files[order.locate(0, place).shard].index.samples for place in range(4)} == {1}


def test_other_options_or_rows_are_refused(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    run(source, tmp_path / "out", jobs=2)
    with pytest.raises(ConfigError, match=r"begun with other options \(seed, size\)"):
        run(source, tmp_path / "out", seed=3, size=8)
    source.write_text(source.read_text().replace("first 3", "third 3"))
    with pytest.raises(ConfigError, match=r"begun with other options \(source\)"):
        run(source, tmp_path / "out")


def test_shares() -> None:
    assert parse_split("1") == {"train": 1.0}
    assert parse_split("0.9/0/0.1") == {"train": 0.9, "test": 0.1}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train-000000.tar"], "train-000000.tar"),
        (["a-08.tar", "a-09.tar", "a-10.tar"], "a-{08..10}.tar"),
        (["00000.tar", "00001.tar", "00003.tar"], "{00000..00001}.tar::00003.tar"),
        (["a.tar", "b.tar"], "a.tar::b.tar"),
        (["9.tar", "10.tar"], "9.tar::10.tar"),
    ],
)
def test_patterns(names: list[str], expected: str) -> None:
    assert brace_pattern(names) == expected
    assert [name for part in expected.split("::") for name in braceexpand(part)] == names


def documented() -> list[str]:
    """Every packing command of the documents."""
    page = (ROOT / "docs" / "packing.md").read_text()
    found = re.findall(r"clipscale data (pack [^\"\n]+)", "\n".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL)))
    assert len(found) >= 4
    return found


@pytest.mark.parametrize("line", documented())
def test_the_documents_name_options_that_there_are(line: str) -> None:
    words = shlex.split(line, comments=True)
    parsed = typer.main.get_command(data_app).commands["pack"].make_context("pack", words[1:])  # type: ignore[attr-defined]
    assert parsed.params["output"]


def test_the_documents_example_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "packing.md").read_text()
    example = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert example
    subprocess.run([sys.executable, "-c", example[1]], cwd=tmp_path, check=True)
    command = [sys.executable, "-m", "clipscale.cli", "data", *shlex.split(documented()[0]), "-j", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = packed(tmp_path / "shards")
    assert [len(shard) for shard in found.values()] == [20, 160, 20]
    grey = {key: np.asarray(Image.open(io.BytesIO(members["jpg"]))).mean() for key, members in samples(found).items()}
    assert all(abs(grey[f"{number:09d}"] - min(number * 20 * 255 / 4095, 255)) < 1.5 for number in range(200))
