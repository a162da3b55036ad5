"""This machine's ranks of a run: torchrun's own agent, inside this process.

    python -m clipscale.launch.node [torchrun's options] -- KEY=VALUE …

does what ``torchrun [options] -m clipscale.train KEY=VALUE …`` does, but for three things: what restarts need is set,
signals reach the ranks and leave them time to save, and the exit code is the run's own (0 done, 75 saved and to be
started again, 2, 3, 4 or 1), where torchrun knows 0 and 1.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType

from clipscale.config.rundir import read_result, write_result
from clipscale.distributed import GRACE_S, RUN_FILE
from clipscale.errors import ExitCode

SEPARATOR = "--"
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")  # that the agent hands on to the ranks


def start_ranks(options: Sequence[str], arguments: Sequence[str]) -> ExitCode:
    """Train with the ranks that torchrun's ``options`` tell, each given ``arguments``; returns what the run ended with.

    When a rank dies, all start again from the last checkpoint, as often as ``--max-restarts`` says.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    _prepare_environment(torchrun.parse_args([*options, "-m", "clipscale.train"]).nproc_per_node)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks speak for themselves
    command = [*options, *_grace(torchrun), "-m", "clipscale.train", *arguments]
    cause, status, asked = "the ranks ended without a result", 0, False
    with _signals_given_back(), tempfile.TemporaryDirectory() as folder:
        # Until torchrun listens itself, when it has found its peers; a container's first process hears nothing else.
        signal.signal(signal.SIGTERM, _leave)
        known = Path(folder, "run")
        os.environ[RUN_FILE] = str(known)
        try:
            torchrun.run(torchrun.parse_args(command))
        except SignalException:
            asked = True
        except (RendezvousError, ValueError) as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            cause, status = f"the nodes did not come together ({first}); look at HEAD and NODES", int(ExitCode.FAILED)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            status = failure.exitcode
            if status < 0:  # it could not say so itself
                cause = f"rank {rank} was ended by {signal.Signals(-status).name}"
        path = Path(known.read_text()) if known.exists() else None
        told = Path(f"{known}.code")
        code = ExitCode(int(told.read_text())) if told.exists() else None
    # A machine that does not see rank 0's directory has this from its own ranks.
    if code not in (None, ExitCode.FAILED) and status >= 0:
        return code
    return _outcome(path, cause, status, asked)


def _outcome(path: Path | None, cause: str, status: int, asked: bool) -> ExitCode:
    """What the run at ``path``, if there is one yet, came to; ``asked``: this process was told to end it."""
    result = read_result(path) if path is not None else None
    if asked and result is None:  # the ranks were not yet ready to save, or had too little time to
        print("stopped before anything could be saved; the last checkpoint stands", file=sys.stderr)
        return ExitCode.PREEMPTED
    if path is None:
        print(f"error: {cause}", file=sys.stderr)
        return ExitCode.FAILED
    if status < 0 and (result or {}).get("status", "failed") == "failed":  # what peers say of it comes of this
        write_result(path, "failed", ExitCode.FAILED, error=cause)
        result = None
    if result is None:
        print(f"error: {cause}; see {path / 'logs'}", file=sys.stderr)
        return ExitCode.FAILED
    return ExitCode(result["exit_code"])


@contextmanager
def _signals_given_back() -> Iterator[None]:
    """The agent takes the signals and keeps them; a program that trained, then does something else, wants its own."""
    before = {signal.Signals[name]: signal.getsignal(signal.Signals[name]) for name in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: not one of Python's
                signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(int(ExitCode.PREEMPTED))


def _prepare_environment(processes: str) -> None:
    if processes.isdigit():  # and not `gpu`
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(processes))))
    # Without this, a restarted rank can meet the address of its dead peer in the agent's store.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", ",".join(SIGNALS))
    os.environ.setdefault("PYTHONFAULTHANDLER", "1")
    # Of a rank that is killed, Python tells what it left behind; that is cleaned up, and no news for the user.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")


def _grace(torchrun: ModuleType) -> list[str]:
    # Not every supported version has it.
    known = "--shutdown-timeout" in torchrun.get_args_parser().format_help()
    return [f"--shutdown-timeout={GRACE_S}"] if known else []


def main(arguments: list[str]) -> ExitCode:
    """The command."""
    if SEPARATOR not in arguments:
        print(f"error: put {SEPARATOR} between torchrun's options and KEY=VALUE", file=sys.stderr)
        return ExitCode.USER_ERROR
    here = arguments.index(SEPARATOR)
    return start_ranks(arguments[:here], arguments[here + 1 :])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
