"""What batches hold beside the pairs: ids that tell duplicates, hard negatives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipscale.data.loader import Batch, TrainLoader
from clipscale.data.manifest import ShardFile, expand_shards, summarise
from clipscale.data.order import SampleOrder
from clipscale.data.prepare import SampleOptions
from clipscale.data.samples import ImageOptions, caption_ids
from clipscale.data.synthetic import SyntheticLoader
from clipscale.data.tokenizer import Tokenizer
from clipscale.errors import DataError
from clipscale.trainer.probe import require_negatives
from tests.shards import STORE, jpeg, shard_files, write_shard, write_shards

SEED, STREAMS = 5, 4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer("clip", 16)


def first_batch(files: list[ShardFile], tokenizer: Tokenizer, batch: int, **given: Any) -> Batch:
    """The first batch of one rank."""
    order = SampleOrder([(file.name, file.summary.samples, file.source) for file in files], None, SEED, STREAMS, 4)
    image = ImageOptions(16, (0.5, 1.0), (0.75, 4 / 3), 10**6)
    loader = TrainLoader(
        order, files, np.zeros(STREAMS, np.int64), rank=0, world=1, global_batch_size=batch,
        options=SampleOptions(("jpg",), given.pop("caption_key", "txt"), image, SEED, **given), tokenizer=tokenizer,
        workers=0, pin_memory=False,
    )  # fmt: skip
    return next(iter(loader))


def test_ids_are_the_same_on_every_machine() -> None:
    ids = caption_ids([np.array([1, 2, 3], np.int32), np.array([1, 2], np.int32), np.array([1, 2, 3], ">i4")])
    assert ids.dtype == torch.int64 and ids.tolist() == [
        -7044357283931317034,
        -1871280535689632213,
        -7044357283931317034,
    ]


def test_equal_pairs_have_equal_ids_in_tars_and_tables(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Sixteen samples of two images and eight captions, which differ in what the tokenizer does not see."""
    texts = [f"{'A' if n % 2 else ' a'} thing  {n % 8}" for n in range(16)]
    tars = shard_files(
        write_shards(tmp_path, [16], {n: {"jpg": jpeg(n % 2), "txt": texts[n].encode()} for n in range(16)})
    )
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(jpeg(number))
    rows = [f"{n % 2}.png,{text}" for n, text in enumerate(texts)]
    (tmp_path / "pairs.csv").write_text("\n".join(["filepath,caption", *rows]) + "\n")
    tables = expand_shards(str(tmp_path / "pairs.csv"), None, "data.train.shards", STORE)
    ids = []
    for files in (tars, tables):
        batch = first_batch(files, tokenizer, 16, image_ids=True)
        numbers = [int(key.rpartition("/")[2]) for key in batch.keys]
        assert sorted(numbers) == list(range(16)) and batch.image_ids is not None
        by_number = dict(
            zip(numbers, zip(batch.caption_ids.tolist(), batch.image_ids.tolist(), strict=True), strict=True)
        )
        assert len({caption for caption, _ in by_number.values()}) == 8
        assert all(by_number[n][0] == by_number[n % 8][0] and by_number[n][1] == by_number[n % 2][1] for n in range(16))
        ids.append(by_number)
    assert ids[0] == ids[1]
    assert first_batch(tars, tokenizer, 8).image_ids is None


def test_synthetic_batches_have_ids(tokenizer: Tokenizer) -> None:
    order, batches = SampleOrder([("synthetic", 64)], None, SEED, STREAMS, 4), []
    for rank, image_ids in ((0, True), (1, True), (0, False)):
        loader = SyntheticLoader(
            order, np.zeros(STREAMS, np.int64), rank=rank, world=2, global_batch_size=16, image_size=8,
            tokenizer=tokenizer, pin_memory=False, image_ids=image_ids,
        )  # fmt: skip
        batches.append(next(iter(loader)))
    whole = Batch.concatenate(batches[:2])
    assert whole.image_ids is not None and len(whole.image_ids.unique()) == len(whole.caption_ids.unique()) == 16
    assert batches[2].image_ids is None and torch.equal(batches[2].caption_ids, batches[0].caption_ids)


def test_negatives_disturb_no_other_draw(tmp_path: Path, tokenizer: Tokenizer) -> None:
    fields = [{"captions": [f"a {n}", f"b {n}"], "negatives": [f"no {n}", f"not {n}", f"never {n}"]} for n in range(16)]
    members = {n: {"jpg": jpeg(n), "json": json.dumps(fields[n]).encode()} for n in range(16)}
    files = shard_files(write_shards(tmp_path, [16], members))
    plain = first_batch(files, tokenizer, 16, caption_key="json:captions")
    with_some = first_batch(
        files, tokenizer, 16, caption_key="json:captions", negatives_key="json:negatives", negatives_per_sample=2
    )
    assert plain.negative_ids is plain.negative_lengths is None
    for name in ("images", "text_ids", "text_lengths", "positions", "caption_ids", "seeds"):
        assert torch.equal(getattr(plain, name), getattr(with_some, name)), name
    assert with_some.negative_ids is not None and with_some.negative_lengths is not None
    drawn = with_some.negative_ids.split(with_some.negative_lengths.tolist())
    numbers = [int(key.rpartition("/")[2]) for key in plain.keys]
    for number, pair in zip(numbers, zip(drawn[::2], drawn[1::2], strict=True), strict=True):
        wanted = {tuple(tokenizer.encode(text)[0].tolist()) for text in fields[number]["negatives"]}
        assert {tuple(ids.tolist()) for ids in pair} < wanted and not torch.equal(*pair)


def test_negatives_may_be_fewer_or_one_text_and_are_cleaned(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [b"<b>no</b> dog", b"www.example.org", b"dog", b"\xff", None]  # the third is the caption
    samples = [{"jpg": jpeg(n), "txt": b"dog"} | ({"neg.txt": text} if text else {}) for n, text in enumerate(texts)]
    path = write_shard(tmp_path / "a.tar", [(str(n), one) for n, one in enumerate([*samples, *samples[:3]])])
    batch = first_batch(
        shard_files([path]), tokenizer, 8, clean_captions=True, negatives_key="neg.txt", negatives_per_sample=2
    )
    assert batch.negative_ids is not None and batch.negative_lengths is not None and not batch.bad
    ids = tokenizer.encode("no dog")[0].tolist()
    present = [int(key.rpartition("/")[2]) in (0, 5) for key in batch.keys]
    assert batch.negative_ids.tolist() == ids * 2
    assert batch.negative_lengths.tolist() == [n for here in present for n in (len(ids) * here, 0)]


def test_a_wrong_key_of_negatives_is_told(tmp_path: Path) -> None:
    """One source of many may have negatives; that none has is a mistake."""
    negatives = {"jpg": jpeg(0), "json": json.dumps({"captions": ["a"], "negatives": ["b"]}).encode()}
    files = shard_files(write_shards(tmp_path, [3] * 70, dict.fromkeys(range(3 * 66, 3 * 67), negatives)))
    require_negatives(files, summarise(files), "json:negatives")
    says = (
        r"negatives_key=json:negative: none of the 105 samples .* holds jpg, json \(captions, label, name\), txt; null"
    )
    with pytest.raises(DataError, match=says):
        require_negatives(files, summarise(files), "json:negative")
