"""Shards are read from anywhere and damage is told; what is hopeless ends. The batches: see test_exact.py."""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.tokenizer import get_reduction_mask_fn

from clipscale.config.data import LongCaption
from clipscale.data import loader
from clipscale.data.index import ShardIndex, walk
from clipscale.data.loader import Batch, TrainLoader
from clipscale.data.manifest import ShardFile, expand_shards
from clipscale.data.order import SampleOrder
from clipscale.data.prepare import SampleOptions
from clipscale.data.samples import ImageOptions
from clipscale.data.stream import read_samples, read_stream
from clipscale.data.tokenizer import Tokenizer
from clipscale.errors import DataError
from tests.shards import STORE, jpeg, sample, shard_files, write_shard, write_shards

STREAMS = 12
BAD = {3: {"jpg": b"broken", "txt": b"x"}, 17: {"txt": b"no image"}, 40: {"jpg": sample(40)["jpg"]}}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[ShardFile]:
    return shard_files(write_shards(tmp_path_factory.mktemp("shards"), [20, 7, 31, 1], BAD))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer("clip", 16)


def make_order(files: list[ShardFile], window: int = 6) -> SampleOrder:
    return SampleOrder([(file.name, file.index.samples) for file in files], None, 5, STREAMS, window)


def index(path: Path) -> ShardIndex:
    """Read anew: within a process, an index is kept for good."""
    walk.cache_clear()
    return ShardFile(STORE, str(path)).index


def make_loader(
    files: list[ShardFile], order: SampleOrder, tokenizer: Tokenizer, batch: int, workers: int = 0, **given: Any
) -> TrainLoader:
    """The batches of one rank from the start."""
    options = SampleOptions(("jpg",), "txt", ImageOptions(16, (0.5, 1.0), (0.75, 4 / 3), 10**6), 5, **given)
    return TrainLoader(
        order, files, np.zeros(order.streams, np.int64), rank=0, world=1, global_batch_size=batch, options=options,
        tokenizer=tokenizer, workers=workers, pin_memory=False,
    )  # fmt: skip


def test_a_long_bad_stretch_is_not_fatal(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "HOPELESS", 50)
    files = shard_files(write_shards(tmp_path, [40, 400, 40], {n: {"txt": b"a"} for n in range(40, 440)}))
    order = SampleOrder([(file.name, file.index.samples) for file in files], None, 3, 1, 4)
    first = next(n for n in range(60) if order.locate(0, n).shard != 1)
    assert first < 50, "this seed begins with usable samples"
    made = make_loader(files, order, tokenizer, 8)
    assert sum(len(batch.bad) for batch in islice(made, 12)) >= 400


@pytest.mark.parametrize(("count", "sizes"), [(1, [12]), (2, [6, 6]), (5, [3, 3, 2, 2, 2]), (12, [1] * 12)])
def test_a_batch_is_cut_into_microbatches(
    files: list[ShardFile], tokenizer: Tokenizer, count: int, sizes: list[int]
) -> None:
    order = make_order(files)
    assert order.streams == 12
    batch = next(iter(make_loader(files, order, tokenizer, 12)))
    parts = batch.cut(count)
    assert [len(part.images) for part in parts] == [len(part.text_lengths) for part in parts] == sizes
    assert [int(part.text_lengths.sum()) for part in parts] == [len(part.text_ids) for part in parts]
    joined = Batch.concatenate(parts)
    assert joined.keys == batch.keys
    for name in ("images", "text_ids", "text_lengths", "seeds"):
        assert torch.equal(getattr(joined, name), getattr(batch, name)), name


def test_long_captions_may_begin_at_any_sentence(tmp_path: Path, tokenizer: Tokenizer) -> None:
    caption = ". ".join(f"{word} " * 12 for word in ("red", "green", "blue")).encode()
    files = shard_files(write_shards(tmp_path, [24], {n: {"jpg": jpeg(n), "txt": caption} for n in range(24)}))
    starts = {tokenizer.encode(word)[0][1] for word in ("red", "green", "blue")}
    for kept, found in ((LongCaption.head, {tokenizer.encode("red")[0][1]}), (LongCaption.random_sentence, starts)):
        batch = next(iter(make_loader(files, make_order(files), tokenizer, 24, long_caption=kept)))
        first = batch.text_lengths.cumsum(0) - batch.text_lengths + 1
        assert set(batch.text_ids[first].tolist()) == found and batch.truncated == 24


