"""Being asked to stop: the signal only raises a flag, and all ranks agree on the step at which they stop."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

from clipscale.distributed.collectives import world_size

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
IMPATIENT_AFTER_S = 1.0


class _Answer:
    """Whether any rank asked, on its way: reading it a step later waits for that step's end, not for the newest one."""

    def __init__(self, asked: bool, device: torch.device) -> None:
        self._flag = torch.full((1,), int(asked), dtype=torch.int32, device=device)
        self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, async_op=True)
        self._copied: torch.cuda.Event | None = None
        if device.type == "cuda":
            assert self._work is not None
            self._work.wait()  # the stream waits, not this thread
            self._flag = torch.empty(1, dtype=torch.int32, pin_memory=True).copy_(self._flag, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> bool:
        if self._copied is not None:
            self._copied.synchronize()
        elif self._work is not None:
            self._work.wait()
        return bool(self._flag)


class StopRequest:
    """Turns SIGTERM, SIGINT and SIGUSR1 into an agreement between ranks.

    Nothing happens inside the handler but a flag: a checkpoint written there could meet a half-made step. A second
    Ctrl-C, a second or more after the first, ends the process at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._asked_at: float | None = None
        self._pending: _Answer | None = None
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def agreed(self) -> bool:
        """Call once per step on every rank: whether any rank had been asked to stop by the step before.

        The answer is one step old so that no step waits for the reduction that carries it.
        """
        asked = self._asked_at is not None
        if world_size() == 1:
            return asked
        answer = self._pending is not None and self._pending.read()
        self._pending = _Answer(asked, self._device)
        return answer

    def release(self) -> None:
        """Give the signals back, and finish the reduction that is under way."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.read()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        # One Ctrl-C may arrive twice, from the terminal and from the launcher.
        if number == signal.SIGINT and self._asked_at is not None and now - self._asked_at > IMPATIENT_AFTER_S:
            os._exit(1)
        self._asked_at = self._asked_at or now
