"""The batches of any chain of worlds, workers, stops and resumes are those of the plainest implementation."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike

from clipscale.data import loader
from clipscale.data.embeddings import StoredTeacher
from clipscale.data.loader import Batch, TrainLoader
from clipscale.data.manifest import ShardFile
from clipscale.data.order import SampleOrder
from clipscale.data.prepare import SampleOptions
from clipscale.data.samples import ImageOptions
from clipscale.data.tokenizer import Tokenizer
from clipscale.errors import DataError
from tests.oracle import NEGATIVES, Expected, Oracle, Starved, Truth
from tests.shards import STORE, WORDS, jpeg

STREAMS = 24
WORLDS, WORKERS = (1, 2, 3, 4, 6, 8), (0, 1, 2, 5)
BAD = ("broken", "empty", "no_image", "no_captions", "twice")
WEIGHTS = (0.25, 0.3, 0.5, 1, 1, 1.5, 2, 3.7)
EXTRAS = {
    "image_ids": True, "negatives_key": "json:negatives", "negatives_per_sample": NEGATIVES,
    "teachers": (StoredTeacher("t.image.npy", "t.text.npy", 16),),
}  # fmt: skip
IMAGE = ImageOptions(8, (0.4, 1.0), (0.75, 4 / 3), 10**6)


@dataclass(frozen=True)
class Stretch:
    """``batches`` of a chain, made by ``world`` ranks with ``workers`` each."""

    world: int
    workers: int
    batches: int


@dataclass(frozen=True)
class Case:
    """Shards, an order over them, and a chain of runs.

    ``counts`` and ``sources`` per shard; ``kinds`` of the bad samples by number; ``cuts``, the share of its bytes that
    a damaged shard keeps; with ``extras``, batches hold what the loss may ask for beside pairs.
    """

    counts: tuple[int, ...]
    sources: tuple[int, ...]
    kinds: Mapping[int, str]
    cuts: Mapping[int, float]
    weights: tuple[float, ...] | None
    seed: int
    window: int
    per_stream: int
    chain: tuple[Stretch, ...]
    extras: bool


def draw_case(seed: int, workers: Sequence[int] = (0,)) -> Case:
    """The case with a number: short and long shards, empty ones, one or more sources, some samples bad."""
    draw = random.Random(seed)
    sources = draw.choice((1, 1, 2, 3))
    longest = draw.choice((2, 8, 30, 120))
    counts, owners = [], []
    for source in range(sources):
        for number in range(draw.randint(1, 7)):
            # The first shard of a source is whole and holds something: a source without samples is refused.
            counts.append(draw.randint(0 if number else 1, longest))
            owners.append(source)
    first = [i for i, owner in enumerate(owners) if owner not in owners[:i]]
    cuts = {i: draw.random() for i in range(len(counts)) if counts[i] and i not in first and draw.random() < 0.2}
    share = draw.choice((0.0, 0.1, 0.4))
    kinds = {n: draw.choice(BAD) for n in range(1, sum(counts)) if draw.random() < share}  # number 0 stays good
    return Case(
        tuple(counts), tuple(owners), kinds, cuts,
        draw.choice((None, tuple(draw.choice(WEIGHTS) for _ in range(sources)))),
        draw.randrange(2**40), draw.choice((1, 2, 5, 16, 1000)), draw.choice((1, 1, 2, 3)),
        tuple(
            Stretch(draw.choice(WORLDS), draw.choice(workers), draw.randint(1, 3))
            for _ in range(draw.randint(1, 4))
        ),
        seed % 3 == 0,
    )  # fmt: skip


def captions(number: int) -> list[str]:
    """One to three captions, some in blanks, some longer than the context."""
    words = [WORDS[int(digit)] for digit in f"{number:03d}"]
    return [f" a {' '.join(words * (1 + i * (number % 4)))} thing {i} " for i in range(1 + number % 3)]


def negatives(number: int) -> list[str]:
    """Two to four different texts and one twice; of some samples, one is a caption, others are equal when cut."""
    texts = [f"{'no ' * (12 * (number % 2))}{word} thing {number} " for word in WORDS[number % 7 :][: 2 + number % 3]]
    return [*texts, texts[0].strip(), *captions(number)[:1]] if number % 3 else texts


def embedding(number: int, place: int) -> list[float]:
    """A teacher's, of the image (place 0) or of a caption: its norm is 1, and so are sums of it exact."""
    return [0.25 if number + 4096 * place >> bit & 1 else -0.25 for bit in range(16)]


@cache
def members(number: int, kind: str, extras: bool) -> list[tuple[str, bytes]]:
    """Suffixes and contents of a sample's files; image and captions take turns in coming first."""
    told: dict[str, Any] = {"captions": ["", " "] if kind == "empty" else ["  ", *captions(number)]}
    if number % 5:
        told["negatives"] = negatives(number)[0] if number % 5 == 1 else [None, *negatives(number), ""]
    files = [
        ("jpg", b"\xff\xd8broken" if kind == "broken" else jpeg(number, 12 + 4 * (number % 3))),
        ("json", json.dumps(told).encode()),
    ]
    if kind == "twice":
        files.append(files[1])
    if extras:
        texts = [[7.0] * 16, *(embedding(number, 1 + i) for i in range(len(captions(number))))]
        files += [("t.image.npy", npy(3 * np.array(embedding(number, 0), np.float16))), ("t.text.npy", npy(texts))]
    if number % 2:
        files.reverse()
    absent = {"no_image": "jpg", "no_captions": "json"}.get(kind)
    return [(suffix, data) for suffix, data in files if suffix != absent]


