"""What becomes of a run whose checkpoints are damaged, cannot be written, or lie in a bucket."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import clipscale
from clipscale.checkpoint import Saved
from clipscale.checkpoint.manifest import MANIFEST
from clipscale.config import compose
from clipscale.config.rundir import open_run
from clipscale.distributed.runtime import Runtime
from clipscale.errors import ConfigError
from clipscale.train import main, recorded_config
from clipscale.trainer.keeping import look_back
from tests.buckets import BUCKET, KEYS, overrides, s3_server
from tests.runs import events, losses, rows
from tests.shards import write_shards
from tests.unit.test_checkpoint import disk_of, flip, tensors_of

BATCH = 8
SMALL = [
    "experiment=demo", "data=synthetic", "model=tiny", "model.vision.image_size=32", "model.vision.layers=1",
    "model.text.layers=1", "model.text.vocab_size=49408", f"global_batch_size={BATCH}", "schedule.warmup_samples=8",
    f"checkpoint.every_samples={2 * BATCH}", "tracking=disabled", "tracking.log_every_steps=1", "data.workers=0",
    "eval.every_samples=null", "schedule=constant", "device=cpu", "ema.decay=0.9",
]  # fmt: skip


def train(runs: Path, steps: int, *more: str) -> tuple[int, Path]:
    """Train in this process. Returns the exit code and the run's directory."""
    gc.collect()  # a run that failed here before holds its directory as long as its error lives
    changes = [*SMALL, f"runs_dir={runs}", f"total_samples={steps * BATCH}", *more]
    config, experiment = compose(changes)
    run = open_run(config, experiment, changes, 1, recorded_config)
    return main(["--config", str(run.path / "config.yaml")]), run.path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    code, path = train(tmp_path_factory.mktemp("truth"), 6, "name=truth")
    assert code == 0
    return path


def same(path: Path, truth: Path, since: int = 0) -> None:
    ours, theirs = losses(path), {seen: loss for seen, loss in losses(truth).items() if seen > since}
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_damaged_newest_is_told_and_trained_again(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, 4, "name=a")
    flip(tensors_of(tmp_path / "a" / "checkpoints" / "step_00000004"))
    capsys.readouterr()
    code, path = train(tmp_path, 6, "name=a")
    assert code == 0
    assert "warning: checkpoint step_00000004 is damaged (__0_0.distcp does not have" in capsys.readouterr().out
    assert [event["checkpoint"] for event in events(path, "damaged_checkpoint")] == ["step_00000004"]
    assert events(path, "started")[-1]["samples_seen"] == 2 * BATCH
    assert "step_00000004 is damaged" in (path / "logs" / "rank0.log").read_text()
    same(path, undisturbed)


def test_a_run_goes_on_from_another(undisturbed: Path, tmp_path: Path) -> None:
    train(tmp_path, 4, "name=first")
    code, path = train(tmp_path, 6, "name=second", f"checkpoint.resume_from={tmp_path / 'first'}")
    assert code == 0 and events(path, "started")[0]["samples_seen"] == 4 * BATCH
    same(path, undisturbed, since=4 * BATCH)
    # Its own checkpoint comes first from then on, and nothing is asked of the other one.
    code, path = train(tmp_path, 7, "name=second", "checkpoint.resume_from=/nowhere")
    assert code == 0 and events(path, "started")[1]["samples_seen"] == 6 * BATCH
    code, _ = train(tmp_path, 2, "name=third", "checkpoint.resume_from=/nowhere")
    assert code == 2


def test_checkpoints_are_not_left_behind(undisturbed: Path, tmp_path: Path) -> None:
    train(tmp_path, 4, "name=moved")
    there = f"checkpoint.dir={tmp_path / 'there'}"
    with pytest.raises(ConfigError, match=r"moved lie in .*/moved; use checkpoint\.dir=null, or go on from those"):
        train(tmp_path, 6, "name=moved", there)
    code, path = train(tmp_path, 6, "name=moved", there, f"checkpoint.resume_from={tmp_path / 'moved'}")
    assert code == 0 and events(path, "started")[-1]["samples_seen"] == 4 * BATCH
    same(path, undisturbed)


def test_a_run_is_saved_by_the_clock(tmp_path: Path) -> None:
    clock = [
        "tracking.log_every_steps=99",
        "checkpoint.every_samples=null",
        "checkpoint.every_minutes=1e-9",
        "checkpoint.keep_last=9",
    ]
    code, path = train(tmp_path, 6, "name=clock", *clock)
    # All ranks agree on the step after the one at whose end the time had come.
    assert code == 0
    assert sorted(int(one.name[5:]) for one in (path / "checkpoints").iterdir()) == [2, 4, 6]


