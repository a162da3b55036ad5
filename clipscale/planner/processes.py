"""Processes of this machine that measure together, started as those of a run are."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from clipscale.errors import ClipscaleError

MOST_S = 240.0  # for everything


def together(processes: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(rank, meeting, barrier, *args)`` in so many new processes; what each returned, by rank.

    ``meeting`` is the path of a file that does not exist yet, by which they can find each other. Raises ClipscaleError
    when one fails, ends, or takes longer than ``MOST_S`` seconds.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    with TemporaryDirectory() as folder, _threads(processes):
        pipes, started = [], []
        try:
            for rank in range(processes):
                ours, theirs = context.Pipe(duplex=False)
                given = (function, rank, Path(folder) / "meeting", barrier, theirs, args)
                process = context.Process(target=_answer, args=given, daemon=True)
                process.start()
                theirs.close()
                pipes.append(ours)
                started.append(process)
            return [_result(pipe) for pipe in pipes]
        finally:
            for process in started:
                process.kill()
                process.join()


@contextmanager
def _threads(processes: int) -> Iterator[None]:
    """Variables that a process reads when it imports torch, as training's processes have them."""
    names = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))} if processes > 1 else {}
    names |= {} if processes > 1 else {"GOMP_SPINCOUNT": "1000"}
    new = {key: value for key, value in names.items() if key not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for key in new:
            os.environ.pop(key)


def _result(pipe: Connection) -> Any:
    try:
        ok, value = pipe.recv() if pipe.poll(MOST_S) else (False, f"it had not ended after {MOST_S:.0f} s")
    except EOFError:
        ok, value = False, "it ended without an answer; is there enough memory?"
    if not ok:
        raise ClipscaleError(f"a process that measured failed: {value}")
    return value


def _answer(
    function: Callable[..., Any], rank: int, meeting: Path, barrier: Barrier, pipe: Connection, args: tuple[Any, ...]
) -> None:
    try:
        pipe.send((True, function(rank, meeting, barrier, *args)))
    except Exception as error:
        barrier.abort()  # the others would wait for it
        pipe.send((False, f"{type(error).__name__}: {error}".splitlines()[0]))
    finally:
        pipe.close()
