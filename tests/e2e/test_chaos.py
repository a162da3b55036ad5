"""Whatever happens to a run, it ends as the one that nobody disturbed, or says why not; and nothing hangs."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from clipscale.config import compose
from clipscale.data.io import ShardStore
from clipscale.data.stream import read_samples
from clipscale.distributed.runtime import Runtime
from clipscale.trainer.build import build_train_data, place_data
from tests.chaos import BATCH, POISONED, STEPS, Fault, Victim, draw_faults, recipe, strike
from tests.conftest import SHARED_DATA
from tests.runs import keys, losses

SHAPES = [f"data.shapes.{size}" for size in ("train=512", "val=32", "classes=24", "per_class=2", "image_size=32")]


def data() -> list[str]:
    """The real shards where they are, the built-in scenes elsewhere."""
    if SHARED_DATA.is_dir():
        return ["experiment=emoji", f"data.root={SHARED_DATA}"]
    return ["experiment=demo", *SHAPES]


def first_samples(arguments: list[str], steps: Sequence[int]) -> list[str]:
    """The keys of the first samples of some steps, by the order alone."""
    config, _ = compose(arguments)
    config.data.window = None
    alone = Runtime(0, 1, 0, torch.device("cpu"))
    train = build_train_data(config, place_data(config.data, alone), ShardStore(config.storage), alone)
    found = []
    for step in steps:
        place = train.order.locate(0, (step - 1) * BATCH // train.order.streams)
        found += [one.key for one in read_samples(train.files[place.shard], place.sample, place.sample + 1)]
    return found


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Victim]:
    """A recipe, and the run of it to which nothing happens but samples that make training go wrong."""
    runs = tmp_path_factory.mktemp("chaos")
    arguments = recipe(runs, data())
    undisturbed = Victim(runs / "undisturbed", arguments, first_samples(arguments, POISONED))
    undisturbed.start(1)
    assert undisturbed.ended() == 0, undisturbed.said
    assert undisturbed.events("skipped_step") and len(undisturbed.events("rolled_back")) == 1
    return arguments, undisturbed


def assert_equal_so_far(victim: Victim, truth: Victim) -> int:
    """Samples and losses of all steps there are; returns how many."""
    ours, theirs = losses(victim.path), losses(truth.path)
    assert list(ours) == list(theirs)[: len(ours)]
    for seen, loss in ours.items():
        assert loss == pytest.approx(theirs[seen], abs=1e-5 * max(1.0, abs(theirs[seen] or 0))), seen
    traced, expected = keys(victim.path), keys(truth.path)
    assert all(traced[seen // BATCH] == expected[seen // BATCH] for seen in ours)
    return len(ours)


def campaign(arguments: Sequence[str], truth: Victim, faults: Sequence[Fault], table: Path) -> None:
    """Let the faults happen that are not in the table yet; a run that is done makes room for the next one."""
    done = len(table.read_text().splitlines()) if table.exists() else 0
    number, victim = done, None
    while number < len(faults):
        if victim is None:
            victim = Victim(truth.path.with_name(f"victim-{number}"), list(arguments), truth.poison)
        fault = faults[number]
        try:
            outcome = strike(victim, fault)
        except BaseException:
            victim.kill()
            print(f"{fault}: {victim.said[-1:]}")
            raise
        row = {"number": number, **fault._asdict(), "step": victim.step(), "outcome": outcome}
        number += 1
        if victim.step() >= STEPS - 12 or number == len(faults):
            row["end"] = finish(victim, truth)
            victim = None
        with table.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(*row.values(), sep=" | ", flush=True)


def finish(victim: Victim, truth: Victim) -> str:
    """Let a run end, and hold it against the undisturbed one."""
    if victim.process is None or victim.process.poll() is not None:
        victim.start(2)
    code = victim.ended()
    assert code == 0, victim.said
    assert assert_equal_so_far(victim, truth) == STEPS
    assert len(victim.events("done")) >= 1
    return f"equal after {len(victim.events('started'))} starts"


def test_two_faults(truth: tuple[list[str], Victim], tmp_path: Path) -> None:
    campaign(*truth, [Fault("kill a rank", 2, 9, 1), Fault("flip a byte", 1, 9, 12345)], tmp_path / "table.jsonl")


@pytest.mark.slow
def test_many_faults(truth: tuple[list[str], Victim], tmp_path: Path) -> None:
    """CLIPSCALE_CHAOS_TABLE names a table that is gone on with."""
    table = Path(os.environ.get("CLIPSCALE_CHAOS_TABLE", tmp_path / "table.jsonl"))
    campaign(*truth, draw_faults(int(os.environ.get("CLIPSCALE_CHAOS_SEED", 0)), 54), table)


@pytest.mark.slow
def test_a_rank_that_dies_once_too_often_is_named(truth: tuple[list[str], Victim]) -> None:
    arguments, undisturbed = truth
    victim = Victim(undisturbed.path.with_name("once"), [*arguments, "cluster.max_restarts=0"], [])
    victim.start(2)
    victim.wait_for(lambda: victim.step() > 3)
    os.kill(victim.ranks()[1], signal.SIGKILL)
    assert victim.ended() == 1
    assert "error: rank 1 was ended by SIGKILL; see " in victim.said[-1] and "Traceback" not in victim.said[-1]
    assert json.loads((victim.path / "result.json").read_text())["error"] == "rank 1 was ended by SIGKILL"
    victim.start(1)
    assert victim.ended() == 0
