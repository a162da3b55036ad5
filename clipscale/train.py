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
from clipscale.config.rundir import lock, open_run, report
from clipscale.config.validate import usable_processes
from clipscale.distributed import runtime as distributed
from clipscale.errors import ClipscaleError, ExitCode

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


def main(arguments: list[str]) -> ExitCode:
    """Train as one rank. Returns the exit code; the first rank that fails says why and writes ``result.json``."""
    path: Path | None = None
    store: Any = None
    config: Config | None = None
    _stop_with_the_agent()
    logging.getLogger("clipscale").addHandler(logging.NullHandler())  # until the run has a directory to log to
    try:
        store = distributed.connect() if distributed.under_torchrun() else None
        if arguments[:1] == ["--config"]:
            path = Path(arguments[1]).parent
        elif store is None:
            path = _open(arguments)
        else:
            path = _shared_path(store, arguments)
        config = load_config(path / "config.yaml")
        return train(config, path, store)
    except ClipscaleError as error:
        return _report(path, error, error.exit_code)
    except KeyboardInterrupt:
        return _report(path, ClipscaleError("interrupted before training began"), ExitCode.FAILED)
    except Exception as error:
        from clipscale.trainer.failures import in_one_line

        if config is not None and path is not None and (told := in_one_line(error, config, path)) is not None:
            return _report(path, told, told.exit_code)
        traceback.print_exc()
        return _report(path, error, ExitCode.FAILED)
    finally:
        if store is not None and os.environ["RANK"] == "0":
            distributed.release_spares(store)


def train(config: Config, path: Path, store: Any = None) -> ExitCode:
    """Train the run at ``path`` in this process, a rank among those that torchrun started or alone."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    assert config.data.streams is not None, "open_run records the number of streams"
    usable = usable_processes(config.data.streams, world)
    if rank >= usable:
        distributed.stand_by(store)
        return ExitCode.DONE
    held = lock(path) if rank == 0 else None
    runtime = distributed.start(
        config.device.value,
        config.distributed.timeout_s,
        store,
        spares=world - usable,
        sharded=config.parallel.strategy.shards,
        on_host=config.parallel.cpu_offload,
    )
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
    # Slow to import; a wrong configuration has been refused by now.
    from clipscale.trainer.trainer import Trainer

    code = Trainer(config, runtime).fit()
    distributed.stop()  # only here: after a failure the peers are gone or stuck, and it would wait for them
    if held is not None:
        held.close()
    return code


def _open(overrides: list[str]) -> Path:
    config, experiment = compose(overrides)
    return open_run(config, experiment, overrides, int(os.environ.get("WORLD_SIZE", 1)), recorded_config).path


def recorded_config(config: Config) -> bytes | None:
    """The configuration that lies with the checkpoints of a run, as its first machine wrote it; None if none does."""
    from clipscale.checkpoint import places  # slow to import

    return places.recorded_config(config)


def _shared_path(store: Any, overrides: list[str]) -> Path:
    def make() -> str:
        try:
            path = _open(overrides).absolute()
            return f"{path}\n{(path / 'config.yaml').read_text()}"
        except ClipscaleError as error:
            return f"error: {error}"

    answer = distributed.share(store, "clipscale/run", make)
    if answer.startswith("error: "):
        if os.environ["RANK"] != "0":
            raise SystemExit(_for_torchrun(ExitCode.USER_ERROR))
        raise ClipscaleError(answer.removeprefix("error: "))
    place, _, text = answer.partition("\n")
    path = Path(place)
    if not (path / "config.yaml").exists():  # another machine's directory
        (path / "logs").mkdir(parents=True, exist_ok=True)
        scratch = path / f"config.{os.getpid()}.tmp"
        scratch.write_text(text)
        scratch.replace(path / "config.yaml")
    return path


def _report(path: Path | None, error: BaseException, code: ExitCode) -> ExitCode:
    text = str(error) or type(error).__name__
    logging.getLogger("clipscale").error(text)
    return report(path, text, code)


def _stop_with_the_agent() -> None:
    """Have Linux ask a rank to stop when torchrun's agent, its parent, has died: nobody would start it again."""
    if distributed.under_torchrun() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _for_torchrun(code: ExitCode) -> int:
    """What torchrun is to see: it starts a failed worker again, and calls every failure 1.

    A run that ended on purpose has said so in ``result.json``, and would only end so again.
    """
    on_purpose = code is not ExitCode.FAILED and distributed.restarts_left() > 0
    return 0 if on_purpose or code is ExitCode.PREEMPTED else int(code)


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

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "gpus": gpus,
        "world_size": world,
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # it comes with an extra
        return None


if __name__ == "__main__":
    sys.exit(_for_torchrun(main(sys.argv[1:])))
