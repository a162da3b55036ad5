"""Rows reach their places, rewind with a resume, and a tracker never stops a run."""

from __future__ import annotations

import json
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb

from clipscale.config import compose
from clipscale.config.rundir import log_event
from clipscale.config.running import Tracking, TrackingMode
from clipscale.errors import DataBudgetError, DivergedError, ExitCode
from clipscale.telemetry.alerts import Alerts, of_error
from clipscale.telemetry.pictures import batch_sheet, of_examples
from clipscale.telemetry.sinks import Jsonl, last_values
from clipscale.telemetry.tensorboard import TensorBoard, crc32c
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


def inspect(run: Path) -> list[dict[str, Any]]:
    """All records that W&B wrote for a run, by its own reader."""
    found: list[dict[str, Any]] = []
    for directory in sorted(run.glob("wandb/*run-*")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(directory)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        found += [json.loads(line) for line in done.stdout.splitlines()]
    return found


def history(run: Path, key: str) -> list[tuple[int, Any]]:
    """A metric over samples seen, as W&B wrote it."""
    rows = [json.dumps(record) for record in inspect(run) if record["type"] == "history"]
    found = [(re.search(r'"samples_seen\W+(\d+)', row), re.search(rf'"{key}\W+([\d.]+)', row)) for row in rows]
    return [(int(seen[1]), float(value[1])) for seen, value in found if seen and value]


def test_without_a_key_wandb_is_offline_and_readable(tmp_path: Path, no_key: None) -> None:
    """By W&B's own reader; what it is told of errors and events are numbers, without paths or keys."""
    said: list[str] = []
    tracking = Tracking(mode=TrackingMode.auto, group="a group", tags=["a tag"], job_type="a type", code=True)
    sink = WandbSink(tmp_path, tracking, {"optim.lr": 0.1}, said.append)
    sink.log({"samples_seen": 5, "train/loss": 1.5})
    log_event(tmp_path, "rolled_back", step=7, to=3, shard="a secret")
    sink.close(DataBudgetError("7 of 9 samples could not be used; worst shards: a secret"))
    assert [line for line in said if "wandb sync" in line] == said
    told = json.dumps(inspect(tmp_path))
    for text in ("a group", "a tag", "a type", "optim.lr", "7 of 9 samples", "Training went back", "code.commit"):
        assert text in told, text
    assert "a secret" not in told
    assert history(tmp_path, "train/loss") == [(5, 1.5)]


def test_the_x_axis_never_goes_back(tmp_path: Path, no_key: None) -> None:
    """Rows that come again, because a kill or a step back undid them, were sent before; no kind hides the other."""
    for attempt in ((8, 16, 24, 16, 24, 32), (24, 32, 40)):
        resumed = attempt[0] - 8
        rows = Jsonl(tmp_path / "metrics.jsonl", resumed)
        sink = WandbSink(tmp_path, Tracking(mode=TrackingMode.offline), {}, print)
        for seen in attempt:
            row = {"samples_seen": seen, "train/loss": float(seen)}
            rows.log(row), sink.log(row)
            if seen % 16 == 0:
                sink.log({"samples_seen": seen, "val/loss": float(seen)})
        rows.close(), sink.close()
    assert [seen for seen, _ in history(tmp_path, "train/loss")] == [8, 16, 24, 32, 40]
    assert sorted({seen for seen, _ in history(tmp_path, "val/loss")}) == [16, 32]
    assert len({file.stem[-8:] for file in tmp_path.glob("wandb/*/*.wandb")}) == 1, "one id"


def test_pictures_and_checkpoints_where_they_are_asked_for(tmp_path: Path, no_key: None) -> None:
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_1" / "weights").write_text("weights")
    uri = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
    found = [{"image": uri, "score": 0.5, "right": right} for right in (True, False)]
    matrix = {"captions": ["a $", "b"], "classes": ["a", "b"], "values": [[1, 0], [0, 1]], "counts": [[1, 0], [0, 1]]}
    shown = {"retrieval": [{"caption": "a dog", "found": found}] * 2, "similarity": matrix, "confusion": matrix}
    images = torch.zeros(20, 3, 32, 32, dtype=torch.uint8)
    pictures = of_examples(shown) | {"batch": [batch_sheet(images, [f"caption {i}" for i in range(20)])]}
    assert {name: len(several) for name, several in pictures.items()} == {
        "retrieval": 2, "similarity": 1, "confusion": 1, "batch": 1,
    }  # fmt: skip
    sink = WandbSink(tmp_path, Tracking(mode=TrackingMode.offline, checkpoints=True), {}, print)
    sink.show(pictures, 64)
    sink.close(None, str(tmp_path / "step_1"))
    sent = {file.name.partition("_")[0] for file in tmp_path.glob("wandb/offline-run-*/files/media/images/**/*.png")}
    assert sent == set(pictures)
    assert '"artifact"' in json.dumps(inspect(tmp_path)) and "model" in json.dumps(inspect(tmp_path))


def test_online_without_a_key_falls_back(tmp_path: Path, no_key: None) -> None:
    said: list[str] = []
    sink = WandbSink(tmp_path, Tracking(mode=TrackingMode.online), {}, said.append)
    sink.log({"samples_seen": 1, "train/loss": 2.0})
    sink.close()
    assert "W&B online failed" in said[0]
    assert "offline" in said[-1]
    assert history(tmp_path, "train/loss") == [(1, 2.0)]


def test_a_server_that_never_answers_is_not_waited_for(
    tmp_path: Path, no_key: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are taken before W&B has begun; when it is given up, they are written offline."""
    said: list[str] = []
    monkeypatch.setattr("clipscale.telemetry.wandb.INIT_TIMEOUT_S", 1)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(50)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        sink = WandbSink(tmp_path, Tracking(mode=TrackingMode.online), {}, said.append)
        for seen in range(100):
            sink.log({"samples_seen": seen, "train/loss": 1.0})
        assert not sink.begun.is_set()
        sink.close()
    assert "W&B online failed" in said[0] and "wandb sync" in said[-1]
    assert len(history(tmp_path, "train/loss")) == 100


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_tracker_that_dies_or_hangs_ends_nothing(
    tmp_path: Path, no_key: None, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Rows are taken at once; at the end what could not be sent is given up after a while, and kept on disk."""
    said: list[str] = []
    monkeypatch.setattr("clipscale.telemetry.wandb.FINISH_TIMEOUT_S", 1)
    with tracker() as (address, server):
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        sink = WandbSink(tmp_path, Tracking(mode=TrackingMode.online), {}, said.append)
        sink.log({"samples_seen": 1, "train/loss": 3.0})
        assert sink.begun.wait(60)
        server.send_signal(number)
        for seen in range(2, 20):
            sink.log({"samples_seen": seen, "train/loss": 3.0})
        sink.close()
    assert [line for line in said if "W&B could not finish" in line and "wandb sync" in line] and len(said) == 1
    wandb.teardown()  # as the end of the process does: its own process writes all
    assert len(history(tmp_path, "train/loss")) == 19, "what was not sent is on disk"


def test_what_is_alerted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_event(tmp_path, "rolled_back", step=1)  # of an attempt before
    alerts = Alerts(tmp_path)
    assert alerts.new() == []
    log_event(tmp_path, "skipped_step", step=12345, bad=True, key="a secret")
    log_event(tmp_path, "skipped_step", step=12346, bad=False)
    log_event(tmp_path, "done", samples_seen=5)
    assert alerts.new() == [
        ("Loss or gradient not finite", "step 12,345", "ERROR"), ("Loss or gradient not finite", "step 12,346", "INFO"),
    ]  # fmt: skip
    alerts.row()
    assert alerts.new() == []
    monkeypatch.setattr("clipscale.telemetry.alerts.STALL_S", -1.0)
    monkeypatch.setattr("clipscale.telemetry.alerts.STALL_TIMES", 0.0)
    assert [alert.title for alert in alerts.new()] == ["No progress"]
    assert alerts.new() == [], "once is enough"
    assert of_error(DivergedError("3 of 9 steps were bad; see /a/path")).text == "DivergedError: 3 of 9 steps were bad"
    assert of_error(ValueError("/a/path")).text == "ValueError"


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


def test_tensorboard_files_are_tfrecords(tmp_path: Path) -> None:
    """By the format's definition: lengths and checksums, scalars, and where an earlier attempt is forgotten."""
    assert crc32c(b"123456789") == 0xE3069283
    board = TensorBoard(tmp_path, 64)
    board.log({"samples_seen": 300, "step": 3, "train/loss": 0.5, "train/lr": float("nan")})
    board.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, events = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        for body, check in ((data[:8], data[8:12]), (data[12 : 12 + length], data[12 + length : 16 + length])):
            crc = crc32c(body)
            assert struct.unpack("<I", check) == (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF,)
        events.append(data[12 : 12 + length])
        data = data[16 + length :]
    kind, forgets, row = (event[9:] for event in events)  # behind the time
    assert kind == b"\x10\x00\x1a\x0dbrain.Event:2"
    assert forgets == b"\x10\x41\x3a\x02\x08\x01", "session_log START at step 65"
    assert row == b"\x10\xac\x02\x2a\x13\x0a\x11\x0a\x0atrain/loss\x15" + struct.pack("<f", 0.5)
