"""Where metrics go. ``metrics.jsonl`` is the truth; the console and the tracker are views of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from clipscale.config import Config
from clipscale.config.fields import leaves
from clipscale.config.resume import value_of
from clipscale.config.rundir import read_rows
from clipscale.config.running import TrackingMode
from clipscale.errors import masked
from clipscale.telemetry.console import Console
from clipscale.telemetry.tensorboard import TensorBoard
from clipscale.telemetry.wandb import WandbSink

if TYPE_CHECKING:
    from clipscale.telemetry.pictures import Picture


class Sink(Protocol):
    """Anything that takes rows of metrics."""

    def log(self, row: dict[str, float]) -> None:
        """A row of numbers; ``samples_seen`` is the x-axis."""

    def close(self) -> None:
        """The run is over."""


def last_values(path: Path) -> dict[str, float]:
    """The last value of every metric in a ``metrics.jsonl``; empty if there is none."""
    values: dict[str, float] = {}
    for row in read_rows(path):
        values |= {key: value for key, value in row.items() if "/" in key}
    return values


def evaluations(path: Path, samples_seen: int) -> list[dict[str, Any]]:
    """The rows of evaluations in a ``metrics.jsonl`` up to ``samples_seen``, in their order."""
    rows = read_rows(path)
    seen = [row for row in rows if row.get("samples_seen", samples_seen + 1) <= samples_seen]  # one without is not ours
    return [row for row in seen if any(key.startswith("val/") for key in row)]


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

    def __init__(self, run: Path, config: Config, samples_seen: int, main: bool) -> None:
        self.console = Console(samples_seen, config.total_samples, main)
        self.checkpoint: str | None = None
        """Place of the run's last checkpoint, once it has ended."""
        self._sinks: list[Sink] = []
        self._files: list[Jsonl | TensorBoard] = []
        self._tracker: WandbSink | None = None
        if main:
            self._files = [Jsonl(run / "metrics.jsonl", samples_seen)]
            if config.tracking.tensorboard:
                self._files.append(TensorBoard(run, samples_seen))
            self._sinks = [*self._files, self.console]
            if config.tracking.mode is not TrackingMode.disabled:
                settings = {key: _without_secrets(value_of(config, key)) for key, _, _ in leaves(Config)}
                self._tracker = WandbSink(run, config.tracking, settings, self.console.say)

    def log(self, row: dict[str, float]) -> None:
        """Hand a row to every sink."""
        for sink in self._sinks:
            sink.log(row)
        if self._tracker is not None:
            self._tracker.log(row)

    def show(self, pictures: Mapping[str, list[Picture]], samples_seen: int) -> None:
        """Hand pictures to the tracker, which has been allowed to have them."""
        if self._tracker is not None:
            self._tracker.show(pictures, samples_seen)

    def rewind(self, samples_seen: int) -> None:
        """The run has gone back; views of its rows get those of its second way behind those of its first."""
        for file in self._files:
            file.rewind(samples_seen)

    def close(self, error: BaseException | None = None) -> None:
        """Close every sink; ``error`` is what ended the run."""
        for sink in self._sinks:
            sink.close()
        if self._tracker is not None:
            self._tracker.close(error, self.checkpoint)


def _without_secrets(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_secrets(one) for one in value]
    return masked(value) if isinstance(value, str) else value
