"""Checkpoints in a bucket: as in a directory, and what is local is only on its way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from clipscale.checkpoint import Checkpointer, Saved
from clipscale.checkpoint.manifest import MANIFEST
from clipscale.checkpoint.places import PINNED, fetch, finished_in
from clipscale.data.io import ShardStore
from clipscale.errors import SaveError
from tests.buckets import BUCKET, KEYS, s3_server, storage

PLACE = f"s3://{BUCKET}/runs/a/checkpoints"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in KEYS.items():
        monkeypatch.setenv(key, value)


def test_a_bucket_is_as_good_as_a_directory(address: str, tmp_path: Path) -> None:
    store = ShardStore(storage(address))
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    first = Checkpointer(PLACE, 2, store, tmp_path / "one")
    assert first.newest() is None and first.clean() == []
    for step in (1, 2, 3, 4):
        first.save(model, optimizer, {}, Saved(step=step, positions=[step]))
        first.wait()
        if step == 1:
            store.write(f"{PLACE}/step_00000001/{PINNED}", b"")
    assert [stored.step for stored in finished_in(PLACE, store)] == [4, 3, 1]
    assert not list((tmp_path / "one").iterdir())

    # Another machine, with nothing of it: a flipped byte, a missing file and an unfinished upload.
    flipped = f"{PLACE}/step_00000004/__0_0.distcp"
    content = bytearray(store.open_stored(flipped).read())
    content[len(content) // 2] ^= 1
    store.write(flipped, bytes(content))
    store.remove(f"{PLACE}/step_00000003/.metadata")
    store.write(f"{PLACE}/step_00000005/__0_0.distcp", b"half")
    second = Checkpointer(PLACE, 2, store, tmp_path / "two")
    newest = second.newest()
    assert newest is not None and newest.step == 1
    assert second.damaged.keys() == {"step_00000004", "step_00000003"}
    assert second.clean() == ["step_00000005"]
    other = torch.nn.Linear(4, 3)
    assert second.restore(newest, other, torch.optim.AdamW(other.parameters()), {}).positions == [1]
    assert torch.equal(other.weight, model.weight)
    copied = fetch(newest, tmp_path / "fetched")
    assert (copied / MANIFEST).exists() and fetch(newest, tmp_path / "fetched") == copied


def test_a_store_that_is_gone_is_one_line(tmp_path: Path) -> None:
    settings = storage("http://127.0.0.1:1")
    settings.retries = 0
    saver = Checkpointer(PLACE, 1, ShardStore(settings), tmp_path)
    model = torch.nn.Linear(4, 3)
    saver.save(model, torch.optim.AdamW(model.parameters()), {}, Saved(step=1))
    with pytest.raises(SaveError, match=r"s3://models/.* cannot be written: ") as caught:
        saver.wait()
    assert "\n" not in str(caught.value)
