"""A run goes on in any other layout and world size as it would have gone on in its own, to five digits of the loss."""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from clipscale.checkpoint import Checkpointer, Saved
from clipscale.config import compose
from clipscale.data.io import ShardStore
from tests.buckets import BUCKET, s3_server, sign_in, storage
from tests.distributed.test_parallel import B, advance, build, small

LAYOUTS = {
    "plain@1": (1, "parallel=ddp"),
    "ddp@2": (2, "parallel=ddp"),
    "fsdp@2": (2, "parallel=fsdp"),
    "fsdp@4": (4, "parallel=fsdp"),
}
STEPS = 3
PAIRS = list(product(LAYOUTS, LAYOUTS))
DRAWN = random.Random(7).sample(PAIRS, 6)


def saver_of(place: str, address: str | None, scratch: Path) -> Checkpointer:
    if address is None:
        return Checkpointer(place, keep_last=1)
    sign_in()
    return Checkpointer(place, 1, ShardStore(storage(address)), scratch)


def save(layout: str, place: str, address: str | None, scratch: Path) -> list[float]:
    """Two steps, a checkpoint, and the losses of the steps that follow it undisturbed."""
    config, _ = compose([layout])
    config.model = small("vit")
    step = build(config)
    assert step.ema is not None
    advance(step, 0, 2)
    saver = saver_of(place, address, scratch)
    saver.save(step.model, step.optimizer, step.ema.state_dict(), Saved(samples_seen=2 * B, step=2, positions=[1]))
    losses = advance(step, 2, STEPS)  # while it is being written
    saver.wait()
    return losses


def go_on(layout: str, place: str, address: str | None, scratch: Path) -> list[float]:
    """The same steps by a model that was drawn from another seed, from the checkpoint."""
    config, _ = compose([layout, "seed=7"])
    config.model = small("vit")
    step = build(config)
    assert step.ema is not None
    saver = saver_of(place, address, scratch)
    newest = saver.newest()
    assert newest is not None
    saved = saver.restore(newest, step.model, step.optimizer, step.ema.state_dict())
    assert (saved.samples_seen, saved.step, saved.positions) == (2 * B, 2, [1])
    step.config.seed = 0
    return advance(step, 2, STEPS)


def run(pools: Any, function: Any, name: str, *arguments: Any) -> list[float]:
    world, layout = LAYOUTS[name]
    return pools[world].run(function, layout, *arguments)[0] if world > 1 else function(layout, *arguments)


def check(pools: Any, before: str, after: str, place: str, address: str | None, scratch: Path) -> None:
    undisturbed = run(pools, save, before, place, address, scratch / "one")
    went_on = run(pools, go_on, after, place, address, scratch / "two")
    print(f"{before:8} to {after:8}", [f"{loss:.7f}" for loss in undisturbed], [f"{loss:.7f}" for loss in went_on])
    assert went_on == pytest.approx(undisturbed, rel=1e-5)


@pytest.mark.parametrize(("before", "after"), DRAWN, ids="-to-".join)
def test_any_layout_loads_any_other(pools: Any, tmp_path: Path, before: str, after: str) -> None:
    check(pools, before, after, str(tmp_path / "checkpoints"), None, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), PAIRS, ids="-to-".join)
def test_every_layout_loads_every_other(pools: Any, tmp_path: Path, before: str, after: str) -> None:
    check(pools, before, after, str(tmp_path / "checkpoints"), None, tmp_path)


def test_a_bucket_is_between_machines_that_share_no_disk(pools: Any, tmp_path: Path) -> None:
    with s3_server() as address:
        check(pools, "fsdp@2", "plain@1", f"s3://{BUCKET}/a/checkpoints", address, tmp_path)
