"""Where the time of a run goes, over all its attempts: steps that count, and everything else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from clipscale.config.rundir import read_events, unix_time

KINDS = ("start", "data_wait", "checkpoint", "evaluation")
"""What an attempt does when it makes no step."""


class Timesheet:
    """Adds up the seconds that a run spent, of those attempts, or parts of them, whose steps count.

    A checkpoint keeps the sums. What is between them and the wall's clock since the first start was lost: steps that
    were made again, because a kill or a step back undid them, and the time in which nothing ran. A run that was done
    and is trained on later has lost nothing in between.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._restarts = sum(event["event"] == "started" for event in read_events(path))
        self.resumed(0.0, {}, time.perf_counter())

    def resumed(self, time_s: float, spent: Mapping[str, float], since: float) -> None:
        """Go on from the sums of a checkpoint; this attempt counts ``since`` then, by ``perf_counter``."""
        self._before_s, self._since = time_s, since
        self._spent = dict.fromkeys(KINDS, 0.0) | dict(spent)
        began = time.time() - (time.perf_counter() - since)
        first, idle_s = _first_start(self._path, began)
        self._wall_began = min(first, began - time_s) + idle_s

    @property
    def time_s(self) -> float:
        """Seconds up to now that count, whatever they were spent on."""
        return self._before_s + time.perf_counter() - self._since

    @property
    def spent(self) -> dict[str, float]:
        """Seconds by kind, for a checkpoint."""
        return dict(self._spent)

    def add(self, kind: str, seconds: float) -> None:
        """Seconds in which no step was made."""
        self._spent[kind] += seconds

    def began_training(self) -> None:
        """What this attempt has done until now was starting."""
        self.add("start", time.perf_counter() - self._since)

    @contextmanager
    def on(self, kind: str) -> Iterator[None]:
        """Inside, no step is made."""
        began = time.perf_counter()
        yield
        self.add(kind, time.perf_counter() - began)

    def read(self) -> dict[str, float]:
        """``time/goodput``, the share of the wall's clock that went into steps that count, all seconds by kind, and
        ``time/restarts``, the starts before this one."""
        time_s = self.time_s
        wall_s = max(time.time() - self._wall_began, time_s)
        step_s = max(time_s - sum(self._spent.values()), 0.0)
        seconds = {"wall": wall_s, "step": step_s, **self._spent, "lost": wall_s - time_s}
        shares = {"time/goodput": step_s / wall_s, "time/restarts": float(self._restarts)}
        return shares | {f"time/{kind}_s": round(s, 3) for kind, s in seconds.items()}


def _first_start(path: Path, now: float) -> tuple[float, float]:
    """When a run was first started, by the events in its directory (``now`` without any), and the seconds from each of
    its ends to the start that followed."""
    first, done, idle_s = now, 0.0, 0.0
    for event in read_events(path):
        at = unix_time(event["time"]) - float(event.get("startup_s", 0.0))
        if event["event"] == "done":
            done = at
        elif event["event"] == "started":
            first = min(first, at)
            idle_s, done = idle_s + (max(at - done, 0.0) if done else 0.0), 0.0
    return first, idle_s + (max(now - done, 0.0) if done else 0.0)
