"""Runs as a user starts them, what they leave behind, and their violent end."""

from __future__ import annotations

import gc
import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from clipscale.cli import train
from clipscale.errors import ClipscaleError


def command(*overrides: str) -> list[str]:
    """What trains, as a user would type it."""
    return [sys.executable, "-m", "clipscale.cli", "train", *overrides]


def run(*overrides: str, expect: int = 0, timeout: float = 240) -> str:
    """Train to the end; returns what was printed."""
    done = subprocess.run(command(*overrides), capture_output=True, text=True, timeout=timeout)
    output = done.stdout + done.stderr
    assert done.returncode == expect, output
    assert "Traceback" not in output, output
    return output


def run_here(*overrides: str, expect: int = 0) -> str:
    """As :func:`run`, but in this process: for runs of one process that nothing happens to, many times sooner."""
    gc.collect()  # a run that failed here before holds its directory as long as its error lives
    said, argv, environment = io.StringIO(), sys.argv, dict(os.environ)
    signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    try:
        with redirect_stdout(said), redirect_stderr(said):
            try:
                code = train([*overrides])
            except ClipscaleError as error:
                code = int(error.exit_code)
                print(f"error: {error}")
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
    output = said.getvalue()
    assert code == expect, output
    assert "Traceback" not in output, output
    assert signals == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    return output


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``."""
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def losses(path: Path) -> dict[int, float]:
    """Training loss by samples seen."""
    return {row["samples_seen"]: row["train/loss"] for row in rows(path) if "train/loss" in row}


def last_step(path: Path, batch: int) -> int:
    """The last step of ``batch`` samples that is in ``metrics.jsonl``; 0 before there is one."""
    try:
        return max(losses(path), default=0) // batch
    except (FileNotFoundError, ValueError):  # it is being rewound
        return 0


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of one kind in ``events.jsonl``."""
    file = path / "events.jsonl"
    found = map(json.loads, file.read_text().splitlines() if file.exists() else ())
    return [row for row in found if row["event"] == kind]


def keys(path: Path) -> dict[int, list[str]]:
    """Trace of the last attempt at every step: the global batch, in order."""
    steps: dict[int, dict[int, tuple[int, list[str]]]] = {}
    for file in (path / "trace").glob("rank*.jsonl"):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            before = steps.setdefault(row["step"], {})
            if row["attempt"] >= max((a for a, _ in before.values()), default=0):
                if any(a < row["attempt"] for a, _ in before.values()):
                    before.clear()
                before[row["rank"]] = (row["attempt"], row["keys"])
    return {step: [k for rank in sorted(parts) for k in parts[rank][1]] for step, parts in steps.items()}


def kill_everything(process: subprocess.Popen[Any], path: Path) -> str:
    """kill -9 of a run's process group and of its ranks, which torchrun put into sessions of their own.

    ``process`` leads its own session and writes to a pipe. Returns what it printed.
    """
    os.killpg(process.pid, signal.SIGKILL)
    for _ in range(60):
        _kill_ranks(path)
        try:
            output, _ = process.communicate(timeout=1)
        except subprocess.TimeoutExpired:
            continue  # a rank that was being started had no name yet, or loader workers are about to notice
        return str(output)
    raise AssertionError("something of the run is left to hold its output")


def _kill_ranks(path: Path) -> None:
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(path / "config.yaml").encode() in status.read_bytes():
                os.kill(int(status.parent.name), signal.SIGKILL)
        except (OSError, ValueError):
            continue