def npy(values: ArrayLike) -> bytes:
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue()


def truth(name: str, number: int, kind: str, suffixes: Sequence[str], extras: bool) -> Truth:
    """What a sane loader makes of a sample of which these files are whole."""
    if suffixes.count("json") > 1:
        return Truth(name, "duplicate_member")
    if "json" not in suffixes:
        return Truth(name, "no_captions")
    if kind == "empty":
        return Truth(name, "empty_caption")
    if extras and not {"t.image.npy", "t.text.npy"} <= {*suffixes}:
        return Truth(name, "no_teacher_embedding")
    if "jpg" not in suffixes:
        return Truth(name, "no_image")
    if kind == "broken":
        return Truth(name, "undecodable_image")
    told = tuple(caption.strip() for caption in captions(number))
    wrong = negatives(number) if number % 5 else []
    if number % 5 == 1:
        wrong = wrong[:1]
    embeddings = tuple(embedding(number, place) for place in range(1 + len(told)))
    return Truth(name, "", jpeg(number, 12 + 4 * (number % 3)), told, tuple(text.strip() for text in wrong), embeddings)


def write_shard(
    path: Path, numbers: Sequence[int], kinds: Mapping[int, str], cut: float | None, extras: bool
) -> list[Truth]:
    """Write numbered samples, of which ``cut`` keeps a share of the bytes; returns what is left of them."""
    raw, ends = io.BytesIO(), []
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for number in numbers:
            for suffix, data in members(number, kinds.get(number, ""), extras):
                info = tarfile.TarInfo(f"{number:05d}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
                ends.append((number, suffix, raw.tell() - -len(data) % tarfile.BLOCKSIZE))
    content = raw.getvalue() if cut is None else raw.getvalue()[: int(cut * ends[-1][2])]
    path.write_bytes(content)
    left = [(number, suffix) for number, suffix, end in ends if end <= len(content)]
    return [
        truth(f"{path.name}/{number:05d}", number, kinds.get(number, ""), [suffix for _, suffix in files], extras)
        for number, files in groupby(left, key=lambda file: file[0])
    ]


def write(case: Case, directory: Path) -> tuple[list[ShardFile], list[list[Truth]]]:
    """The shards of a case, and what they hold."""
    files, truths, number = [], [], 0
    for i, (count, source) in enumerate(zip(case.counts, case.sources, strict=True)):
        path = directory / f"{i:03d}.tar"
        truths.append(write_shard(path, range(number, number + count), case.kinds, case.cuts.get(i), case.extras))
        files.append(ShardFile(STORE, str(path), source))
        number += count
    return files, truths


def make_order(case: Case, files: Sequence[ShardFile], streams: int = STREAMS) -> SampleOrder:
    shards = [(file.name, file.index.samples, file.source) for file in files]
    return SampleOrder(shards, case.weights, case.seed, streams, case.window)


def make_loader(
    case: Case, files: Sequence[ShardFile], order: SampleOrder, tokenizer: Tokenizer,
    positions: np.ndarray, rank: int, world: int, workers: int,
) -> TrainLoader:  # fmt: skip
    return TrainLoader(
        order, files, positions, rank=rank, world=world, global_batch_size=case.per_stream * order.streams,
        options=SampleOptions(("jpg",), "json:captions", IMAGE, case.seed, **(EXTRAS if case.extras else {})),
        tokenizer=tokenizer, workers=workers, pin_memory=False,
    )  # fmt: skip


def follow(case: Case, files: Sequence[ShardFile], tokenizer: Tokenizer) -> Iterator[Batch]:
    """The global batches of a chain; each stretch begins where the one before it was stopped."""
    order, positions = make_order(case, files), np.zeros(STREAMS, np.int64)
    for stretch in case.chain:
        readers = [
            iter(make_loader(case, files, order, tokenizer, positions, rank, stretch.world, stretch.workers))
            for rank in range(stretch.world)
        ]
        for _ in range(stretch.batches):
            batch = Batch.concatenate([next(reader) for reader in readers])
            positions = batch.positions.numpy()
            yield batch


def check(case: Case, directory: Path, tokenizer: Tokenizer) -> None:
    """Every batch of the chain against the oracle."""
    files, truths = write(case, directory)
    assert [file.index.samples for file in files] == [len(shard) for shard in truths], case
    oracle = Oracle(
        truths, case.sources, case.weights, case.seed, STREAMS, case.window, case.per_stream, IMAGE, tokenizer,
        case.extras,
    )  # fmt: skip
    positions = [0] * STREAMS
    with closing(follow(case, files, tokenizer)) as batches:
        for number in range(sum(stretch.batches for stretch in case.chain)):
            try:
                expected = oracle.batch(positions)
            except Starved:
                with pytest.raises(DataError, match=r"no usable sample for stream|none of the first"):
                    next(batches)
                return
            assert_equal(next(batches), expected, f"batch {number} of {case}")
            positions = expected.positions


def assert_equal(batch: Batch, expected: Expected, what: str) -> None:
    assert batch.keys == expected.keys, what
    assert sorted(batch.bad) == sorted(expected.bad), what
    assert batch.positions.tolist() == expected.positions, what
    assert batch.text_lengths.tolist() == expected.lengths, what
    assert batch.text_ids.tolist() == expected.ids, what
    assert batch.truncated == expected.truncated, what
    assert torch.equal(batch.images, torch.stack(expected.images)), what
    assert batch.caption_ids.tolist() == expected.caption_ids, what
    assert [seed % 2**64 for seed in batch.seeds.tolist()] == expected.seeds, what
    for name in ("image_ids", "negative_ids", "negative_lengths"):
        found = getattr(batch, name)
        assert ([] if found is None else found.tolist()) == getattr(expected, name), f"{name} of {what}"
    for images, texts in batch.teachers:
        assert list(zip(images.tolist(), texts.tolist(), strict=True)) == expected.teacher, what
    assert len(batch.teachers) == bool(expected.teacher), what


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer("clip", 16)


@pytest.fixture(autouse=True)
def sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases in which a worker finds nothing usable end after fewer samples."""
    monkeypatch.setattr(loader, "HOPELESS", 2000)


@pytest.mark.parametrize("seed", range(100))
def test_any_chain_gives_the_batches_of_the_oracle(seed: int, tmp_path: Path, tokenizer: Tokenizer) -> None:
    check(draw_case(seed), tmp_path, tokenizer)


@pytest.mark.parametrize("seed", range(12))
def test_every_sample_comes_once_an_epoch(seed: int, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Without the oracle: one rank a stream and one sample a batch, so that each position shows its sample."""
    drawn = draw_case(seed)
    case = replace(drawn, weights=None, per_stream=1)
    if sum(case.counts) < 100:  # so few, and some of them bad, would starve a stream
        case = replace(case, kinds={}, cuts={})
    files, truths = write(case, tmp_path)
    streams, samples = 6, sum(len(shard) for shard in truths)
    order = make_order(case, files, streams)
    seen: list[Counter[str]] = [Counter() for _ in range(2)]
    for v in range(streams):
        position, ends = 0, [(samples * epoch + streams - 1 - v) // streams for epoch in (1, 2)]
        start = np.zeros(streams, np.int64)
        for batch in make_loader(case, files, order, tokenizer, start, v, streams, workers=0):
            for key in [*(key for _, key in batch.bad), *batch.keys]:
                if position < ends[1]:
                    seen[position >= ends[0]][key] += 1
                position += 1
            assert batch.positions.tolist() == [position], case
            if position >= ends[1]:
                break
    assert seen == [Counter(sample.key for shard in truths for sample in shard)] * 2, case


@pytest.mark.parametrize("seed", range(60))
def test_locate_finds_what_the_streams_read(seed: int, tokenizer: Tokenizer) -> None:
    case = draw_case(1000 + seed)
    truths = [[Truth(f"{i}/{j}") for j in range(count)] for i, count in enumerate(case.counts)]
    shards = [(f"{i}", count, source) for i, (count, source) in enumerate(zip(case.counts, case.sources, strict=True))]
    order = SampleOrder(shards, case.weights, case.seed, STREAMS, case.window)
    oracle = Oracle(truths, case.sources, case.weights, case.seed, STREAMS, case.window, 1, IMAGE, tokenizer)
    draw = random.Random(seed)
    for _ in range(40):
        stream, position = draw.randrange(STREAMS), draw.randrange(60)
        assert tuple(order.locate(stream, position)) == oracle.place(stream, position), case


def test_worker_processes_give_the_batches_of_the_oracle(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """More workers than streams of a rank (8 x 5), than shards; shares that are not equal (24 by 5)."""
    chain = (Stretch(1, 5, 2), Stretch(2, 0, 1), Stretch(8, 5, 1))
    check(replace(draw_case(297), chain=chain), tmp_path, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "workers"), product(WORLDS, WORKERS))
def test_all_worlds_and_workers(world: int, workers: int, tmp_path: Path, tokenizer: Tokenizer) -> None:
    other = Stretch(WORLDS[(WORLDS.index(world) + 1) % len(WORLDS)], WORKERS[(WORKERS.index(workers) + 1) % 4], 1)
    chain = (Stretch(world, workers, 2), other, Stretch(world, workers, 2))
    check(replace(draw_case(world * 10 + workers), chain=chain), tmp_path, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2000, 2030))
def test_many_chains_of_worker_processes(seed: int, tmp_path: Path, tokenizer: Tokenizer) -> None:
    check(draw_case(seed, WORKERS), tmp_path, tokenizer)


@pytest.mark.slow
def test_many_chains(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> None:
    for seed in range(3000, 4000):
        check(draw_case(seed), tmp_path_factory.mktemp("chain"), tokenizer)
