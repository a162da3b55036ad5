"""Vectors on disk, exact and approximate neighbours, and the commands: the same whatever happens on the way."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import clipscale
from benchmarks import search as benchmark
from clipscale.apps.search import approximate
from clipscale.apps.search.approximate import Approximate, build_index
from clipscale.apps.search.build import build
from clipscale.apps.search.embed import Wanted, embed, part_rows
from clipscale.apps.search.exact import nearest
from clipscale.apps.search.index import Filter, SearchIndex
from clipscale.apps.search.query import query
from clipscale.apps.search.vectors import IMAGES, PARTS, TEXTS, Vectors
from clipscale.errors import ClipscaleError, ConfigError, DataError
from tests.pool import Pool
from tests.shards import jpeg, sample, write_shards
from tests.unit.test_export import SMALL_TEXT, make_run

COUNT, BAD = 700, {3: {"txt": b"no image"}, 260: {"jpg": b"\xff\xd8 no jpeg", "txt": b"a"}, 261: {"jpg": jpeg(261)}}
CAPTIONS = ["data.caption_key=txt"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("model"), "model=tiny", "model.vision.layers=1", *SMALL_TEXT)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("shards")
    write_shards(root, [400, 300], BAD)
    return f"{root}/{{00000..00001}}.tar"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, run: Path, shards: str) -> Path:
    """Built by one process that nothing happened to."""
    output = tmp_path_factory.mktemp("index") / "index"
    embed(Wanted(str(run), shards, tuple(CAPTIONS)), output, jobs=1)
    return output


def files(directory: Path) -> dict[str, bytes]:
    """All that is to be the same: without the markers."""
    paths = [path for path in directory.rglob("*") if path.is_file() and ".clipscale" not in path.parts]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


# ---- neighbours -----------------------------------------------------------------------------------------------------


def by_sorting(vectors: np.ndarray, queries: torch.Tensor, k: int, allowed: np.ndarray) -> list[list[int]]:
    scores = queries.double() @ torch.from_numpy(vectors).double().T
    found = []
    for row in scores.tolist():
        able = [i for i in range(len(vectors)) if allowed[i] and row[i] == row[i]]
        found.append(sorted(able, key=lambda i: (-row[i], i))[:k])
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from(["float16", "float32"]), st.integers(1, 60))
def test_the_nearest_are_those_that_sorting_finds(seed: int, k: int, dtype: str, rows: int) -> None:
    """Small whole numbers, so that there are many ties, and every sum is exact; some rows hold no numbers."""
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-2, 3, (rows, 4)).astype(dtype)
    vectors[rng.random(rows) < 0.1] = np.nan
    allowed = rng.random(rows) < 0.7 if seed % 2 else np.ones(rows, bool)
    queries = torch.from_numpy(rng.integers(-2, 3, (3, 4)).astype(np.float32))
    cuts = sorted(rng.integers(0, rows, 2).tolist())
    chunks = [part for part in np.split(vectors, cuts) if len(part)]
    found = nearest(chunks, queries, k, allowed if seed % 2 else None)
    assert [rows.tolist() for _, rows in found] == by_sorting(vectors, queries, k, allowed)


def test_many_blocks_are_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(0).standard_normal((999, 16)).astype(np.float16)
    queries = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    ((_, whole), _) = nearest([vectors], queries, 20)
    monkeypatch.setattr("clipscale.apps.search.exact.BLOCK", 16 * 7)
    ((scores, rows), _) = nearest([vectors[:500], vectors[500:]], queries, 20)
    assert rows.tolist() == whole.tolist() and (np.diff(scores) <= 0).all()


@pytest.mark.parametrize("kind", approximate.KINDS)
def test_an_index_of_faiss_finds_nearly_the_same(kind: str, tmp_path: Path) -> None:
    vectors = benchmark.make_vectors(tmp_path / "v", 2000, 16)
    told = build_index(vectors, kind)
    assert told.recall >= approximate.TARGET and told.queries == "images"
    index = Approximate(vectors)
    assert index.settings == told
    queries = torch.from_numpy(np.stack([vectors.vector(row) for row in (0, 777, 1999)]))
    exact, found = nearest(vectors.chunks(), queries, 10), index.nearest(queries, 10)
    shared = [len(np.intersect1d(a, b)) for (_, a), (_, b) in zip(exact, found, strict=True)]
    assert [rows[0] for _, rows in found] == [0, 777, 1999] and sum(shared) >= 24
    np.testing.assert_allclose(found[1][0][0], exact[1][0][0], atol=2e-3)
    # One that belongs to other vectors is not used.
    other = benchmark.make_vectors(tmp_path / "w", 1500, 16)
    for name in (approximate.INDEX, approximate.SETTINGS):
        shutil.copy(vectors.directory / name, other.directory / name)
    with pytest.raises(DataError, match="is not of these vectors; clipscale search build mends it"):
        Approximate(other)
    (vectors.directory / approximate.INDEX).write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read"):
        Approximate(vectors)


@pytest.mark.parametrize("kind", approximate.KINDS)
def test_an_index_is_the_same_on_however_many_threads(kind: str, tmp_path: Path) -> None:
    faiss = approximate.require_faiss()
    vectors, threads, made = benchmark.make_vectors(tmp_path / "v", 3000, 16), faiss.omp_get_max_threads(), set()
    try:
        for count in (1, 4, 4, 16):
            faiss.omp_set_num_threads(count)
            build_index(vectors, kind)
            made.add((vectors.directory / approximate.INDEX).read_bytes())
    finally:
        faiss.omp_set_num_threads(threads)
    assert len(made) == 1


def test_the_benchmark_measures_all_sides(tmp_path: Path) -> None:
    vectors = benchmark.make_vectors(tmp_path / "v", 500, 8)
    queries = np.random.default_rng(1).standard_normal((3, 8), np.float32)
    answers = [make(vectors.directory)(queries) for make in benchmark.SIDES.values()]
    assert all([rows.tolist() for rows in answer] == [rows.tolist() for rows in answers[0]] for answer in answers)


# ---- embedding ------------------------------------------------------------------------------------------------------


def test_rows_are_what_the_model_says_of_the_images(built: Path, run: Path, shards: str) -> None:
    vectors = Vectors(built)
    rows = list(vectors.rows())
    good = [number for number in range(COUNT) if number not in (3, 260)]
    assert [row.place for row in rows] == good and len(vectors) == len(good)
    assert rows[0] == vectors.row(0) == (0, "00000.tar/000000", shards.replace("{00000..00001}", "00000"),
                                         "a red red red thing")  # fmt: skip
    assert vectors.row(len(vectors) - 1).key == "00001.tar/000699"
    assert rows[good.index(261)].caption == "", "an image without a caption is an image"
    model, preprocess, _ = clipscale.load(run)
    shown = [0, 2, 4, 399, 400, 699]
    pictures = []
    for number in shown:
        (path := built.parent / "picture.jpg").write_bytes(sample(number)["jpg"])
        pictures.append(preprocess(Image.open(path)))
    with torch.no_grad():
        expected = model.encode_image(torch.stack(pictures), normalize=True)
    found = torch.from_numpy(np.stack([vectors.vector(good.index(number)) for number in shown]))
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    assert isinstance(next(vectors.chunks()), np.memmap) and next(vectors.chunks()).dtype == np.float16
    with (built / "unusable.csv").open(newline="") as listed:
        assert list(csv.reader(listed))[1:] == [
            ["00000.tar/000003", "no_image"],
            ["00000.tar/000260", "undecodable_image"],
        ]
    assert vectors.made.unusable == {"no_image": 1, "undecodable_image": 1}


def test_captions_are_embedded_beside_their_images(run: Path, shards: str, tmp_path: Path) -> None:
    wanted = Wanted(str(run), shards.replace("{00000..00001}", "00001"), dtype="float32", texts=True, parquet=True)
    vectors = embed(wanted, tmp_path / "out", jobs=1)
    assert len(vectors) == 300 and vectors.has_texts and next(vectors.chunks(TEXTS)).dtype == np.float32
    model, _, tokenizer = clipscale.load(run)
    with torch.no_grad():
        expected = model.encode_text(tokenizer([vectors.row(7).caption]), normalize=True)[0]
    torch.testing.assert_close(torch.from_numpy(vectors.vector(7, TEXTS)), expected, atol=1e-5, rtol=0)
    table = pq.read_table(tmp_path / "out" / PARTS / "000000.parquet").to_pydict()
    assert table["key"][7] == vectors.row(7).key and np.allclose(table["text"][7], vectors.vector(7, TEXTS))
    assert np.array_equal(np.float32(table["image"][7]), vectors.vector(7))
    with pytest.raises(ConfigError, match=r"begun with other options \(dtype\)"):
        embed(Wanted(str(run), wanted.source, dtype="float16", texts=True, parquet=True), tmp_path / "out", jobs=1)


@pytest.mark.parametrize(
    ("count", "rows"), [(1, 256), (700, 256), (16_384, 256), (26_000, 448), (10**6, 15_680), (10**9, 16_384)]
)
def test_parts_depend_on_the_number_of_samples_alone(count: int, rows: int) -> None:
    assert part_rows(count) == rows


def killed_midway(run: Path, shards: str, output: Path) -> int:
    """Begin to build, kill -9 once a part is done; the number of parts that then were."""
    command = [sys.executable, "-m", "clipscale.cli", "embed", str(run), shards, "--out", str(output), "-j", "1"]
    process = subprocess.Popen([*command, *CAPTIONS], stderr=subprocess.DEVNULL)
    markers = output / ".clipscale" / "embed" / "embed"
    while process.poll() is None and not list(markers.glob("*.json")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return len(list(markers.glob("*.json")))


def test_what_was_killed_goes_on_to_the_same_files(run: Path, shards: str, built: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = killed_midway(run, shards, output)
    assert 1 <= done < 3 and not (output / "vectors.json").exists()
    with pytest.raises(DataError, match="unfinished: the command that began it goes on where it stopped"):
        Vectors(output)
    kept = {path: path.stat().st_mtime_ns for path in (output / PARTS).glob("000000.*")}
    embed(Wanted(str(run), shards, tuple(CAPTIONS)), output, jobs=1)
    assert files(output) == files(built)
    assert kept and all(path.stat().st_mtime_ns == when for path, when in kept.items()), "finished parts were kept"


def embed_on_rank(run: Path, shards: str, output: Path) -> int:
    return len(embed(Wanted(str(run), shards, tuple(CAPTIONS)), output, jobs=1))


def test_two_ranks_write_what_one_does(pool2: Pool, run: Path, shards: str, built: Path, tmp_path: Path) -> None:
    assert pool2.run(embed_on_rank, run, shards, tmp_path / "out") == [698, 698]
    assert files(tmp_path / "out") == files(built)


def test_damaged_parts_are_made_anew(run: Path, shards: str, built: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out"
    shutil.copytree(built, output)
    whole = files(output)
    flipped = output / PARTS / f"000001.{IMAGES}"
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x99")
    (output / PARTS / "000002.rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"000002\.rows\.jsonl is not there, or not whole"):
        Vectors(output)
    embed(Wanted(str(run), shards, tuple(CAPTIONS)), output, jobs=1)
    assert files(output) == whole
    assert capsys.readouterr().err.count("is damaged, and made anew") == 2


def test_another_model_or_source_is_refused(run: Path, shards: str, built: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path, "model=tiny", "model.vision.layers=1", *SMALL_TEXT, "ema.decay=0.9")
    moved = shutil.copytree(run, tmp_path / "moved")
    embed(Wanted(str(moved), shards, tuple(CAPTIONS)), built, jobs=1)  # the same one elsewhere is the same one
    embed(Wanted(str(run), shards, tuple(CAPTIONS)), built, jobs=1)
    for wanted, what in (
        (Wanted(str(other), shards, tuple(CAPTIONS)), "model"),
        (Wanted(str(run), shards.replace("..00001", "..00000"), tuple(CAPTIONS)), "source"),
        (Wanted(str(run), shards, ("data.caption_key=json:name",)), "source"),
        (Wanted(str(run), shards, tuple(CAPTIONS), texts=True), "captions"),
    ):
        with pytest.raises(ConfigError, match=rf"begun with other options \({what}\); choose another directory"):
            embed(wanted, built, jobs=1)


def test_an_index_is_built_once_and_removed(built: Path, run: Path, shards: str, tmp_path: Path, capsys: Any) -> None:
    output, wanted = shutil.copytree(built, tmp_path / "out"), Wanted(str(run), shards, tuple(CAPTIONS))
    told = []
    for kind in ("hnsw", "hnsw", "ivf"):
        build(wanted, output, kind, 1, True)
        told.append((json.loads(capsys.readouterr().out)["index"], (output / approximate.INDEX).stat().st_mtime_ns))
    assert told[0] == told[1] and told[0][0]["kind"] == "hnsw" and told[2][0]["kind"] == "ivf"
    index = SearchIndex(output)
    assert index.approximate is not None and len(index.search(torch.from_numpy(index.vectors.vector(5)), 3)) == 3
    build(wanted, output, "exact", 1, False)
    assert "unusable: no_image" in capsys.readouterr().out and SearchIndex(output).approximate is None
    assert files(output) == files(built)


def test_mistakes_are_one_line(run: Path, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted, message in (
        (Wanted(str(run), shards, dtype="int8"), "--dtype int8: choose from float16, float32"),
        (Wanted(str(run), str(tmp_path / "none")), "none does not exist"),
        (Wanted(str(tmp_path / "none"), shards), "none does not exist"),
        (Wanted(str(run), shards, ("data.workers=3",)), "data.workers"),
        (Wanted(str(run), shards, device="tpu"), "--device tpu: choose from"),
    ):
        with pytest.raises(ClipscaleError, match=message):
            embed(wanted, tmp_path / "out", jobs=1)
    with pytest.raises(ConfigError, match="--index flat: choose from exact, ivf, hnsw"):
        build(Wanted(str(run), shards), tmp_path / "out", "flat", 1, False)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"pip install 'clipscale\[search\]'"):
        build(Wanted(str(run), shards), tmp_path / "out", "ivf", 1, False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'clipscale\[data\]'"):
        embed(Wanted(str(run), shards, parquet=True), tmp_path / "out", jobs=1)
    assert not (tmp_path / "out").exists()


# ---- asking ---------------------------------------------------------------------------------------------------------


def test_an_image_finds_itself_and_a_filter_the_rest(built: Path, run: Path, tmp_path: Path) -> None:
    index = SearchIndex(built)
    (path := tmp_path / "a.jpg").write_bytes(sample(5)["jpg"])
    hits = query(built, None, path, 3, Filter(), None, "cpu", True)
    assert hits[0].row.key == "00000.tar/000005" and hits[0].score == pytest.approx(1, abs=1e-3) and len(hits) == 3
    vector = torch.from_numpy(index.vectors.vector(hits[0].number))
    for only, expected in (
        (Filter(words="RED green thing"), lambda row: all(w in row.caption for w in ("red", "green", "thing"))),
        (Filter(folder="00001.tar/"), lambda row: row.key.startswith("00001.tar/")),
        (Filter(words="red", folder="00001.tar/"), lambda row: "red" in row.caption and row.key.startswith("00001")),
    ):
        found = index.search(vector, 1000, only)
        assert {hit.number for hit in found} == {i for i, row in enumerate(index.vectors.rows()) if expected(row)}
        assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)
    assert index.search(vector, 5, Filter(words="nowhere")) == []
    assert len(index.search(vector, 5, Filter(min_score=0.9999))) <= 5
    assert index.image(0).shape == (3, 16, 16) and index.folders() == ["00000.tar", "00001.tar"]


def test_a_query_prints_a_table_or_json(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    query(built, "a red [thing]", None, 2, Filter(), None, "cpu", True)
    told = json.loads(capsys.readouterr().out)
    assert len(told) == 2 and set(told[0]) == {"score", "number", "place", "key", "path", "caption"}
    query(built, "a red [thing]", None, 2, Filter(), None, "cpu", False)
    assert told[0]["key"] in capsys.readouterr().out
    for text, image, message in (
        (None, None, "name one thing to look for"),
        ("a", Path("b"), "name one thing to look for"),
        ("  ", None, "the text to look for is empty"),
        (None, built / "vectors.json", "cannot be used: undecodable_image"),
        (None, built / "none.jpg", "cannot be read: No such file"),
    ):
        with pytest.raises(ClipscaleError, match=message):
            query(built, text, image, 2, Filter(), None, "cpu", True)


def test_an_index_knows_its_model_and_its_source(built: Path, run: Path, shards: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no vectors; make them with clipscale search build"):
        SearchIndex(tmp_path)
    other = make_run(tmp_path / "other", "model=tiny", "model.vision.layers=1", *SMALL_TEXT, "ema.decay=0.9")
    with pytest.raises(ConfigError, match="is not the model that made"):
        SearchIndex(built, str(other)).towers  # noqa: B018
    copy = shutil.copytree(built, tmp_path / "copy")
    told = json.loads((copy / "vectors.json").read_text())
    write_shards(tmp_path / "changed", [300, 400])
    told["source"] = f"{tmp_path}/changed/{{00000..00001}}.tar"
    (copy / "vectors.json").write_text(json.dumps(told))
    with pytest.raises(DataError, match="changed since it was indexed"):
        SearchIndex(copy).image(348)
    for damage in ("{", "[]", '{"format": 1}'):
        (copy / "vectors.json").write_text(damage)
        with pytest.raises(DataError, match=r"cannot be read|damaged"):
            Vectors(copy)


def test_a_folder_is_embedded_by_its_paths(run: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("cats/a.jpg", "cats/b.png", "dogs/c d.webp", "dogs/broken.jpg")):
        (path := tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30 + number, 20), (number * 60, 0, 0)).save(path)
    path.write_bytes(b"")
    (tmp_path / "in" / "cats" / "a.txt").write_text("a cat\nanother caption\n")
    vectors = embed(Wanted(str(run), str(tmp_path / "in")), tmp_path / "out", jobs=1)
    assert [(row.key, row.caption) for row in vectors.rows()] == [
        ("cats/a.jpg", "a cat"),
        ("cats/b.png", ""),
        ("dogs/c d.webp", ""),
    ]
    assert vectors.row(2).path == str(tmp_path / "in" / "dogs" / "c d.webp")
    assert vectors.made.unusable == {"empty_image": 1}
    assert SearchIndex(tmp_path / "out").image(2).shape == (3, 20, 32)
    os.utime(tmp_path / "in" / "cats" / "a.jpg", (0, 0))
    with pytest.raises(ConfigError, match=r"other options \(source\)"):
        embed(Wanted(str(run), str(tmp_path / "in")), tmp_path / "out", jobs=1)
