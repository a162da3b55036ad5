"""Embeddings stored with samples: read as documented, and nothing else is taken for one."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib import format as npy_format

from clipscale.config import compose, validate
from clipscale.data.embeddings import StoredTeacher, read_embeddings
from clipscale.data.manifest import summarise
from clipscale.data.samples import BadSample, Member
from clipscale.data.tokenizer import Tokenizer
from clipscale.errors import ConfigError, DataError
from clipscale.trainer.probe import find_teacher
from tests.shards import jpeg, shard_files, write_shard
from tests.unit.test_prepare import first_batch

VECTORS = np.array([[3, 4, 0], [0, 0, -2]])
NORMAL = np.array([[0.6, 0.8, 0], [0, 0, -1]], np.float32)


def npy(values: Any, version: tuple[int, int] | None = None) -> bytes:
    out = io.BytesIO()
    npy_format.write_array(out, np.asarray(values), version)
    return out.getvalue()


def pair(image: bytes, text: bytes) -> Member:
    return Member("s/k", {"i.npy": image, "t.npy": text})


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4", ">f8"])
def test_vectors_of_any_float_are_normalised(dtype: str) -> None:
    for data in (
        npy(VECTORS.astype(dtype)),
        npy(np.asfortranarray(VECTORS, dtype)),
        npy(VECTORS.astype(dtype), (2, 0)),
    ):
        found = read_embeddings(Member("s/k", {"i.npy": data}), "i.npy")
        assert found.dtype == np.float32 and np.array_equal(found, NORMAL)
    tiny = read_embeddings(Member("s/k", {"i.npy": npy(np.full(3, 1e-150))}), "i.npy")
    assert np.allclose(tiny, 3**-0.5) and tiny.shape == (1, 3)


def test_the_row_of_the_caption_is_taken() -> None:
    teacher, image = StoredTeacher("i.npy", "t.npy", 3), npy(VECTORS[0].astype(np.float32))
    for place in range(2):
        found = teacher.read(pair(image, npy(VECTORS.astype(np.float16))), place, 2)
        assert np.array_equal(found[0], NORMAL[0]) and np.array_equal(found[1], NORMAL[place])
    assert np.array_equal(teacher.read(pair(image, image), 0, 1)[1], NORMAL[0])
    for wrong, captions in ((VECTORS, 3), (VECTORS, 1), (VECTORS[0], 2), (VECTORS[:, :2], 2)):
        with pytest.raises(BadSample, match="bad_teacher_embedding"):
            teacher.read(pair(image, npy(wrong.astype(np.float32))), 0, captions)
        with pytest.raises(BadSample, match="bad_teacher_embedding"):
            teacher.read(pair(npy(VECTORS.astype(np.float32)), image), 0, 1)
    with pytest.raises(BadSample, match="no_teacher_embedding"):
        teacher.read(Member("s/k", {"i.npy": image}), 0, 1)


def header(text: str) -> bytes:
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode()


GOOD = npy(np.ones(3, np.float32))
BAD = {
    "empty": b"",
    "no npy": b"<html>not found</html>",
    "integers": npy(np.ones(3, np.int32)),
    "complex": npy(np.ones(3, np.complex64)),
    "a pickle": header("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n") + pickle.dumps([1]),
    "fields": npy(np.ones(3, [("a", "f4")])),
    "cut short": GOOD[:-1],
    "one byte too many": GOOD + b"\0",
    "cut within the header": GOOD[:40],
    "cut before the header": GOOD[:9],
    "a header that lies": header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}\n") + bytes(12),
    "a negative shape": header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}\n") + bytes(12),
    "a long header": header("{" * 60_000) + bytes(12),
    "nested": header("(" * 3000) + bytes(12),
    "no vector": npy(np.float32(1)),
    "three dimensions": npy(np.ones((1, 1, 3), np.float32)),
    "no rows": npy(np.ones((0, 3), np.float32)),
    "no columns": npy(np.ones((2, 0), np.float32)),
    "zeros": npy(np.array([[1, 1], [0, 0]], np.float32)),
    "not a number": npy(np.array([1, np.nan], np.float32)),
    "infinite": npy(np.array([1, np.inf], np.float16)),
    "too large": npy(np.full(2, 1e300)),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_what_is_no_embedding_is_refused(data: bytes) -> None:
    with pytest.raises(BadSample, match="bad_teacher_embedding"):
        read_embeddings(Member("s/k", {"i.npy": data}), "i.npy")


@given(st.integers(0, len(GOOD) - 1), st.binary(max_size=4))
@settings(deadline=None, max_examples=300)
def test_no_damage_breaks_the_reader(place: int, instead: bytes) -> None:
    data = GOOD[:place] + instead + GOOD[place + len(instead) :]
    try:
        found = read_embeddings(Member("s/k", {"i.npy": data}), "i.npy")
    except BadSample as error:
        assert str(error) == "bad_teacher_embedding"
    else:
        assert found.dtype == np.float32 and np.allclose(np.linalg.norm(found, axis=1), 1)


def test_the_first_sample_with_both_tells_the_dimension(tmp_path: Path) -> None:
    wide, narrow = npy(np.ones(5, np.float32)), npy(np.ones(4, np.float32))
    members = [{"jpg": b""}, {"i.npy": wide, "t.npy": narrow}, {"i.npy": wide, "t.npy": wide}, {"i.npy": narrow}]
    files = shard_files([write_shard(tmp_path / "a.tar", [(str(n), one) for n, one in enumerate(members)])])
    assert find_teacher(files, summarise(files), "i.npy", "t.npy") == StoredTeacher("i.npy", "t.npy", 5)
    says = r"no sample .* holds embeddings in i.npy and t.np \(4 x no_teacher_embedding\); the first holds jpg"
    with pytest.raises(DataError, match=says):
        find_teacher(files, summarise(files), "i.npy", "t.np")


def test_the_documented_shard_is_read_as_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    (block,) = [one for one in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "TarWriter" in one]
    monkeypatch.chdir(tmp_path)
    Path("cat.jpg").write_bytes(jpeg(1))
    exec(block, {})
    files = shard_files([tmp_path / "pairs-000000.tar"])
    found = find_teacher(files, summarise(files), "vitl.image.npy", "vitl.text.npy")
    batch = first_batch(
        files, Tokenizer("clip", 16), 4, caption_key="json:captions", negatives_key="json:negatives",
        negatives_per_sample=2, teachers=(found,), image_ids=True,
    )  # fmt: skip
    assert not batch.bad and batch.negative_lengths is not None and (batch.negative_lengths > 0).all()
    ((images, texts),) = batch.teachers
    assert images.shape == texts.shape == (4, 768) and len(batch.negative_lengths) == 8
    assert [len(ids.unique()) for ids in (batch.image_ids, batch.caption_ids)] == [1, len(texts.unique(dim=0))]
    assert (images.norm(dim=1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("teachers", ["[3]", "[{image: a}]", "[{image: a, text: b, more: c}]", "[{image: a, text: 3}]"])
def test_teachers_that_are_none(teachers: str) -> None:
    config, _ = compose([f"loss.teachers={teachers}"])
    with pytest.raises(ConfigError, match="is neither a run nor names the members"):
        validate(config)
