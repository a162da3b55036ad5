"""Which rank keeps the others waiting."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from clipscale.config.rundir import log_event
from clipscale.distributed.collectives import gather, rank

SHARE = 0.2  # of an interval by which a rank must be behind the median to be named
WHAT = ("waits for data", "computes features")


class Stragglers:
    """Times what each rank does by itself, and names one that takes much longer at it than the median rank.

    Under ``fsdp`` ranks gather weights from each other while they compute features, so there it is for data alone that
    a slow one can be told from those that wait for it.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self._path, self._device = path, device
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0
        self._told: set[tuple[int, int]] = set()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Inside, this rank computes features."""
        if self._device.type == "cuda":
            begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begun.record()
            yield
            ended.record()
            self._events.append((begun, ended))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def tell(self, waited_s: float, interval_s: float, say: Callable[[str], None]) -> None:
        """Name who is slow in an interval that the device has ended; a collective. A rank is named once for each."""
        computed = self._seconds + sum(begun.elapsed_time(ended) for begun, ended in self._events) / 1000
        self._events, self._seconds = [], 0.0
        times = gather(torch.tensor([[waited_s, computed]], device=self._device)).cpu()
        for i, what in enumerate(WHAT):
            slow = straggler(times[:, i].tolist(), interval_s)
            if slow is None or (slow, i) in self._told or rank() != 0:
                continue
            self._told.add((slow, i))
            took, median = times[slow, i].item(), statistics.median_low(times[:, i].tolist())
            log_event(self._path, "straggler", rank=slow, what=what, seconds=took, median=median, of=interval_s)
            say(
                f"warning: rank {slow} {what} for {took:.1f} of {interval_s:.1f} s, the median rank for {median:.1f} "
                "s: all wait for it"
            )


def straggler(seconds: Sequence[float], interval_s: float) -> int | None:
    """The slowest rank, if it takes longer than the median by a fifth of the interval."""
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    return slowest if seconds[slowest] - statistics.median_low(seconds) > SHARE * interval_s else None
