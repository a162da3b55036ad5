"""The worker: what every rank runs.

``torchrun … -m clipscale.train key=value …`` composes the configuration on rank 0 and shares it through torchrun's
store; ``--config RUN/config.yaml`` trains what ``clipscale train`` composed already. Ranks never run Hydra's own main.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import platform
import signal
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from clipscale.config import Config, compose, load_config
from clipscale.config.rundir import count_events, ended_on_purpose, lock, open_run, report
from clipscale.config.validate import usable_processes
from clipscale.distributed import RUN_FILE
from clipscale.distributed import runtime as distributed
from clipscale.distributed.workers import LOADER, worker_context
from clipscale.errors import BusyError, ClipscaleError, ExitCode

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
PACKAGES = (
    "clipscale",
    "torch",
    "torchvision",
    "timm",
    "webdataset",
    "hydra-core",
    "open_clip_torch",
    "transformers",
    "wandb",
    "numpy",
)
# Variables that decide how ranks talk to each other; none of them holds an address or a secret.
COMMUNICATION = (
    *(f"NCCL_{name}" for name in (
        "ALGO", "ASYNC_ERROR_HANDLING", "BUFFSIZE", "CROSS_NIC", "CUMEM_ENABLE", "DEBUG", "IB_DISABLE", "IB_GID_INDEX",
        "IB_HCA", "IB_QPS_PER_CONNECTION", "IB_SL", "IB_TC", "IB_TIMEOUT", "MAX_NCHANNELS", "MIN_NCHANNELS", "NET",
        "NET_GDR_LEVEL", "NET_PLUGIN", "NVLS_ENABLE", "P2P_DISABLE", "P2P_LEVEL", "PROTO", "SHM_DISABLE",
        "SOCKET_IFNAME", "SOCKET_NTHREADS", "TOPO_FILE", "TUNER_PLUGIN",
    )),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_HIGH_PRIORITY", "TORCH_NCCL_AVOID_RECORD_STREAMS",
    "GLOO_SOCKET_IFNAME", "FI_PROVIDER", "FI_EFA_USE_DEVICE_RDMA", "CUDA_DEVICE_MAX_CONNECTIONS",
    "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "OMP_NUM_THREADS", "RCCL_MSCCL_ENABLE",
)  # fmt: skip


def main(arguments: list[str], store: Any = None) -> ExitCode:
    """Train as one rank. Returns the exit code; the first rank that fails says why and writes ``result.json``."""
    path, code = _train_or_tell(arguments, store)
    crashed = code is ExitCode.FAILED and distributed.restarts_left() > 0  # what comes next is another start
    if path is not None and os.environ.get("RANK", "0") == "0" and not crashed and count_events(path, "started"):
        _leave_report(path)
    return code


def _train_or_tell(arguments: list[str], store: Any) -> tuple[Path | None, ExitCode]:
    path: Path | None = None
    config: Config | None = None
    _stop_with_the_agent()
    logging.getLogger("clipscale").addHandler(logging.NullHandler())  # until the run has a directory to log to
    try:
        if arguments[:1] == ["--config"]:
            path = Path(arguments[1]).parent
        elif store is None:
            path = _open(arguments)
        else:
            path = _shared_path(store, arguments)
        if path is None:
            return path, ExitCode.USER_ERROR
        if RUN_FILE in os.environ and os.environ.get("LOCAL_RANK") == "0":
            Path(os.environ[RUN_FILE]).write_text(str(path.absolute()))
        if distributed.is_restarted() and (ended := ended_on_purpose(path)) is not None:
            return path, ended  # it would only end so again
        config = load_config(path / "config.yaml")
        return path, train(config, path, store)
    except BusyError as error:
        return path, _report(None, error, error.exit_code)  # the directory is another's
    except ClipscaleError as error:
        return path, _report(path, error, error.exit_code)
    except KeyboardInterrupt:
        return path, _report(path, ClipscaleError("interrupted before training began"), ExitCode.FAILED)
    except Exception as error:
        from clipscale.trainer.failures import in_one_line

        if config is not None and path is not None and (told := in_one_line(error, config, path)) is not None:
            return path, _report(path, told, told.exit_code)
        traceback.print_exc()
        return path, _report(path, error, ExitCode.FAILED)


def as_rank(arguments: list[str]) -> int:
    """Train as one of the processes that torchrun started, or alone. Returns the exit status."""
    store = distributed.connect() if distributed.under_torchrun() else None
    code = main(arguments, store)
    if RUN_FILE in os.environ and os.environ.get("LOCAL_RANK") == "0":
        Path(os.environ[RUN_FILE] + ".code").write_text(str(int(code)))
    status = _for_torchrun(code, store)
    if store is not None and os.environ["RANK"] == "0":
        distributed.release_spares(store)
    return status


def _for_torchrun(code: ExitCode, store: Any, ending_s: float = 60.0) -> int:
    """What torchrun is to see: it starts all workers again when one fails, and calls every failure 1.

    A run that ends on purpose has said so in ``result.json``, and is not to be started again. When one rank alone comes
    to such an end, the others wait for it: then torchrun has to end them, and they find it written when they start.
    Ranks that end together have ``ending_s`` seconds, for one may have a tracker to close.
    """
    if code is ExitCode.PREEMPTED:
        return 0
    if store is None or code is ExitCode.FAILED or not distributed.restarts_left():
        return int(code)
    return 0 if distributed.all_end(store, ending_s) else int(code)


def train(config: Config, path: Path, store: Any = None) -> ExitCode:
    """Train the run at ``path`` in this process, a rank among those that torchrun started or alone."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    assert config.data.streams is not None, "open_run records the number of streams"
    usable = usable_processes(config.data.streams, world)
    if rank >= usable:
        distributed.stand_by(store)
        raise SystemExit(0)  # whatever the others came to
    held = lock(path) if rank == 0 else None
    runtime = distributed.start(
        config.device.value,
        config.distributed.timeout_s,
        store,
        spares=world - usable,
        sharded=config.parallel.strategy.shards,
        on_host=config.parallel.cpu_offload,
    )
    if config.data.workers:
        worker_context(LOADER)  # whose server imports from now on, while this process does
    _log_to(path / "logs" / f"rank{runtime.rank}.log")
    if runtime.is_main:
        if distributed.restarts_may_fail():
            print(
                "warning: torchrun's restarts can fail for the address of a dead rank; start it with "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, or use launch/torchrun.sh",
                file=sys.stderr,
            )
        (path / "result.json").unlink(missing_ok=True)
        (path / "environment.json").write_text(json.dumps(_environment(runtime.world), indent=2) + "\n")
    if config.cluster.preflight and distributed.spans_nodes():
        from clipscale.planner.preflight import preflight

        preflight(config, runtime)
    # Slow to import; a wrong configuration has been refused by now.
    from clipscale.trainer.trainer import Trainer

    code = Trainer(config, runtime).fit()
    distributed.stop()  # only here: after a failure the peers are gone or stuck, and it would wait for them
    if held is not None:
        held.close()
    return code


