"""What a run does about batches on which training goes wrong: it skips, goes back and around them, or stops."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch

from clipscale.checkpoint import Checkpointer, Saved
from clipscale.config import compose, validate
from clipscale.config.rundir import open_run
from clipscale.data.manifest import ShardFile
from clipscale.data.order import SampleOrder, stretches
from clipscale.data.stream import read_stream
from clipscale.distributed.runtime import Runtime
from clipscale.errors import ConfigError, DivergedError, ExitCode
from clipscale.models import Features
from clipscale.train import train
from clipscale.trainer.divergence import Divergence, Passed, diverged_samples
from clipscale.trainer.step import TrainStep
from tests.runs import events, keys, losses, rows
from tests.shards import STORE, write_shards

BATCH, STEPS = 16, 16
Train = Callable[..., Path]


@pytest.mark.parametrize(
    ("position", "skipped", "expected"),
    [
        (3, [], [(3, None)]),
        (0, [(4, 6)], [(0, 4), (6, None)]),
        (4, [(4, 6)], [(6, None)]),
        (5, [(4, 6)], [(6, None)]),
        (6, [(4, 6)], [(6, None)]),
        (0, [(8, 9), (2, 5), (3, 4), (5, 6)], [(0, 2), (6, 8), (9, None)]),
    ],
)
def test_stretches(position: int, skipped: list[tuple[int, int]], expected: list[tuple[int, int | None]]) -> None:
    assert list(stretches(position, skipped)) == expected


def test_a_stream_jumps_from_any_cursor(tmp_path: Path) -> None:
    """What comes after a position does not depend on where reading began: before a range, in it or behind it."""
    write_shards(tmp_path, [30, 25])
    files = [ShardFile(STORE, str(tmp_path / f"{i:05}.tar")) for i in range(2)]
    order = SampleOrder([("a", 30), ("b", 25)], None, 3, 4, 5)
    plain = list(islice(read_stream(order, files, 2, 0), 60))
    skipped = [(20, 33), (7, 9)]
    kept = [(p, s.key) for p, s in plain if not any(a <= p < b for a, b in skipped)]
    for start in range(40):
        expected = [one for one in kept if one[0] >= start][:15]
        found = [(p, s.key) for p, s in islice(read_stream(order, files, 2, start, skipped), 15)]
        assert found == expected, start


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_shards(root, [150, 150, 150])
    return root


def train_here(data: Path, runs: Path, *overrides: str) -> Path:
    """Trains in this process; returns the run's directory."""
    config, experiment = compose(
        [
            f"runs_dir={runs}", "name=run", "data=shards", f"data.root={data}", "data.workers=0",
            "data.train.shards={00000..00002}.tar", "data.trace=true", "tracking=disabled",
            f"global_batch_size={BATCH}", f"total_samples={BATCH * STEPS}", "schedule.warmup_samples=0",
            f"checkpoint.every_samples={BATCH * 4}", "tracking.log_every_steps=1", "ema.decay=0.9",
            "model.vision.image_size=16", "model.vision.patch_size=8", "model.vision.width=32",
            "model.vision.layers=1", "model.vision.heads=2", "model.text.width=32", "model.text.layers=1",
            "model.text.heads=2", "model.embed_dim=16", "model.context_length=12", "device=cpu", *overrides,
        ]
    )  # fmt: skip
    run = open_run(config, experiment, list(overrides))
    assert train(config, run.path) is ExitCode.DONE
    return run.path


