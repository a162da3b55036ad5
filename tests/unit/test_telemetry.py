"""Rows reach their places, rewind with a resume, and a tracker never stops a run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb

from clipscale.config import compose
from clipscale.config.running import Tracking, TrackingMode
from clipscale.errors import ExitCode
from clipscale.telemetry.sinks import Jsonl, last_values
from clipscale.telemetry.wandb import WandbSink
from clipscale.trainer.failures import in_one_line
from tests.tracker import tracker


def test_rows_past_the_checkpoint_are_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = Jsonl(path, 0)
    for seen in (10, 20, 30):
        sink.log({"samples_seen": seen, "train/loss": float(seen)})
    sink.close()
    with path.open("a") as file:
        file.write('{"samples_seen": 40, "trai')  # killed in the middle of a line
    Jsonl(path, 20).close()
    assert [json.loads(line)["samples_seen"] for line in path.read_text().splitlines()] == [10, 20]
    assert len((tmp_path / "metrics.discarded.jsonl").read_text().splitlines()) == 2
    assert last_values(path) == {"train/loss": 20.0}


def test_what_is_no_number_is_still_json(tmp_path: Path) -> None:
    sink = Jsonl(tmp_path / "metrics.jsonl", 0)
    sink.log({"samples_seen": 1, "train/loss": float("nan")})
    sink.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"samples_seen": 1, "train/loss": None}


@pytest.fixture
def no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    wandb.teardown()  # it reads its variables once a process
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield
    wandb.teardown()


def test_without_a_key_wandb_is_offline_and_readable(tmp_path: Path, no_key: None) -> None:
    said: list[str] = []
    run = tmp_path / "run"
    run.mkdir()
    sink = WandbSink(run, Tracking(mode=TrackingMode.auto), {"optim.lr": 0.1}, said.append)
    sink.log({"samples_seen": 5, "train/loss": 1.5})
    sink.close()
    assert any("wandb sync" in line for line in said)
    (directory,) = run.glob("wandb/offline-run-*")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(directory)]
    done = subprocess.run(inspect, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "train/loss" in done.stdout and "samples_seen" in done.stdout


def test_online_without_a_key_falls_back(tmp_path: Path, no_key: None) -> None:
    said: list[str] = []
    sink = WandbSink(tmp_path, Tracking(mode=TrackingMode.online), {}, said.append)
    sink.log({"samples_seen": 1})
    sink.close()
    assert "W&B online failed" in said[0]
    assert "offline" in said[-1]


def test_a_tracker_that_dies_ends_nothing(
    tmp_path: Path, no_key: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rows are taken at once; at the end what could not be sent is given up after a while, and kept on disk."""
    said: list[str] = []
    monkeypatch.setattr("clipscale.telemetry.wandb.FINISH_TIMEOUT_S", 2)
    with tracker() as (address, server):
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        sink = WandbSink(tmp_path, Tracking(mode=TrackingMode.online), {}, said.append)
        sink.log({"samples_seen": 1, "train/loss": 3.0})
        server.kill()
        server.wait()
        for seen in range(2, 20):
            sink.log({"samples_seen": seen, "train/loss": 3.0})
        sink.close()
    assert [line for line in said if "W&B could not finish" in line] and len(said) == 1
    assert list(tmp_path.glob("wandb/run-*/*.wandb")), "what was not sent is on disk"


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    config, _ = compose([])
    with pytest.raises(OSError) as error, open("/dev/full", "w") as file:
        file.write("a row")
        file.flush()
    told = in_one_line(error.value, config, tmp_path)
    assert str(told) == (
        f"{tmp_path} cannot be written: No space left on device; make room, and the same command goes on from the last "
        "checkpoint"
    )
    assert told is not None and told.exit_code == ExitCode.FAILED
