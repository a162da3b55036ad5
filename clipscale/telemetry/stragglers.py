"""What each rank does by itself: the slowest and the fullest of them, and which keeps the others waiting."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]]
        self._told: set[tuple[int, int]] = set()
        self._times = torch.zeros(1, len(WHAT))
        self.restart()

    def restart(self) -> None:
        """Begin a new interval now: after anything that is not training, such as a save."""
        self._events, self._seconds = [], 0.0

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

    def compare(self, own: Mapping[str, float], steps: int) -> dict[str, float]:
        """What all ranks measured in an interval of ``steps`` that the device has ended; a collective.

        The longest wait for data, the largest memory and the mean tokens of a caption; and the seconds of a step that a
        rank was busy or waited for data, not for others: the least, the median and the most of any, and whose that is.
        """
        computed = self._seconds + sum(begun.elapsed_time(ended) for begun, ended in self._events) / 1000
        self.restart()
        mine = [own["train/data_wait_s"], computed, own["train/memory_peak_bytes"], own["train/tokens_per_caption"]]
        everyone = gather(torch.tensor([mine], dtype=torch.float64, device=self._device)).cpu()
        self._times = everyone[:, : len(WHAT)]
        busy = (self._times.sum(dim=1) / steps).tolist()
        return {
            "train/data_wait_s": float(everyone[:, 0].max()),
            "train/memory_peak_bytes": float(everyone[:, 2].max()),
            "train/tokens_per_caption": float(everyone[:, 3].mean()),
            "train/rank_s_min": min(busy),
            "train/rank_s_median": statistics.median_low(busy),
            "train/rank_s_max": max(busy),
            "train/slowest_rank": float(busy.index(max(busy))),
        }

    def tell(self, interval_s: float, say: Callable[[str], None]) -> None:
        """Name who was slow in the interval that was compared last. A rank is named once for each kind."""
        times = self._times
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
