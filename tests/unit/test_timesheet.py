"""Where the time of a run went: every second of the wall's clock is somebody's, over kills, waits and ends."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from clipscale.config.rundir import read_events
from clipscale.telemetry import Timesheet


def write_events(path: Path, *events: tuple[float, str, dict[str, float]]) -> None:
    """Events of so many seconds ago."""
    with (path / "events.jsonl").open("a") as file:
        for ago, event, details in events:
            at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - ago))
            file.write(json.dumps({"time": at, "event": event, **details}) + "\n")


def seconds(row: dict[str, float]) -> float:
    """All that is accounted for."""
    return sum(value for key, value in row.items() if key.endswith("_s") and key != "time/wall_s")


def test_the_first_attempt_loses_nothing(tmp_path: Path) -> None:
    sheet = Timesheet(tmp_path)
    sheet.resumed(0.0, {}, time.perf_counter() - 100)
    sheet.add("start", 10.0)
    sheet.add("data_wait", 15.0)
    sheet.add("evaluation", 25.0)
    row = sheet.read()
    assert row["time/goodput"] == pytest.approx(0.5, abs=0.01)
    assert row["time/lost_s"] == pytest.approx(0.0, abs=0.01)
    assert row["time/restarts"] == 0
    assert seconds(row) == pytest.approx(row["time/wall_s"], abs=0.01)


def test_a_kill_costs_the_steps_since_the_checkpoint_and_the_time_between(tmp_path: Path) -> None:
    # Started 1000 s ago (and 20 s before that its process), saved when 300 s of its time had passed, then killed.
    write_events(tmp_path, (1000, "started", {"startup_s": 20.0}))
    sheet = Timesheet(tmp_path)
    sheet.resumed(300.0, {"start": 20.0, "data_wait": 30.0}, time.perf_counter() - 50)
    row = sheet.read()
    assert row["time/restarts"] == 1
    assert row["time/wall_s"] == pytest.approx(1020, abs=2)
    assert row["time/step_s"] == pytest.approx(300, abs=2)
    assert row["time/lost_s"] == pytest.approx(670, abs=2)
    assert row["time/goodput"] == pytest.approx(300 / 1020, abs=0.01)
    assert seconds(row) == pytest.approx(row["time/wall_s"], abs=0.01)
    assert sheet.spent == {"start": 20.0, "data_wait": 30.0, "checkpoint": 0.0, "evaluation": 0.0}


def test_a_run_that_was_done_loses_nothing_until_it_is_trained_on(tmp_path: Path) -> None:
    write_events(tmp_path, (9000, "started", {"startup_s": 0.0}), (8900, "done", {}))
    sheet = Timesheet(tmp_path)
    sheet.resumed(100.0, {}, time.perf_counter() - 50)
    write_events(tmp_path, (50, "started", {"startup_s": 0.0}))
    assert sheet.read()["time/wall_s"] == pytest.approx(150, abs=2)
    sheet.resumed(100.0, {}, time.perf_counter())  # it went back to where this attempt began
    row = sheet.read()
    assert row["time/lost_s"] == pytest.approx(50, abs=2) and row["time/restarts"] == 1


def test_on_a_machine_without_its_events_the_past_is_what_the_checkpoint_says(tmp_path: Path) -> None:
    sheet = Timesheet(tmp_path)
    sheet.resumed(500.0, {"checkpoint": 100.0}, time.perf_counter())
    assert sheet.read()["time/goodput"] == pytest.approx(0.8, abs=0.01)


def test_events_that_are_none_are_passed_over(tmp_path: Path) -> None:
    write_events(tmp_path, (10, "started", {}))
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('[1]\nnull\n{"event": "done"}\n{"time": 5, "event": "done"}\n{"time": "2026-')
    assert [event["event"] for event in read_events(tmp_path)] == ["started"]