@pytest.mark.parametrize(("kept", "theirs"), [(LongCaption.block, "simple"), (LongCaption.random, "random")])
def test_short_captions_are_made_as_open_clip_makes_them(
    tmp_path: Path, tokenizer: Tokenizer, kept: LongCaption, theirs: str
) -> None:
    """Of 16 words with room for 14: the same captions come out, 3 or 120 of them, all equally often."""
    caption = "a red circle is left of two blue stars and one green square on white paper"
    assert len(Tokenizer("clip", 77).encode(caption)[0]) == 18
    files = shard_files(
        write_shards(tmp_path, [600], {n: {"jpg": jpeg(n), "txt": caption.encode()} for n in range(600)})
    )
    batch = next(iter(make_loader(files, make_order(files), tokenizer, 600, long_caption=kept)))
    ours = Counter(tuple(ids.tolist()) for ids in batch.text_ids.split(batch.text_lengths.tolist()))
    shorten = get_reduction_mask_fn(theirs)
    torch.manual_seed(0)
    random.seed(0)
    expected = shorten([caption] * 3000, 16, 49406, 49407, tokenizer._impl.encode)
    assert set(ours) <= {tuple(row) for row in expected.tolist()}
    ways = 3 if kept is LongCaption.block else 120
    assert 0.95 * ways <= len(ours) <= ways and max(ours.values()) < 600 / ways + 5 * (600 / ways) ** 0.5
    assert batch.truncated == 600


def test_a_choice_of_tokens_leaves_start_and_end(tokenizer: Tokenizer) -> None:
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    ids, cut = tokenizer.encode(long, lambda count, room: range(count - room, count))
    assert cut and ids.tolist() == [49406, *tokenizer.encode(long[4:])[0][1:-1].tolist(), 49407]
    assert tokenizer.encode("one", lambda count, room: [])[0].tolist() == tokenizer.encode("one")[0].tolist()


def test_captions_are_cleaned_if_asked_to(tmp_path: Path, tokenizer: Tokenizer) -> None:
    captions = {n: {"jpg": jpeg(n), "txt": b"<b>red</b>" if n else b"www.example.org"} for n in range(80)}
    files = shard_files(write_shards(tmp_path, [80], captions))
    batch = next(iter(make_loader(files, make_order(files), tokenizer, STREAMS, clean_captions=True)))
    assert set(batch.text_ids.tolist()) == set(tokenizer.encode("red")[0].tolist())
    assert {reason for reason, _ in batch.bad} <= {"empty_caption"}


def test_hopeless_data_ends_with_the_reason(tmp_path: Path, tokenizer: Tokenizer) -> None:
    files = shard_files(write_shards(tmp_path, [30], {n: {"txt": b"a"} for n in range(30)}))
    with pytest.raises(DataError, match=r"\d{5} x no_image; check data.image_keys"):
        next(iter(make_loader(files, make_order(files), tokenizer, STREAMS)))


