"""Tables as shards: rows are found, read and trained on like samples of a tar."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clipscale.data.manifest import ShardFile, expand_shards
from clipscale.data.stream import read_samples
from clipscale.data.table import CHUNK, read_rows, scan_table
from clipscale.errors import DataError
from tests.shards import STORE, jpeg


def _write(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]], delimiter: str = ",") -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


def _expand(path: Path) -> list[ShardFile]:
    return expand_shards(str(path), None, "data.train.shards", STORE)


@pytest.mark.parametrize(("name", "delimiter"), [("pairs.csv", ","), ("pairs.tsv", "\t"), ("semicolons.csv", ";")])
def test_rows_are_samples(tmp_path: Path, name: str, delimiter: str) -> None:
    for number in range(70):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    (tmp_path / "5.jpg").unlink()
    rows = [[f"{number}.jpg", f"caption, {number}\nof two lines", str(number % 3)] for number in range(70)]
    files = _expand(_write(tmp_path / name, ["filepath", "title", "label"], rows, delimiter))
    assert [file.summary.samples for file in files] == [CHUNK, CHUNK, 70 - 2 * CHUNK]
    samples = [one for file in files for one in read_samples(file, 0, file.summary.samples)]
    assert [one.key for one in samples] == [f"{name}/{number}" for number in range(70)]
    assert [one.problem for one in samples] == ["missing_image" if number == 5 else "" for number in range(70)]
    assert samples[69].members["jpg"] == jpeg(69)
    assert samples[69].members["txt"].decode() == "caption, 69\nof two lines"
    assert json.loads(samples[69].members["json"])["label"] == "0"
    assert [one.key for one in read_samples(files[1], 3, 5)] == [f"{name}/{CHUNK + 3}", f"{name}/{CHUNK + 4}"]


@given(st.lists(st.tuples(st.text(min_size=1), st.text()), min_size=1))
@example([("TXT", "0")])
@settings(deadline=None)
def test_any_text_survives(pairs: list[tuple[str, str]]) -> None:
    pairs = [(a.replace("\0", ""), b.replace("\0", "")) for a, b in pairs]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("filepath", "caption"), *pairs])
    data = text.getvalue().encode("utf-8", "replace")
    offsets = scan_table(io.BytesIO(data), "it")
    assert len(offsets) == len(pairs) + 1
    for number, (_, caption) in enumerate(pairs):
        header, begin, end = int(offsets[0]), int(offsets[number]), int(offsets[number + 1])
        (row,) = read_rows(io.BytesIO(data), header, begin, end, lambda path: b"")
        assert row.members["txt"] == caption.encode("utf-8", "replace")


def test_a_byte_order_mark_and_empty_lines(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    path = tmp_path / "pairs.csv"
    path.write_bytes("\ufefffilepath,caption\r\n\r\n0.jpg,one\r\n\r\n\r\n0.jpg,two\r\n".encode())
    (file,) = _expand(path)
    assert [one.members["txt"] for one in read_samples(file, 0, 2)] == [b"one", b"two"]


@pytest.mark.parametrize(
    ("text", "says"),
    [(b"a,b\n1,2\n", "no column of image paths, its columns are a, b"), (b"", "its columns are none"),
     (b"filepath,caption\n", "holds no row"), (b'filepath,caption\n1.jpg,"never closed\n2.jpg,b\n3.jpg,c\n', "line 4"),
     (b"filepath,caption\n1.jpg,a cat, sitting\n", "3 fields where the header has 2"),
     ("filepath,caption\n1.jpg,caf\xe9\n".encode("latin-1"), "is not UTF-8"),
     (b"filepath,caption\n1.jpg,a\rb\n2.jpg,c\n", "line 2"), (b"filepath,caption\r1.jpg,a\r", "line"),
     ("filepath,caption\n".encode("utf-16"), "is not UTF-8")],
)  # fmt: skip
def test_tables_that_cannot_be_used(tmp_path: Path, text: bytes, says: str) -> None:
    path = tmp_path / "pairs.csv"
    path.write_bytes(text)
    with pytest.raises(DataError, match=says):
        _expand(path)


def test_a_header_may_span_lines(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(jpeg(0))
    path = tmp_path / "pairs.csv"
    path.write_text('filepath,caption,"other\nthings"\n0.png,one,x\n')
    (file,) = _expand(path)
    (row,) = read_samples(file, 0, 1)
    assert row.members["txt"] == b"one" and row.members["png"] == row.members["jpg"] == jpeg(0)


@pytest.mark.parametrize("name", ["nowhere.jpg", "", ".", "a" * 300, "zero\0byte", "pipe:touch made; cat 0.jpg #.jpg"])
def test_images_that_are_not_there_are_bad_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    (file,) = _expand(_write(tmp_path / "pairs.csv", ["filepath", "caption"], [["0.jpg", "a"], [name, "b"]]))
    assert [one.problem for one in read_samples(file, 0, 2)] == ["", "missing_image"]
    assert not (tmp_path / "made").exists(), "a table runs no commands"
