"""What ranks agree on between steps: that somebody asked to stop or to save, and what each says of its step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as dist

from clipscale.distributed.collectives import world_size

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
IMPATIENT_AFTER_S = 1.0


class Agreed(NamedTuple):
    """What all ranks know of one step: whether any of them asked, and the largest of each number that they said."""

    stop: bool
    save: bool
    said: list[float]


class _Answer:
    """An agreement on its way: reading it a step later waits for that step's end, not for the newest one."""

    def __init__(self, asked: Sequence[bool], said: Sequence[torch.Tensor], device: torch.device) -> None:
        self._values = torch.zeros(len(asked) + len(said), device=device)
        for i, one in enumerate(asked):
            if one:
                self._values[i] = 1.0  # a kernel: copying from the host's memory would make it wait
        for i, number in enumerate(said, start=len(asked)):
            self._values[i].copy_(number)
        self._work = dist.all_reduce(self._values, dist.ReduceOp.MAX, async_op=True) if world_size() > 1 else None
        self._copied: torch.cuda.Event | None = None
        if device.type == "cuda":
            if self._work is not None:
                self._work.wait()  # the stream waits, not this thread
            on_host = torch.empty(self._values.shape, pin_memory=True)
            self._values = on_host.copy_(self._values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> Agreed:
        if self._copied is not None:
            self._copied.synchronize()
        elif self._work is not None:
            self._work.wait()
        stop, save, *said = self._values.tolist()
        return Agreed(bool(stop), bool(save), said)


class StopRequest:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a flag.

    Nothing else happens inside the handler: a checkpoint written there could meet a half-made step. A second Ctrl-C, a
    second or more after the first, ends the process at once.
    """

    def __init__(self) -> None:
        self._asked_at: float | None = None
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}

    @property
    def asked(self) -> bool:
        """Whether this process has been asked to stop."""
        return self._asked_at is not None

    def release(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        # One Ctrl-C may arrive twice, from the terminal and from the launcher.
        if number == signal.SIGINT and self._asked_at is not None and now - self._asked_at > IMPATIENT_AFTER_S:
            os._exit(1)
        self._asked_at = self._asked_at or now


class Agreement:
    """One asynchronous reduction a step, read on the host a step later: no step waits for it, and all ranks know the
    same at the same step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._request = StopRequest()
        self._pending: _Answer | None = None

    def exchange(self, save: bool, said: Sequence[torch.Tensor]) -> Agreed | None:
        """Call once per step on every rank: what was agreed on the step before, None for the first.

        Args:
            save: whether this rank wants a save; one that asks is enough.
            said: numbers Float[] about this step, on the device; of each, all ranks will know the largest.
        """
        before = self.settle()
        self._pending = _Answer((self._request.asked, save), said, self._device)
        return before

    def settle(self) -> Agreed | None:
        """What is agreed on the last step, now: the host waits for its end. None if that has been read."""
        pending, self._pending = self._pending, None
        return None if pending is None else pending.read()

    def release(self) -> None:
        """Give the signals back, and finish the reduction that is under way."""
        self._request.release()
        self.settle()
