"""A process that stands still says where, and ends, so that whoever started it can begin again."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from clipscale.errors import ExitCode

PATIENCE = 10  # times as long for what is no step: starting, which may compile, evaluating, saving
WRITING_S = 60.0  # for what it writes before it ends
RECORDED = 2000  # collectives that the flight recorder keeps


class Watchdog:
    """Ends this process when no step has ended for a while.

    Before, it writes what every thread does to ``FOLDER/rank*.stacks.txt`` and the last collectives to
    ``FOLDER/rank*.collectives.json``.

    Args:
        folder: where it writes.
        rank: this process's.
        limit_s: seconds for a step; None never ends anything.
        tell: takes one line for the user.
    """

    def __init__(self, folder: Path, rank: int, limit_s: float | None, tell: Callable[[str], object]) -> None:
        self._folder, self._rank, self._limit_s, self._tell = folder, rank, limit_s, tell
        self._now = ("", 0.0, 0.0)  # what is under way, how many seconds it may take, and since when it does: as one
        self._released = threading.Event()
        if limit_s is not None:
            self.begin("start")
            threading.Thread(target=self._watch, args=(limit_s,), name="watchdog", daemon=True).start()

    def begin(self, what: str = "step") -> None:
        """From now on ``what`` is under way; all but steps have ten times as long."""
        self._now = (what, (self._limit_s or 0.0) * (1 if what == "step" else PATIENCE), time.monotonic())

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """``what`` is under way inside, and behind it what was before, anew."""
        before, _, _ = self._now
        self.begin(what)
        yield
        self.begin(before)

    def release(self) -> None:
        """Watch no longer."""
        self._released.set()

    def _watch(self, limit_s: float) -> None:
        while not self._released.wait(min(limit_s / 4, 10.0)):
            what, allowed_s, since = self._now
            if time.monotonic() - since > allowed_s:
                self._end(what, allowed_s)

    def _end(self, what: str, allowed_s: float) -> None:
        # Whatever becomes of the writing: a device that hangs may not even tell its collectives.
        last = threading.Timer(WRITING_S, os._exit, [ExitCode.FAILED])
        last.daemon = True
        last.start()
        try:
            with suppress(OSError):
                self._write()
            self._tell(
                f"rank {self._rank}: this {what} has taken more than {allowed_s:.0f} s "
                f"(distributed.watchdog_s={self._limit_s}); {self._folder}/rank*.stacks.txt say where each rank stands"
            )
        finally:
            os._exit(ExitCode.FAILED)

    def _write(self) -> None:
        with (self._folder / f"rank{self._rank}.stacks.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        if collectives := last_collectives():
            (self._folder / f"rank{self._rank}.collectives.json").write_text(collectives)


def record_collectives() -> None:
    """Have the flight recorder remember; call it before there is a process group."""
    # Newer versions of torch complain of the older name, and older ones do not know the newer.
    name = "TORCH_FR_BUFFER_SIZE" if hasattr(_library(), "_dump_fr_trace_json") else "TORCH_NCCL_TRACE_BUFFER_SIZE"
    os.environ.setdefault(name, str(RECORDED))


def _library() -> Any:
    return getattr(torch._C, "_distributed_c10d", None)


def last_collectives() -> str:
    """The newest collectives of this process as the flight recorder's JSON; empty if this torch has none."""
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        dump = getattr(_library(), name, None)
        with suppress(RuntimeError):
            found = dump() if dump is not None else ""
            text = found.decode() if isinstance(found, bytes) else str(found)
            if '"entries"' in text:
                return text
    return ""
