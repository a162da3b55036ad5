"""A real Slurm of two nodes: a run trains on both, is preempted and runs out of time, and ends as if alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import BATCH, recipe
from tests.e2e.test_chaos import data
from tests.runs import events, keys, last_step, losses, run
from tests.slurm import HAVE_SLURM, cluster, state

STEPS = 1500
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(not HAVE_SLURM, reason="needs slurmctld and munge, as root")]
Submit = Callable[..., "Job"]


class Job:
    """A run that was submitted."""

    def __init__(self, path: Path, number: str) -> None:
        self.path, self.number = path, number

    @property
    def step(self) -> int:
        return last_step(self.path, BATCH)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return events(self.path, kind)

    def until(self, condition: Callable[[], bool], seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline and state(self.number) not in ("FAILED", "CANCELLED"), self.log()
            time.sleep(0.2)

    def end(self, seconds: float = 1200) -> None:
        self.until(lambda: state(self.number) in ("COMPLETED", ""), seconds)
        assert json.loads((self.path / "result.json").read_text())["status"] == "done", self.log()

    def log(self) -> str:
        files = [*self.path.glob("logs/slurm-*.log")]
        return f"{state(self.number)} at step {self.step}\n" + "\n".join(file.read_text() for file in files)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with cluster(tmp_path_factory.mktemp("slurm") / "two"):
        yield


@pytest.fixture
def submit(slurm: None, tmp_path: Path) -> Submit:
    def give(name: str, steps: int, *overrides: str) -> Job:
        arguments = [*recipe(tmp_path, data()), f"total_samples={BATCH * steps}", "schedule=constant", *overrides]
        command = [sys.executable, "-m", "clipscale.cli", "launch", *arguments, f"name={name}", "cluster=slurm"]
        command += ["cluster.nodes=2", "cluster.processes_per_node=2", "distributed.watchdog_s=60"]
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        found = re.match(r"job (\d+): ", done.stdout)
        assert found is not None, done.stdout
        return Job(tmp_path / name, found[1])

    return give


def assert_undisturbed(job: Job, steps: int) -> None:
    """The run of one process that nothing happens to has the same samples, and for 1,500 steps losses to three digits.

    Four processes round sums otherwise than one does, and training makes more of that with each step.
    """
    arguments = recipe(job.path.parent, data())
    run(*arguments, f"total_samples={BATCH * steps}", "schedule=constant", "name=alone", timeout=900)
    alone = job.path.with_name("alone")
    ours, theirs = losses(job.path), losses(alone)
    assert keys(job.path) == keys(alone) and list(ours) == list(theirs)
    assert max(abs(ours[seen] - theirs[seen]) for seen in list(theirs)[:STEPS]) < 1e-3


def test_two_nodes_train(submit: Submit) -> None:
    job = submit("both", 40)
    job.end()
    (started,) = job.events("started")
    assert started["world_size"] == 4
    assert_undisturbed(job, 40)


@pytest.mark.slow
def test_preempted_three_times(submit: Submit) -> None:
    job = submit("preempted", STEPS)
    for go in range(1, 4):
        job.until(lambda go=go: len(job.events("started")) == go and job.step >= 20 * go)
        urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"]
        subprocess.run([*urgent, "--wrap=sleep 3"], check=True, capture_output=True)
        job.until(lambda go=go: len(job.events("preempted")) == go)
    job.end()
    print([event["samples_seen"] // BATCH for event in job.events("started")])
    assert_undisturbed(job, STEPS)


@pytest.mark.slow
def test_out_of_time_three_times(submit: Submit) -> None:
    """Three minutes for each go, of which it starts and trains for one and a half; then as long as it takes."""
    steps = 5 * STEPS // 3
    job = submit("late", steps, "cluster.slurm.time=3", "cluster.slurm.grace_s=90")
    job.until(lambda: len(job.events("preempted")) == 3, 1500)
    subprocess.run(["scontrol", "update", f"JobId={job.number}", "TimeLimit=60"], check=True)
    job.end(1800)
    print([event["samples_seen"] // BATCH for event in job.events("started")])
    assert len(job.events("started")) == 4
    assert_undisturbed(job, steps)


@pytest.mark.slow
def test_a_cancelled_job_stays_so(submit: Submit) -> None:
    job = submit("cancelled", STEPS)
    job.until(lambda: job.step >= 5)
    subprocess.run(["scancel", job.number], check=True)
    deadline = time.monotonic() + 120
    while state(job.number) not in ("CANCELLED", ""):
        assert time.monotonic() < deadline, job.log()
        time.sleep(0.5)
    time.sleep(15)
    assert state(job.number) in ("CANCELLED", "")


@pytest.mark.slow
def test_a_sweep_is_a_job_for_each(slurm: None, tmp_path: Path) -> None:
    arguments = [*recipe(tmp_path, data()), f"total_samples={BATCH * 10}", f"hydra.sweep.dir={tmp_path}/sweep"]
    command = [sys.executable, "-m", "clipscale.cli", "train", "-m", *arguments, "optim.lr=1e-3,3e-4"]
    command += ["hydra/launcher=submitit_slurm", "hydra.launcher.mem_gb=null", "hydra.launcher.timeout_min=10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(file.read_text()) for file in tmp_path.glob("*/result.json")]
    assert [result["status"] for result in results] == ["done", "done"]