def _open(overrides: list[str]) -> Path:
    config, experiment = compose(overrides)
    world = int(os.environ.get("WORLD_SIZE", 1))
    return open_run(config, experiment, overrides, world, recorded_config, again=distributed.is_restarted()).path


def recorded_config(config: Config) -> bytes | None:
    """The configuration that lies with the checkpoints of a run, as its first machine wrote it; None if none does."""
    from clipscale.checkpoint import places  # slow to import

    return places.recorded_config(config)


def _shared_path(store: Any, overrides: list[str]) -> Path | None:
    """Where the run is that rank 0 opens; None on the others where it cannot, for it says why."""

    def make() -> str:
        try:
            path = _open(overrides).absolute()
            return f"{path}\n{(path / 'config.yaml').read_text()}"
        except ClipscaleError as error:
            return f"error: {error}"

    answer = distributed.share(store, "clipscale/run", make)
    if answer.startswith("error: "):
        if os.environ["RANK"] != "0":
            return None
        raise ClipscaleError(answer.removeprefix("error: "))
    place, _, text = answer.partition("\n")
    path = Path(place)
    file = path / "config.yaml"
    if not file.exists() or file.read_text() != text:  # another machine's directory, as an earlier start left it
        (path / "logs").mkdir(parents=True, exist_ok=True)
        if not distributed.is_restarted():
            (path / "result.json").unlink(missing_ok=True)
        scratch = path / f"config.{os.getpid()}.tmp"
        scratch.write_text(text)
        scratch.replace(file)
    return path


def _report(path: Path | None, error: BaseException, code: ExitCode) -> ExitCode:
    text = str(error) or type(error).__name__
    logging.getLogger("clipscale").error(text)
    return report(path, text, code)


def _leave_report(path: Path) -> None:
    """Write ``RUN/report.html``. The run has ended, and said how: nothing that happens here changes that."""
    try:
        from clipscale.apps.report import write_report

        print(f"report: {write_report([path])}")
    except Exception as error:
        print(f"warning: no report of {path}: {error}", file=sys.stderr)


def _stop_with_the_agent() -> None:
    """Have Linux ask a rank to stop when torchrun's agent, its parent, has died: nobody would start it again."""
    if distributed.under_torchrun() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _log_to(file: Path) -> None:
    handler = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("clipscale")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a log that finds no room on the disk must not fill the terminal


def _environment(world: int) -> dict[str, object]:
    """An allow-list: what one needs to repeat the run, and nothing that names a person, a host or a secret."""
    import torch

    from clipscale.telemetry.code import commit

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if gpus else None
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "gpus": gpus,
        "nccl": nccl,
        "communication": {name: os.environ[name] for name in COMMUNICATION if name in os.environ},
        "world_size": world,
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # it comes with an extra
        return None


if __name__ == "__main__":
    sys.exit(as_rank(sys.argv[1:]))
