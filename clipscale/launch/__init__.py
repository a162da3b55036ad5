"""Where a run is started: this machine, a Slurm cluster, or Kubernetes. The templates lie in top-level ``launch/``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from clipscale.config import Config
from clipscale.config.running import Scheduler
from clipscale.errors import ConfigError


def submit(config: Config, experiment: str, overrides: Sequence[str], show: bool = False) -> int:
    """Submit a run to what schedules its nodes, or with ``show`` print what would be. Returns the exit code.

    Raises ClipscaleError for a configuration that cannot be run, for a scheduler that is not there or refuses, and for
    several nodes that nobody schedules.
    """
    from clipscale.launch import k8s, slurm

    scheduler = config.cluster.scheduler
    if scheduler is Scheduler.slurm:
        return slurm.submit(config, experiment, overrides, show)
    if scheduler is Scheduler.kubernetes:
        return k8s.submit(config, experiment, overrides, show)
    for line in commands(config, overrides):
        print(line)
    if not show:
        raise ConfigError(
            f"cluster.nodes={config.cluster.nodes} without cluster.scheduler: start each of them with its line above"
        )
    return 0


def commands(config: Config, overrides: Sequence[str]) -> list[str]:
    """What to type on each node of a run that nobody schedules."""
    cluster, given = config.cluster, shlex.join(overrides)
    if cluster.nodes == 1:
        return [f"GPUS={cluster.processes_per_node} {template('torchrun.sh')} {given}"]
    where = f"HEAD=HOST:29400 NODES={cluster.nodes} GPUS={cluster.processes_per_node}"
    return [f"{where} {template('torchrun.sh')} {given}   # on every node; HOST is any one of them"]


def template(name: str) -> Path:
    """A file of ``launch/``: packed into the wheel, or the checkout's own under an editable install."""
    packed = Path(__file__).parent / "templates"
    return (packed if packed.is_dir() else packed.parents[2] / "launch") / name
