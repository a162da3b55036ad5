"""Start the ranks of a run on this machine, by torchrun's own agent inside this process."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path
from types import ModuleType

from clipscale.config.rundir import read_result
from clipscale.distributed import GRACE_S
from clipscale.errors import ExitCode


def launch(config_file: Path, processes: int) -> ExitCode:
    """Train ``RUN/config.yaml`` with ``processes`` local ranks; the exit code is what they wrote to ``result.json``."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Without this, a restarted rank can meet the address of its dead peer in the agent's store.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks speak for themselves
    arguments = [
        "--standalone",
        f"--nproc-per-node={processes}",
        *_grace(torchrun),
        "-m",
        "clipscale.train",
        "--config",
        str(config_file),
    ]
    with contextlib.suppress(ChildFailedError, SignalException):
        torchrun.run(torchrun.parse_args(arguments))
    result = read_result(config_file.parent)
    if result is None:
        print(f"error: the ranks ended without a result; see {config_file.parent / 'logs'}", file=sys.stderr)
        return ExitCode.FAILED
    return ExitCode(result["exit_code"])


def _grace(torchrun: ModuleType) -> list[str]:
    # Not every supported version has it.
    known = "--shutdown-timeout" in torchrun.get_args_parser().format_help()
    return [f"--shutdown-timeout={GRACE_S}"] if known else []
