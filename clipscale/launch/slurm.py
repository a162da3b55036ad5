"""Submits ``launch/slurm.sbatch``, which can be submitted by hand just so."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from clipscale.checkpoint.places import recorded_config
from clipscale.config import Config
from clipscale.config.rundir import log_event, open_run
from clipscale.errors import ClipscaleError
from clipscale.launch import template


def submit(config: Config, experiment: str, overrides: Sequence[str], show: bool) -> int:
    """Queue a run: its directory is opened here, so that every node reads the one configuration. Returns 0.

    Raises ClipscaleError when Slurm is not there, or refuses.
    """
    cluster = config.cluster
    if show:
        print(_shown(config, Path(config.runs_dir, config.name or "NAME")))
        print(template("slurm.sbatch").read_text(), end="")
        return 0
    run = open_run(config, experiment, overrides, cluster.nodes * cluster.processes_per_node, recorded_config)
    command, variables = options(config, run.path.absolute()), environment(config)
    try:
        done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    except FileNotFoundError:
        raise ClipscaleError(
            "cluster.scheduler=slurm, but there is no sbatch here; submit from a node of the cluster, or see what "
            "would be submitted: clipscale launch --print"
        ) from None
    if done.returncode:
        raise ClipscaleError(f"Slurm refuses the job: {done.stderr.strip() or done.stdout.strip()}")
    job = done.stdout.strip().partition(";")[0]
    log_event(run.path, "submitted", job=job, nodes=cluster.nodes, processes_per_node=cluster.processes_per_node)
    print(f"job {job}: {run.path}, on {cluster.nodes} nodes; its log is {run.path}/logs/slurm-{job}.log")
    return 0


def options(config: Config, path: Path) -> list[str]:
    """The command that submits the run in ``path``."""
    cluster, slurm = config.cluster, config.cluster.slurm
    gpus = None if config.device.value == "cpu" or slurm.gres else cluster.processes_per_node
    given = {
        "job-name": path.name, "nodes": cluster.nodes, "output": f"{path}/logs/slurm-%j.log", "gpus-per-node": gpus,
        "partition": slurm.partition, "account": slurm.account, "qos": slurm.qos, "time": slurm.time,
        "signal": f"B:USR1@{slurm.grace_s}", "gres": slurm.gres, "constraint": slurm.constraint,
        "exclude": slurm.exclude,
    }  # fmt: skip
    named = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return ["sbatch", "--parsable", *named, str(template("slurm.sbatch")), "--config", str(path / "config.yaml")]


def environment(config: Config) -> dict[str, str]:
    """Variables that the script reads."""
    cluster, slurm = config.cluster, config.cluster.slurm
    return {
        "PROCESSES_PER_NODE": str(cluster.processes_per_node), "MAX_RESTARTS": str(cluster.max_restarts),
        "SETUP": slurm.setup or "", "CONTAINER": slurm.container or "",
    }  # fmt: skip


def _shown(config: Config, path: Path) -> str:
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment(config).items())
    return f"# {variables} {shlex.join(options(config, path))}\n"