@pytest.fixture(scope="module")
def truth(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on which nothing goes wrong."""
    return train_here(data, tmp_path_factory.mktemp("truth"))


@pytest.fixture
def go(data: Path, tmp_path: Path) -> Train:
    return partial(train_here, data, tmp_path)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Keys of samples on which the image tower gives what is no number."""
    bad: set[str] = set()
    forward = TrainStep._features

    def features(step: TrainStep, batch, ahead) -> Features:
        found = forward(step, batch, ahead)
        hit = [key in bad for key in batch.keys]
        image = found.image.clone()
        image[hit] *= float("nan")
        return found._replace(image=image)

    monkeypatch.setattr(TrainStep, "_features", features)
    return bad


def last_saved(path: Path) -> Saved:
    stored = Checkpointer(path / "checkpoints", 1).newest()
    assert stored is not None
    return stored.manifest().saved


def named(path: Path) -> Counter:
    lines = [line for file in (path / "diverged").iterdir() for line in file.read_text().splitlines()]
    return Counter(row["reason"] for row in map(json.loads, lines))


def test_a_bad_batch_is_skipped_and_told(go: Train, truth: Path, poison: set[str]) -> None:
    poison.add(keys(truth)[6][3])
    path = go()
    assert keys(path) == keys(truth), "the batch is part of the stream, it only moves nothing"
    ours, theirs = losses(path), losses(truth)
    assert ours[6 * BATCH] is None and all(ours[i * BATCH] == theirs[i * BATCH] for i in range(1, 6))
    assert ours[7 * BATCH] != theirs[7 * BATCH]
    assert {row["train/skipped_steps"] for row in rows(path) if row["step"] >= 6 and "train/loss" in row} == {1.0}
    (event,) = events(path, "skipped_step")
    assert (event["step"], event["bad"]) == (6, True) and named(path) == {"skipped": BATCH}
    assert last_saved(path).skipped_steps == 1


def test_too_many_and_the_run_goes_around_them(go: Train, truth: Path, poison: set[str]) -> None:
    """The window is passed over: what was before it is trained again as it was, and what follows is what followed."""
    poison.update(keys(truth)[step][0] for step in (10, 11))
    path = go("divergence.bad_steps=2", "divergence.within_steps=3", "divergence.max_rollbacks=1")
    (event,) = events(path, "rolled_back")
    assert (event["step"], event["to"], event["bad_steps"]) == (11, 8 * BATCH, [10, 11])
    assert event["passed_over"] == [9, 11] and named(path) == {"skipped": 2 * BATCH, "diverged": 3 * BATCH}
    ours, theirs = keys(path), keys(truth)
    # Steps 9, 10 and 11 were the window; the checkpoint is that of step 8, so the run goes on with the batch of 12.
    assert [ours[step] for step in range(1, 9)] == [theirs[step] for step in range(1, 9)]
    assert [ours[step] for step in range(9, STEPS - 2)] == [theirs[step] for step in range(12, STEPS + 1)]
    assert list(losses(path)) == [BATCH * (i + 1) for i in range(STEPS)]
    saved = last_saved(path)
    assert (saved.rollbacks, saved.skipped_steps, len(saved.skipped)) == (1, 0, 1)
    last = [row for row in rows(path) if "train/loss" in row][-1]
    assert last["train/diverged_samples"] == 3 * BATCH


def test_what_is_passed_over_survives_a_resume(go: Train, truth: Path, poison: set[str]) -> None:
    """Verdicts are read a step late here, and the checkpoint lies before the window, to which the run trains up."""
    poison.update(keys(truth)[step][0] for step in (9, 10))
    rule = [
        "divergence.bad_steps=2",
        "divergence.within_steps=4",
        "schedule=constant",
        "tracking.log_every_steps=50",
        "checkpoint.keep_last=9",
    ]
    go(*rule, f"total_samples={BATCH * 9}")
    path = go(*rule)
    ours, theirs = keys(path), keys(truth)
    (event,) = events(path, "rolled_back")
    assert (event["step"], event["to"], event["passed_over"]) == (11, 4 * BATCH, [8, 11])
    assert [ours[step] for step in range(1, 8)] == [theirs[step] for step in range(1, 8)]
    assert [ours[step] for step in range(8, STEPS - 3)] == [theirs[step] for step in range(12, STEPS + 1)]
    saved = last_saved(path)
    assert (saved.rollbacks, saved.jumps, len(saved.skipped)) == (1, [], 1) and len(events(path, "started")) == 2


@pytest.mark.parametrize(("ahead", "expected"), [(30, [[15, 320], [25, 400]]), (20, [[15, 400]])])
def test_wrong_again_on_the_way_to_a_window(tmp_path: Path, ahead: int, expected: list[list[int]]) -> None:
    """The window ahead is as far behind the new one as it was; one that follows at once is one with it."""
    judge = Divergence(compose([])[0], tmp_path, Runtime(0, 1, 0, torch.device("cpu")))
    before = Saved(step=19, jumps=[[ahead, 400]], bad_steps=[19, 20])
    judge.resumed(before, 1, torch.tensor([300]))
    before.step = 20
    now = Saved(step=8)
    assert "19, 20 were bad; back to step 8, and around the batches from step 16 to 20" in judge.skip(
        Passed(15, [320]), now
    )
    assert now.jumps == expected
    judge.resumed(now, 1, torch.tensor([128]))
    assert now.skipped == []
    now.step = 15
    assert judge.arrived(torch.tensor([240])) and not judge.arrived(torch.tensor([240]))
    assert now.skipped == [[[240], expected[0][1:]]] and now.jumps == expected[1:]


def test_what_is_passed_over_twice_counts_once() -> None:
    saved = Saved(skipped=[[[10, 10], [20, 15]], [[5, 12], [25, 18]]])
    assert diverged_samples(saved) == 20 + 8


def test_again_and_again_it_stops(go: Train, truth: Path, poison: set[str]) -> None:
    poison.update(key for step, batch in keys(truth).items() if step >= 7 for key in batch)
    with pytest.raises(DivergedError, match=r"gone back 2 times \(divergence.max_rollbacks=2\); lower optim.lr"):
        go("divergence.bad_steps=2", "divergence.within_steps=3", "divergence.max_rollbacks=2")
    assert DivergedError.exit_code == ExitCode.DIVERGED


def test_with_nowhere_to_go_back_to_it_stops(go: Train, truth: Path, poison: set[str]) -> None:
    poison.update(key for batch in keys(truth).values() for key in batch)
    with pytest.raises(DivergedError, match="no checkpoint to go back to"):
        go("divergence.bad_steps=2", "divergence.within_steps=3")


def test_a_spike_is_bad_where_a_factor_says_so(go: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """The update of a spike has been made when it is known: only going back undoes it."""
    forward, spikes = TrainStep._backward, [10, 11]

    def backward(step: TrainStep, batch, samples_seen, stats):
        loss = forward(step, batch, samples_seen, stats)
        if spikes and samples_seen // BATCH + 1 == spikes[0]:
            del spikes[0]
            return loss * 10
        return loss

    monkeypatch.setattr(TrainStep, "_backward", backward)
    path = go("divergence.bad_steps=2", "divergence.within_steps=4", "divergence.spike_factor=3")
    (event,) = events(path, "rolled_back")
    assert (event["step"], event["to"], event["bad_steps"]) == (11, 4 * BATCH, [10, 11])
    assert named(path) == {"diverged": 4 * BATCH}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["divergence.spike_factor=0.5"], "divergence.spike_factor=0.5 must be above 1"),
        (["divergence.bad_steps=9", "divergence.within_steps=5"], "divergence.bad_steps=9 must lie between 1 and"),
        (["divergence.max_rollbacks=-1"], "divergence.max_rollbacks=-1 must be 0 or more"),
    ],
)
def test_rules_that_cannot_be(overrides: list[str], message: str) -> None:
    config, _ = compose(overrides)
    with pytest.raises(ConfigError, match=message):
        validate(config)
