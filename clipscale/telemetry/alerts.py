"""Which of a run's events somebody is told of at once. Numbers only: no path, shard or key leaves the machine so."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

from clipscale.config.rundir import read_events
from clipscale.errors import DataBudgetError, DivergedError

STALL_S, STALL_TIMES = 300.0, 10.0  # without a row, at least, and of the longest time between two rows until then
TOLD = {
    "skipped_step": ("Loss or gradient not finite", "ERROR"), "rolled_back": ("Training went back", "ERROR"),
    "save_failed": ("A checkpoint could not be written", "ERROR"), "straggler": ("One rank is slow", "WARN"),
    "damaged_checkpoint": ("A checkpoint is damaged", "WARN"), "truncated_captions": ("Captions are cut", "INFO"),
}  # fmt: skip


class Alert(NamedTuple):
    """A title that is always the same for the same thing, a line, and INFO, WARN or ERROR."""

    title: str
    text: str
    level: str


class Alerts:
    """Watches a run: its events, and the time since its last row."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = len(read_events(path))
        self._size = self._length()
        self._row_at, self._longest, self._stalled = time.monotonic(), 0.0, False

    def row(self) -> None:
        """A row was logged."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._row_at)
        self._row_at, self._stalled = now, False

    def new(self) -> list[Alert]:
        """What has come up since the last call."""
        found = []
        if (size := self._length()) != self._size:
            self._size = size
            events = read_events(self._path)
            found = [_of_event(event) for event in events[self._known :] if event["event"] in TOLD]
            self._known = len(events)
        silent = time.monotonic() - self._row_at
        if not self._stalled and silent > max(STALL_S, STALL_TIMES * self._longest):
            self._stalled = True
            found.append(Alert("No progress", f"Nothing was logged for {silent:.0f} s.", "ERROR"))
        return found

    def _length(self) -> int:
        file = self._path / "events.jsonl"
        return file.stat().st_size if file.exists() else 0


def of_error(error: BaseException) -> Alert:
    """The end of a run by an error."""
    # Up to the semicolon, these two are made of numbers and keys of the configuration; others may name what is secret.
    told = str(error).partition(";")[0] if isinstance(error, DataBudgetError | DivergedError) else ""
    titles = {"DataBudgetError": "Data budget exceeded", "DivergedError": "Training diverged"}
    kind = type(error).__name__
    return Alert(titles.get(kind, "The run failed"), f"{kind}: {told}".rstrip(": "), "ERROR")


def _of_event(event: dict[str, Any]) -> Alert:
    title, level = TOLD[event["event"]]
    if event["event"] == "skipped_step" and not event.get("bad"):  # fp16's scaler looks for its scale
        level = "INFO"
    numbers = {k: v for k, v in event.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return Alert(title, ", ".join(f"{key} {value:,g}" for key, value in numbers.items()), level)
