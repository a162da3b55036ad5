"""kill -9 at random moments, again and again: the stream of samples goes on, on any world size, and so do the bits."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from clipscale.checkpoint.manifest import MANIFEST
from clipscale.config.rundir import count_events
from tests.conftest import SHARED_DATA
from tests.runs import command, keys, kill_everything, losses, run

BATCH, EVERY = 64, 4  # samples a step, steps between checkpoints
FEW = 16  # steps of the runs that are killed once
PATIENCE_S = 240


class Kill(NamedTuple):
    """When a run of ``world`` processes is killed.

    ``starting``: ``seconds`` after the command. ``stepping``: ``seconds`` after it made ``steps`` more steps.
    ``saving``: ``seconds`` into the first save that comes after ``steps`` more steps.
    """

    world: int
    moment: str
    steps: int
    seconds: float


def draw_kills(seed: int, worlds: Sequence[int], moments: Sequence[str], most_steps: int) -> list[Kill]:
    """A kill for each entry of ``worlds``; ``moments`` come in turn."""
    draw = random.Random(seed)
    longest = {"starting": 15.0, "stepping": 0.2, "saving": 0.5}
    kills = []
    for i, world in enumerate(worlds):
        moment = moments[i % len(moments)]
        kills.append(Kill(world, moment, draw.randint(1, most_steps), draw.uniform(0.0, longest[moment])))
    return kills


def emoji(runs: Path, steps: int) -> list[str]:
    """The recipe of the real shards, made short."""
    return [
        "experiment=emoji", f"data.root={SHARED_DATA}", f"runs_dir={runs}", "data.trace=true", "data.workers=1",
        f"global_batch_size={BATCH}", f"total_samples={BATCH * steps}", "schedule.warmup_samples=512",
        f"checkpoint.every_samples={BATCH * EVERY}", "tracking=disabled", "tracking.log_every_steps=1",
    ]  # fmt: skip


def shapes(runs: Path, steps: int) -> list[str]:
    """The same on the built-in scenes."""
    sizes = ["train=512", "val=32", "classes=24", "per_class=2", "image_size=32"]
    return [
        *emoji(runs, steps)[2:], "experiment=demo", "model.vision.image_size=32",
        *(f"data.shapes.{size}" for size in sizes),
    ]  # fmt: skip


def finished(path: Path) -> list[int]:
    """Steps of the checkpoints whose manifest stands."""
    return sorted(int(file.parent.name.removeprefix("step_")) for file in path.glob(f"checkpoints/step_*/{MANIFEST}"))


def unfinished(path: Path) -> list[str]:
    """Checkpoints that are being written, or were when somebody killed the run."""
    folders = path.glob("checkpoints/step_*")
    return sorted(folder.name for folder in folders if not (folder / MANIFEST).exists())


def last_step(path: Path, attempt: int) -> int:
    """The last step that an attempt traced, 0 if none."""
    trace = path / "trace" / "rank0.jsonl"
    lines = trace.read_text().splitlines() if trace.exists() else []
    return max((row["step"] for row in map(json.loads, lines) if row["attempt"] == attempt), default=0)


def strike(path: Path, arguments: Sequence[str], kill: Kill) -> dict[str, Any]:
    """Start a run, kill all of it at the appointed moment, and tell what was met."""
    attempt, goal = 1 + count_events(path, "started"), max(finished(path), default=0) + kill.steps
    process = subprocess.Popen(
        command(*arguments, f"cluster.processes_per_node={kill.world}"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + PATIENCE_S

    def is_time() -> bool:
        if kill.moment == "starting":
            return True
        return last_step(path, attempt) >= goal and (kill.moment == "stepping" or bool(unfinished(path)))

    while process.poll() is None and time.monotonic() < deadline and not is_time():
        time.sleep(0.005)
    time.sleep(kill.seconds)
    alive, reached = process.poll() is None, is_time()
    output = kill_everything(process, path)
    assert alive, f"the run ended before {kill}:\n{output}"
    assert time.monotonic() < deadline, f"{kill} never came ({reached=}):\n{output}"
    seen = max(last_step(path, attempt), 0) * BATCH
    return {**kill._asdict(), "samples_seen": seen or None, "half_saved": ",".join(unfinished(path)) or None}


def campaign(path: Path, arguments: Sequence[str], kills: Sequence[Kill]) -> list[dict[str, Any]]:
    """Kill a run again and again. Returns and prints a row per kill, with the samples of the newest checkpoint."""
    blows = []
    for number, kill in enumerate(kills, start=1):
        blow = strike(path, [*arguments, f"name={path.name}"], kill)
        blows.append(blow | {"checkpoint": max(finished(path), default=0) * BATCH})
        print(number, *(f"{name}={value}" for name, value in blows[-1].items()))
    return blows


def finish(path: Path, arguments: Sequence[str]) -> None:
    """Let a run end, and look from where each of its attempts went on."""
    known = {0, *(step * BATCH for step in finished(path))}
    run(*arguments, f"name={path.name}")
    lines = (path / "events.jsonl").read_text().splitlines()
    starts = [event["samples_seen"] for event in map(json.loads, lines) if event["event"] == "started"]
    print("resumed at", starts)
    assert starts == sorted(starts) and starts[-1] == max(known)


def assert_same_stream(path: Path, truth: Path, steps: int, bound: float) -> None:
    ours, theirs = losses(path), losses(truth)
    assert list(ours) == list(theirs) == [BATCH * (i + 1) for i in range(steps)]
    assert keys(path) == keys(truth)
    furthest = max(abs(ours[seen] - theirs[seen]) for seen in theirs)
    print(f"largest difference of a loss: {furthest:.2e}")
    assert furthest <= bound


def assert_same_bits(path: Path, truth: Path, steps: int, scratch: Path) -> None:
    """Weights and optimizer state, bit for bit."""
    ours, theirs = (tensors(run / "checkpoints" / f"step_{steps:08d}", scratch) for run in (path, truth))
    assert ours.keys() == theirs.keys() and any("exp_avg_sq" in name for name in ours)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    print(f"{len(theirs)} tensors of {sum(t.numel() for t in theirs.values()):,} numbers are equal bit for bit")


def tensors(checkpoint: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by their path of keys."""
    dcp_to_torch_save(checkpoint, scratch / "whole.pt")
    found: dict[str, torch.Tensor] = {}

    def collect(prefix: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[prefix] = value
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                collect(f"{prefix}/{key}", inner)

    collect("", torch.load(scratch / "whole.pt", weights_only=False))
    return found


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, Path]:
    """A recipe, its run that nobody disturbed, and one that was killed while it saved."""
    runs = tmp_path_factory.mktemp("few")
    recipe = emoji(runs, FEW) if SHARED_DATA.is_dir() else shapes(runs, FEW)
    run(*recipe, "name=undisturbed")
    (blow,) = campaign(runs / "killed", recipe, [Kill(1, "saving", EVERY + 1, 0.1)])
    assert blow["samples_seen"] > 0
    return recipe, runs / "undisturbed", runs / "killed"


