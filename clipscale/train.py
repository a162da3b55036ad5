"""The worker: what every rank runs.

``torchrun … -m clipscale.train key=value …`` composes the configuration on rank 0 and shares it through torchrun's
store; ``--config RUN/config.yaml`` trains what ``clipscale train`` composed already. Ranks never run Hydra's own main.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from clipscale.config import Config, compose, load_config
from clipscale.config.rundir import lock, open_run, write_result
from clipscale.config.validate import usable_processes
from clipscale.distributed import runtime as distributed
from clipscale.errors import ClipscaleError, ExitCode

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
    logging.getLogger("clipscale").addHandler(logging.NullHandler())  # until the run has a directory to log to
    try:
        store = distributed.connect() if distributed.under_torchrun() else None
        if arguments[:1] == ["--config"]:
            path = Path(arguments[1]).parent
        elif store is None:
            path = _open(arguments)
        else:
            path = _shared_path(store, arguments)
        return train(load_config(path / "config.yaml"), path, store)
    except ClipscaleError as error:
        return _report(path, error, error.exit_code)
    except KeyboardInterrupt:
        return _report(path, ClipscaleError("interrupted before training began"), ExitCode.FAILED)
    except Exception as error:
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
    return open_run(config, experiment, overrides, int(os.environ.get("WORLD_SIZE", 1))).path


def _shared_path(store: Any, overrides: list[str]) -> Path:
    def make() -> str:
        try:
            return str(_open(overrides).absolute())
        except ClipscaleError as error:
            return f"error: {error}"

    answer = distributed.share(store, "clipscale/run", make)
    if answer.startswith("error: "):
        if os.environ["RANK"] != "0":
            raise SystemExit(ExitCode.USER_ERROR)
        raise ClipscaleError(answer.removeprefix("error: "))
    return Path(answer)


def _report(path: Path | None, error: BaseException, code: ExitCode) -> ExitCode:
    text = str(error) or type(error).__name__
    logging.getLogger("clipscale").error(text)
    # All ranks may fail at once, or one alone: the first to write speaks for all.
    if path is None or not path.is_dir() or write_result(path, "failed", code, first=True, error=text):
        print(f"error: {text}", file=sys.stderr)
    return code


def _log_to(file: Path) -> None:
    handler = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("clipscale")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


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
    code = main(sys.argv[1:])
    # torchrun restarts a failed worker and calls every failure 1: a run that ended on purpose has said so in
    # result.json.
    sys.exit(0 if code in (ExitCode.DONE, ExitCode.PREEMPTED) else int(code))