def test_a_full_disk_is_a_warning_until_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with disk_of(10**6):
        code, path = train(tmp_path, 5, "name=full")
    printed = capsys.readouterr()
    assert code == 1
    assert "training goes on, and the last good checkpoint is kept" in printed.out
    assert len(events(path, "save_failed")) == 2  # those after 2 and 4 steps
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert "step_00000005 cannot be written: [Errno 27] File too large" in line
    assert json.loads((path / "result.json").read_text())["exit_code"] == 1
    code, _ = train(tmp_path, 5, "name=full")
    assert code == 0 and events(path, "started")[-1]["samples_seen"] == 0


def test_a_machine_with_nothing_goes_on_from_a_bucket(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in KEYS.items():
        monkeypatch.setenv(key, value)
    with s3_server() as address:
        remote = ["name=far", f"checkpoint.dir=s3://{BUCKET}/runs", *overrides(address)]
        assert train(tmp_path / "one", 4, *remote)[0] == 0
        assert not list((tmp_path / "one" / "far").rglob("*.distcp"))
        code, path = train(tmp_path / "two", 6, *remote)
        assert code == 0 and events(path, "started")[0]["samples_seen"] == 4 * BATCH
        same(path, undisturbed, since=4 * BATCH)
        # The first machine is behind by now, and is told where the run stands by the bucket.
        code, path = train(tmp_path / "one", 7, *remote)
        assert events(path, "started")[-1]["samples_seen"] == 6 * BATCH
        model, _, _ = clipscale.load(path)
        assert (path / "fetched" / "step_00000007" / MANIFEST).exists()
        assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A run keeps its log open until another one begins."""
    yield
    logging.getLogger("clipscale").handlers.clear()


def test_patience_ends_a_run_that_no_longer_improves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends as done, with its last weights saved; again it is over, and with more patience it goes on."""
    shards = write_shards(tmp_path / "data", [24])
    still = ["data=shards", f"data.train.shards={shards[0]}", f"data.val.shards={shards[0]}", "eval.every_samples=16"]
    still += ["optim.lr=1e-30", "eval.objective=val/loss", "name=still"]
    code, path = train(tmp_path, 12, *still, "eval.patience=2")
    assert code == 0 and "ended early: 2 evaluations did not improve val/loss" in capsys.readouterr().out
    made = [row for row in rows(path) if "val/loss" in row]
    assert [row["samples_seen"] for row in made] == [16, 32, 48] and rows(path)[-1]["samples_seen"] == 48
    assert json.loads((path / "result.json").read_text())["status"] == "done"
    assert (path / "checkpoints" / "step_00000006" / MANIFEST).exists()
    assert train(tmp_path, 12, *still, "eval.patience=2")[0] == 0
    assert "ended when val/loss no longer improved; nothing to do (raise eval.patience" in capsys.readouterr().out
    assert train(tmp_path, 12, *still, "eval.patience=3")[0] == 0
    assert rows(path)[-1]["samples_seen"] == 64
    assert train(tmp_path, 4, *still[:-1], "name=odd", "eval.patience=1", "eval.objective=val/nothing")[0] == 2
    assert (
        "eval.objective=val/nothing is not measured in this run; choose from val/loss, val/" in capsys.readouterr().err
    )


def test_patience_is_with_the_checkpoints_and_nan_is_no_progress(tmp_path: Path) -> None:
    """A machine without the run's rows goes on counting; an evaluation that is no number is one that is worse."""
    config, _ = compose(["eval.patience=3", "eval.objective=val/loss"])
    saved, alone = Saved(samples_seen=64), Runtime(0, 1, 0, torch.device("cpu"))
    told = [{"samples_seen": 16 * i, "val/loss": loss} for i, loss in enumerate((4.0, 3.0, None), start=1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    assert look_back(config, tmp_path, saved, alone) == (48, False)
    assert (saved.objective, saved.not_improved) == (3.0, 1)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"samples_seen": 64, "val/loss": 3.5}) + "\n")
    assert look_back(config, tmp_path, saved, alone) == (64, False)
    assert look_back(config, tmp_path, saved, alone) == (64, False), "nothing is counted twice"
    (tmp_path / "metrics.jsonl").unlink()
    saved.not_improved = 3
    assert look_back(config, tmp_path, saved, alone) == (64, True)
