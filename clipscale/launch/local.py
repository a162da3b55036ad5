"""Start the ranks of a run on this machine, by torchrun's own agent inside this process."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from types import ModuleType

from clipscale.config.rundir import read_result, write_result
from clipscale.distributed import GRACE_S
from clipscale.errors import ExitCode


def launch(config_file: Path, processes: int, max_restarts: int) -> ExitCode:
    """Train ``RUN/config.yaml`` with ``processes`` local ranks; the exit code is what they wrote to ``result.json``.

    When a rank dies, all start again from the last checkpoint, ``max_restarts`` times.
    """
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
        f"--max-restarts={max_restarts}",
        *_grace(torchrun),
        "-m",
        "clipscale.train",
        "--config",
        str(config_file),
    ]
    path, cause = config_file.parent, "the ranks ended without a result"
    try:
        torchrun.run(torchrun.parse_args(arguments))
    except SignalException:
        pass
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # it could not say so itself
            cause = f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}"
            if (read_result(path) or {}).get("status", "failed") == "failed":  # what peers say of it comes of this
                write_result(path, "failed", ExitCode.FAILED, error=cause)
    result = read_result(path)
    if result is None or result.get("error") == cause:
        print(f"error: {cause}; see {path / 'logs'}", file=sys.stderr)
        return ExitCode.FAILED
    return ExitCode(result["exit_code"])


def _grace(torchrun: ModuleType) -> list[str]:
    # Not every supported version has it.
    known = "--shutdown-timeout" in torchrun.get_args_parser().format_help()
    return [f"--shutdown-timeout={GRACE_S}"] if known else []
