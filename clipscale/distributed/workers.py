"""How worker processes start: by a server that imports once, from the path of the process that wants them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LOADER = ("clipscale.data.loader", "open_clip")  # what the workers of a run's loader need


def worker_context(preload: Sequence[str]) -> ForkServerContext:
    """The context that starts workers; ``preload`` names the modules that the server imports for all of them.

    The server begins to import at once: called early, it does so while this process imports its own.
    Not fork: the process that asks has threads, and obstore must not be used in a fork.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    with _inherited():
        forkserver.ensure_running()
    return context


@contextmanager
def _inherited() -> Iterator[None]:
    """What is started inside ignores SIGTERM, SIGUSR1 and SIGINT, and imports from where this process does.

    Workers inherit this, and say themselves what a signal means to them. By itself the server looks into the working
    directory first, and may find another clipscale there.
    """
    signals = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    path = {"PYTHONPATH": os.pathsep.join(place or os.getcwd() for place in sys.path), "PYTHONSAFEPATH": "1"}
    before = {name: os.environ.get(name) for name in path}
    os.environ |= path
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        for number, handler in signals.items():
            signal.signal(number, handler)
