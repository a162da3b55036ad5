"""Throughput, waiting time, tokens and memory over a logging interval."""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import dataclass

import torch

from clipscale.telemetry.stragglers import Stragglers
from clipscale.telemetry.timesheet import Timesheet


@dataclass(frozen=True)
class Work:
    """FLOPs that training on a sample needs: ``nominal`` of the whole context in every block, by which models are
    compared, and ``fixed + per_token n + per_square n²`` of a caption of n tokens. ``peak`` is a device's FLOP/s."""

    peak: float
    nominal: float
    fixed: float
    per_token: float
    per_square: float


class Meters:
    """Counts between two calls of :meth:`read`, which alone waits for the device and for other ranks.

    With ``work``, they tell how much of the device is used (MFU).
    """

    def __init__(
        self,
        device: torch.device,
        world: int,
        stragglers: Stragglers,
        timesheet: Timesheet,
        work: Work | None = None,
    ) -> None:
        self._device, self._world, self._work = device, world, work
        self._stragglers, self._timesheet = stragglers, timesheet
        self.interval_s = 0.0
        """Length of the interval that was read last."""
        self._loss = torch.zeros(2, device=device)  # sum, and steps, of those that have one
        self.restart()

    def restart(self) -> None:
        """Begin a new interval now: after anything that is not training, such as an evaluation."""
        self._started, self._samples, self._waited = time.perf_counter(), 0, 0.0
        self._steps, self._captions, self._tokens, self._squares = 0, 0, 0.0, 0.0
        self._loss.zero_()
        self._stragglers.restart()

    def waited(self, seconds: float) -> None:
        """Time for which the step had no batch."""
        self._waited += seconds
        self._timesheet.add("data_wait", seconds)

    def stepped(self, samples: int, loss: torch.Tensor, lengths: torch.Tensor) -> None:
        """One optimizer step over ``samples`` pairs of all ranks; ``loss`` stays on the device, and does not count
        where it is no number. ``lengths`` Int[B], on the host, are the tokens of this rank's captions, start and end
        included."""
        self._samples, self._steps = self._samples + samples, self._steps + 1
        tokens = lengths.double()
        self._captions += len(lengths)
        self._tokens += tokens.sum().item()
        self._squares += tokens.square().sum().item()
        finite = torch.isfinite(loss)
        self._loss += torch.stack([torch.where(finite, loss, 0.0), finite.to(loss.dtype)])

    def read(self) -> dict[str, float]:
        """The interval's mean loss, rates, waits and memory over all ranks, and where the time went until now; a
        collective. A new interval begins."""
        loss, steps = self._loss.tolist()  # the device has finished the interval from here on
        seconds = self.interval_s = time.perf_counter() - self._started
        rate = self._samples / seconds
        values = {
            "train/loss": loss / steps if steps else math.nan,
            "train/samples_per_s": rate,
            "train/samples_per_s_per_gpu": rate / self._world,
            "train/step_s": seconds / self._steps,
            "train/data_wait_s": self._waited,
            "train/memory_peak_bytes": float(self._memory()),
            **self._utilisation(rate / self._world),
        }
        values |= self._stragglers.compare(values, self._steps)
        self.restart()
        return values | self._timesheet.read()

    def _utilisation(self, rate: float) -> dict[str, float]:
        """Of a device that trains on ``rate`` samples per second; captions are taken to be alike on all ranks."""
        tokens, squares = self._tokens / self._captions, self._squares / self._captions
        values = {"train/tokens_per_caption": tokens}
        if self._work is not None:
            work = self._work
            needed = work.fixed + work.per_token * tokens + work.per_square * squares
            values["train/mfu"] = needed * rate / work.peak
            values["train/mfu_nominal"] = work.nominal * rate / work.peak
        return values

    def _memory(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
