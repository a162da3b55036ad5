"""``clipscale plan``: from overrides and options to what is printed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import rich.console

from clipscale.config import Config, compose, validate
from clipscale.config.running import Scheduler
from clipscale.config.schema import Device
from clipscale.errors import ConfigError
from clipscale.hardware import Hardware, find
from clipscale.planner import show
from clipscale.planner.job import Job
from clipscale.planner.measure import calibrate
from clipscale.planner.plan import Plan, make_plan
from clipscale.planner.speed import Calibration

ASSUMED = "h100"  # where the cluster is another machine's and nobody says what it has


@dataclass(frozen=True)
class Options:
    """Those of the command beside overrides; see its help."""

    hardware: str | None = None
    efficiency: float | None = None
    tokens: float | None = None
    data_samples: int | None = None
    price: float | None = None
    measure: bool = False
    config_dir: str | None = None


def plan(
    overrides: Sequence[str], options: Options, sweep: Sequence[str] = (), picture: Path | None = None,
    as_json: bool = False,
) -> list[Plan]:  # fmt: skip
    """Print what a configuration takes, or with ``sweep`` each of several, ``KEY=VALUE,VALUE,...``.

    Raises ConfigError for a configuration that cannot be run, hardware that is not known, and towers whose cost is not.
    """
    variants = _variants(sweep)
    plans = [_one([*overrides, *variant], options) for variant in variants]
    names = [" ".join(variant) or found.job.config.model.name for variant, found in zip(variants, plans, strict=True)]
    if as_json:
        found: Any = [{"overrides": [*variant]} | one.as_json() for variant, one in zip(variants, plans, strict=True)]
        print(json.dumps(found if sweep else plans[0].as_json(), indent=2))
    else:
        console = rich.console.Console(highlight=False, width=None if sys.stdout.isatty() else 120)
        console.print(show.sweep_table(names, plans) if sweep else show.table(plans[0]))
        console.print(f"\n{show.sureness(plans[0])}")
    if picture is not None:
        show.plot(names, plans, picture)
    return plans


def _one(overrides: Sequence[str], options: Options) -> Plan:
    config, _ = compose(overrides, options.config_dir)
    validate(config)
    hardware = _hardware(config, options.hardware)
    if options.efficiency is not None:
        if not 0 < options.efficiency <= 1:
            raise ConfigError(f"--efficiency {options.efficiency:g} must lie in (0, 1]")
        hardware = replace(hardware, attained=options.efficiency)
    job = Job(config, hardware, options.tokens)
    calibration = _calibrate(job, options) if options.measure else None
    return make_plan(job, calibration, options.data_samples, options.price)


def _calibrate(job: Job, options: Options) -> Calibration:
    if options.hardware is not None or options.efficiency is not None:
        raise ConfigError("--measure times this machine: --hardware and --efficiency are for others")
    if job.hardware.is_gpu and _gpu_here() is None:
        raise ConfigError(f"--measure times this machine, which has no {job.hardware.name}; use device=cpu")
    return calibrate(job)


def _variants(sweep: Sequence[str]) -> list[tuple[str, ...]]:
    """All combinations of the values that are swept, as overrides; of none, one without any."""
    axes = []
    for one in sweep:
        key, given, values = one.partition("=")
        if not key or not given or not values:
            raise ConfigError(f"--sweep {one}: give KEY=VALUE,VALUE,..., e.g. --sweep cluster.nodes=1,2,4")
        axes.append([f"{key}={value}" for value in ([values] if values[0] in "[{'\"" else values.split(","))])
    return list(product(*axes))


def _hardware(config: Config, name: str | None) -> Hardware:
    """The one that is named; or this machine's, if the run would be started here; or an assumption."""
    processes = config.cluster.processes_per_node
    if name is not None:
        return find(name, processes)
    if config.device is Device.cpu:
        return find("cpu", processes)
    here = _gpu_here() if config.cluster.scheduler is Scheduler.none and config.cluster.nodes == 1 else None
    if here is not None:
        return find(here)
    is_here = config.device is Device.auto and config.cluster.scheduler is Scheduler.none
    return find("cpu" if is_here else ASSUMED, processes)


def _gpu_here() -> str | None:
    """Name of this machine's first GPU; asked of its driver, since torch takes seconds to import."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found[0].strip() if found else None