def test_workers_end_with_the_error_of_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Though the error, which is still held here, holds them."""
    files = shard_files(write_shards(tmp_path, [30, 30, 30]))
    order, before = make_order(files), set(multiprocessing.active_children())
    (tmp_path / "00001.tar").unlink()
    with pytest.raises(DataError, match=r"00001\.tar cannot be read") as caught:
        list(make_loader(files, order, tokenizer, STREAMS, workers=2))
    assert caught.value is not None and set(multiprocessing.active_children()) == before


def test_a_stream_of_bad_samples_alone_ends_with_the_reason(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """As many samples as streams, in one shard: a stream meets the same sample in every epoch."""
    files = shard_files(write_shards(tmp_path, [STREAMS], {3: {"txt": b"a"}}))
    with pytest.raises(DataError, match="100 epochs hold no usable sample for stream 3 of 12: the data is too small"):
        next(iter(make_loader(files, make_order(files), tokenizer, STREAMS)))


def test_read_samples_from_anywhere(files: list[ShardFile]) -> None:
    everything = [s.key for s in read_samples(files[2], 0, 31)]
    assert everything == [f"00002.tar/{n:06d}" for n in range(27, 58)]
    assert [s.key for s in read_samples(files[2], 11, 14)] == everything[11:14]
    with pytest.raises(DataError, match="holds 31 samples"):
        list(read_samples(files[2], 30, 32))


def test_streams_read_from_any_position(files: list[ShardFile]) -> None:
    order = make_order(files)
    whole = [(p, s.key) for p, s in islice(read_stream(order, files, 4, 0), 30)]
    for start in (1, 2, 5, 6, 13):
        assert [(p, s.key) for p, s in islice(read_stream(order, files, 4, start), 30 - start)] == whole[start:]


def test_a_cut_shard_keeps_its_whole_samples_and_says_so(tmp_path: Path) -> None:
    path = write_shards(tmp_path, [10])[0]
    whole = index(path)
    assert (whole.samples, whole.damage) == (10, "")
    data = path.read_bytes()
    path.write_bytes(data[: int(whole.offsets[7]) + 600])
    cut = index(path)
    assert "cut short" in cut.damage
    assert [s.key for s in read_samples(ShardFile(STORE, str(path)), 0, 7)] == [f"00000.tar/{n:06d}" for n in range(7)]


def test_what_follows_the_end_mark_is_told(tmp_path: Path) -> None:
    one = write_shards(tmp_path, [10])[0]
    data = one.read_bytes()
    one.write_bytes(data + data)
    glued = index(one)
    assert glued.samples == 10 and "more after its end-of-archive mark" in glued.damage
    start = int(glued.offsets[3])
    one.write_bytes(data[:start] + bytes(512) + data[start + 512 :])
    assert index(one).samples == 3 and "more after" in index(one).damage


def test_what_is_no_tar_has_no_samples(tmp_path: Path) -> None:
    page = tmp_path / "a.tar"
    page.write_bytes(b"<html>" + b"not found " * 200)
    assert index(page).samples == 0 and "not a tar header" in index(page).damage
    page.write_bytes(b"")
    assert index(page).samples == 0 and "no end-of-archive mark" in index(page).damage


def test_a_damaged_index_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_shards(tmp_path, [10])[0]
    assert index(path).samples == 10
    (cached,) = (tmp_path / "cache").rglob("*.npz")
    cached.write_bytes(cached.read_bytes()[:300])
    assert index(path).samples == 10
    path.unlink()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        index(path)


def test_duplicate_members_are_a_bad_sample(tmp_path: Path) -> None:
    members = sample(1)
    path = write_shard(tmp_path / "a.tar", [("x", members), ("y", members), ("y", {"txt": b"again"})])
    assert [s.problem for s in read_samples(ShardFile(STORE, str(path)), 0, 2)] == ["", "duplicate_member"]


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ("nope-{0..2}.tar", "3 of 3 shards do not exist, first nope-0.tar (data.root is not set"),
        ("", "names no shard"),
        ("{0..", "unbalanced braces|do not exist"),
    ],
)
def test_wrong_shards_are_one_line(shards: str, message: str) -> None:
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        expand_shards(shards, None, "data.train.shards", STORE)


def test_sources(tmp_path: Path) -> None:
    write_shards(tmp_path, [1, 1, 1])
    one = expand_shards("{00000..00001}.tar::00002.tar", str(tmp_path), "k", STORE)
    assert [(f.name, f.source) for f in one] == [("00000.tar", 0), ("00001.tar", 0), ("00002.tar", 0)]
    two = expand_shards(["{00000..00001}.tar", "00002.tar"], str(tmp_path), "k", STORE)
    assert [f.source for f in two] == [0, 0, 1]


def test_workers_run_the_code_of_the_trainer(
    tmp_path: Path, files: list[ShardFile], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clipscale").mkdir()
    (tmp_path / "clipscale" / "__init__.py").write_text("raise SystemExit('another clipscale')")
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "train.py"
    script.write_text(
        "import sys\n"
        "from clipscale.distributed.workers import worker_context\n"
        "if __name__ == '__main__':\n"
        "    import clipscale, signal\n"
        "    ended = (signal.SIGTERM, signal.SIG_DFL)\n"
        "    with worker_context(['clipscale.data.order']).Pool(1, signal.signal, ended) as pool:\n"
        "        sys.exit(pool.apply(eval, (\"__import__('clipscale').__file__\",)) != clipscale.__file__)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
