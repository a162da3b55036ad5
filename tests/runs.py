"""Runs as a user starts them, what they leave behind, and their violent end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


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


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``."""
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def losses(path: Path) -> dict[int, float]:
    """Training loss by samples seen."""
    return {row["samples_seen"]: row["train/loss"] for row in rows(path) if "train/loss" in row}


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
