"""Throughput, waiting time and memory over a logging interval."""

from __future__ import annotations

import math
import resource
import sys
import time

import torch


class Meters:
    """Counts between two calls of :meth:`read`. Nothing here waits for the device; ``read`` may."""

    def __init__(self, device: torch.device, world: int) -> None:
        self._device, self._world = device, world
        self.interval_s = 0.0
        """Length of the interval that was read last."""
        self._loss = torch.zeros(2, device=device)  # sum, and steps, of those that have one
        self.restart()

    def restart(self) -> None:
        """Begin a new interval now: after anything that is not training, such as an evaluation."""
        self._started, self._samples, self._waited = time.perf_counter(), 0, 0.0
        self._loss.zero_()

    def waited(self, seconds: float) -> None:
        """Time for which the step had no batch."""
        self._waited += seconds

    def stepped(self, samples: int, loss: torch.Tensor) -> None:
        """One optimizer step over ``samples`` pairs of all ranks; ``loss`` stays on the device, and does not count
        where it is no number."""
        self._samples += samples
        finite = torch.isfinite(loss)
        self._loss += torch.stack([torch.where(finite, loss, 0.0), finite.to(loss.dtype)])

    def read(self) -> dict[str, float]:
        """The interval's mean loss, rates and memory, and a new interval."""
        loss, steps = self._loss.tolist()  # the device has finished the interval from here on
        seconds = self.interval_s = time.perf_counter() - self._started
        rate = self._samples / seconds
        values = {
            "train/loss": loss / steps if steps else math.nan,
            "train/samples_per_s": rate,
            "train/samples_per_s_per_gpu": rate / self._world,
            "train/data_wait_s": self._waited,
            "train/memory_peak_bytes": float(self._memory()),
        }
        self.restart()
        return values

    def _memory(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