def copied(path: Path, name: str) -> Path:
    """A copy of a run, to go on from there more than once."""
    shutil.copytree(path, path.with_name(name))
    recorded = path.with_name(name) / "config.yaml"
    recorded.write_text(recorded.read_text().replace(f"name: {path.name}", f"name: {name}"))
    return path.with_name(name)


def test_killed_and_resumed_on_two_processes(killed: tuple[list[str], Path, Path]) -> None:
    recipe, truth, struck = killed
    path = copied(struck, "resized")
    finish(path, [*recipe, "cluster.processes_per_node=2"])
    assert_same_stream(path, truth, FEW, 1e-4)


def test_killed_and_repeated_it_ends_with_the_same_bits(killed: tuple[list[str], Path, Path], tmp_path: Path) -> None:
    recipe, truth, struck = killed
    path = copied(struck, "repeated")
    finish(path, recipe)
    assert_same_stream(path, truth, FEW, 0.0)
    assert_same_bits(path, truth, FEW, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("shared_data")
def test_many_kills_on_changing_world_sizes(tmp_path: Path) -> None:
    steps = 64
    recipe, truth, path = emoji(tmp_path, steps), tmp_path / "undisturbed", tmp_path / "killed"
    run(*recipe, "name=undisturbed")
    campaign(path, recipe, draw_kills(2, [1, 4, 2, 1, 4, 2], ["stepping", "saving", "stepping"], 4 * EVERY))
    finish(path, [*recipe, "cluster.processes_per_node=4", "parallel=fsdp", "data.workers=2"])
    assert_same_stream(path, truth, steps, 1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("shared_data")
def test_many_kills_leave_the_bits_alone(tmp_path: Path) -> None:
    steps = 112
    recipe = [*emoji(tmp_path, steps), "cluster.processes_per_node=2"]
    truth, path = tmp_path / "undisturbed", tmp_path / "killed"
    run(*recipe, "name=undisturbed")
    blows = campaign(path, recipe, draw_kills(2, [2] * 16, ["stepping", "saving", "saving", "starting"], 2 * EVERY))
    assert any(blow["half_saved"] for blow in blows), "no kill met a checkpoint half written"
    finish(path, recipe)
    assert_same_stream(path, truth, steps, 0.0)
    assert_same_bits(path, truth, steps, tmp_path)
