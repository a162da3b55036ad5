"""Where metrics go. ``metrics.jsonl`` is the truth; the console and the tracker are views of it."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from clipscale.config.running import Tracking
from clipscale.telemetry.console import Console
from clipscale.telemetry.wandb import WandbSink


class Sink(Protocol):
    """Anything that takes rows of metrics."""

    def log(self, row: dict[str, float]) -> None:
        """A row of numbers; ``samples_seen`` is the x-axis."""

    def close(self) -> None:
        """The run is over."""


def last_values(path: Path) -> dict[str, float]:
    """The last value of every metric in a ``metrics.jsonl``; empty if there is none."""
    values: dict[str, float] = {}
    for row in _rows(path):
        values |= {key: value for key, value in row.items() if "/" in key}
    return values


def evaluated_at(path: Path, samples_seen: int) -> int:
    """Samples seen at the last evaluation in a ``metrics.jsonl`` up to ``samples_seen``; 0 if there is none."""
    found = 0
    for row in _rows(path):
        seen = row.get("samples_seen", samples_seen + 1)  # a row without it is not ours
        if seen <= samples_seen and any(key.startswith("val/") for key in row):
            found = seen
    return found


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``, if there is one; a line that a kill has cut is none."""
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


class Jsonl:
    """``RUN/metrics.jsonl``, a row per line, flushed at once."""

    def __init__(self, path: Path, samples_seen: int) -> None:
        self._path = path
        self._rewind(path, samples_seen)
        self._file = path.open("a")

    def log(self, row: dict[str, float]) -> None:
        """Write a row; a non-finite number is written as null, which every JSON reader accepts."""
        clean = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()

    def rewind(self, samples_seen: int) -> None:
        """Set aside the rows past ``samples_seen``."""
        self._file.close()
        self._rewind(self._path, samples_seen)
        self._file = self._path.open("a")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @staticmethod
    def _rewind(path: Path, samples_seen: int) -> None:
        """Move rows past the checkpoint, and a half-written last line, to ``metrics.discarded.jsonl``."""
        if not path.exists():
            return
        kept: list[str] = []
        dropped: list[str] = []
        for line in path.read_text().splitlines():
            try:
                (kept if json.loads(line)["samples_seen"] <= samples_seen else dropped).append(line)
            except (ValueError, KeyError):
                dropped.append(line)
        if dropped:
            with path.with_name("metrics.discarded.jsonl").open("a") as file:
                file.writelines(f"{line}\n" for line in dropped)
            scratch = path.with_suffix(".tmp")
            scratch.write_text("".join(f"{line}\n" for line in kept))
            scratch.replace(path)


class Sinks:
    """All sinks of a run. Only the main rank has any."""

    def __init__(
        self,
        run: Path,
        config: Tracking,
        settings: dict[str, Any],
        samples_seen: int,
        total_samples: int,
        main: bool,
    ) -> None:
        self.console = Console(samples_seen, total_samples, main)
        self._sinks: list[Sink] = []
        self._rows: Jsonl | None = None
        if main:
            self._rows = Jsonl(run / "metrics.jsonl", samples_seen)
            self._sinks = [self._rows, self.console]
            if config.mode.value != "disabled":
                self._sinks.append(WandbSink(run, config, settings, self.console.say))

    def log(self, row: dict[str, float]) -> None:
        """Hand a row to every sink."""
        for sink in self._sinks:
            sink.log(row)

    def rewind(self, samples_seen: int) -> None:
        """The run has gone back; views of its rows get those of its second way behind those of its first."""
        if self._rows is not None:
            self._rows.rewind(samples_seen)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()
