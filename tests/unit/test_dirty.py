"""Realistic damage: what comes out of each damaged sample and shard is what its manifest says a sane loader gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clipscale.data.manifest import ShardFile
from clipscale.data.samples import BadSample, decode_image, find_captions, find_image
from clipscale.data.stream import read_samples
from clipscale.errors import DataError
from tests.shards import STORE

IMAGES = ["jpg", "jpeg", "png", "webp", "gif", "bmp"]


def outcomes(path: Path) -> dict[str, tuple[str, str]]:
    """``(verdict, caption or reason)`` of every sample of a shard, by key."""
    file, found = ShardFile(STORE, str(path)), {}
    for sample in read_samples(file, 0, file.index.samples) if file.index.samples else ():
        key = sample.key.partition("/")[2]
        try:
            if sample.problem:
                raise BadSample(sample.problem)
            caption = find_captions(sample, "txt")[0]
            decode_image(find_image(sample, IMAGES), max_pixels=100_000_000)
            found[key] = ("yield", caption)
        except BadSample as reason:
            found[key] = ("skip", str(reason))
    return found


@pytest.fixture(scope="module")
def manifest(shared_data: Path) -> dict[str, Any]:
    return json.loads((shared_data / "dirty" / "manifest.json").read_text())


def test_every_damaged_sample(shared_data: Path, manifest: dict[str, Any]) -> None:
    shards = {sample["shard"]: outcomes(shared_data / sample["shard"]) for sample in manifest["samples"]}
    assert len(manifest["samples"]) == 65
    for sample in manifest["samples"]:
        verdict, detail = shards[sample["shard"]][sample["key"]]
        assert sample["verdict"] in (verdict, "either"), f"{sample['key']}: {verdict} ({detail}); {sample['note']}"


def test_every_damaged_shard(shared_data: Path, manifest: dict[str, Any]) -> None:
    assert len(manifest["shards"]) == 20
    for shard in manifest["shards"]:
        path = shared_data / shard["file"]
        if shard["bytes"] is None:
            with pytest.raises(DataError, match="No such file"):
                outcomes(path)
            continue
        found = outcomes(path)
        good = {key for key, (verdict, _) in found.items() if verdict == "yield"}
        assert set(shard["must_yield"]) <= good, shard["file"]
        if shard["verdict"] == "yield_then_warn":
            assert good == set(shard["must_yield"]) and ShardFile(STORE, str(path)).index.damage
        if shard["verdict"] in ("skip_shard", "skip_or_error"):
            assert not good, shard["file"]
