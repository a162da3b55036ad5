"""What is submitted, to whom, and what a user hears who has no cluster."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob
from typer.testing import CliRunner

from clipscale.cli import app, launch
from clipscale.config import compose
from clipscale.config.rundir import write_result
from clipscale.errors import ClipscaleError, ConfigError, ExitCode
from clipscale.launch import commands, slurm, template
from clipscale.launch.k8s import manifest
from clipscale.launch.node import _outcome

K8S = ["cluster=k8s", "cluster.nodes=4", "name=my_run", "checkpoint.dir=s3://bucket/runs"]
ROOT = Path(__file__).parents[2]
KUBERNETES = "1.33"


def documents(text: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(text))


def rendered(*overrides: str) -> list[dict[str, Any]]:
    config, experiment = compose([*K8S, *overrides])
    return documents(manifest(config, experiment, [*K8S, *overrides]))


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch"])
def test_scripts_are_shell(script: str) -> None:
    subprocess.run(["bash", "-n", template(script)], check=True)


def test_manifests_are_what_kubernetes_knows() -> None:
    """Without a cluster: by its own schemas, which refuse an unknown key, and find one that is put in."""
    made = rendered(
        "cluster.k8s.namespace=team", "cluster.k8s.image=me/clipscale:1", "cluster.k8s.pull_secret=key",
        "cluster.k8s.service_account=trainer", "cluster.k8s.env_from=[wandb]", "cluster.k8s.volumes=[data:/data]",
        "cluster.k8s.node_selector=['gpu=h100']", "cluster.k8s.resources=['memory=900Gi']",
        "cluster.k8s.tolerations=[nvidia.com/gpu]",
    )  # fmt: skip
    for one in [*made, *documents(template("k8s-job.yaml").read_text())]:
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
    wrong = made[1]
    wrong["spec"]["backofLimit"] = 3
    with pytest.raises(kubernetes_validate.ValidationError, match="backofLimit"):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_a_job_on_kubernetes() -> None:
    service, job = rendered("cluster.k8s.volumes=[data:/data]", "data.root=/data", "cluster.k8s.env_from=[wandb]")
    assert service["metadata"]["name"] == job["metadata"]["name"] == "my-run"
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 4
    assert "--nnodes=4" in container["args"] and "--rdzv-endpoint=my-run-0.my-run:29400" in container["args"]
    assert container["args"][-2:] == ["data.root=/data", "cluster.k8s.env_from=[wandb]"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert {"name": "data", "mountPath": "/data"} in container["volumeMounts"]
    assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}]


def test_a_train_job_survives_its_own_types() -> None:
    """The types drop what they do not know: what comes back must be what went in."""
    (job,) = rendered("cluster.k8s.kind=trainjob", "cluster.k8s.image=me/clipscale:1")
    for one in (job, *documents(template("k8s-trainjob.yaml").read_text())):
        back = TrainerV1alpha1TrainJob.from_dict(one)
        assert back is not None and back.to_dict() == one
    assert job["spec"]["trainer"]["numNodes"] == 4
    assert job["spec"]["trainer"]["args"][:3] == ["--max-restarts=3", "--", "cluster=k8s"]
    with pytest.raises(ConfigError, match=r"cluster.k8s.shm_size belongs"):
        rendered("cluster.k8s.kind=trainjob", "cluster.k8s.shm_size=1Gi")
    with pytest.raises(ConfigError, match=r"cluster.k8s.volumes belongs to the runtime of a TrainJob"):
        rendered("cluster.k8s.kind=trainjob", "cluster.k8s.volumes=[data:/data]")


def test_what_kubernetes_cannot_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.k8s\.resources: 'memory' is no NAME=VALUE"):
        rendered("cluster.k8s.resources=[memory]")
    with pytest.raises(ConfigError, match="data stands there twice"):
        rendered("cluster.k8s.volumes=[data:/a,data:/b]")
    for name in ("x" * 51, "2024_run", "run_", "a/b"):
        with pytest.raises(ConfigError, match="Kubernetes takes up to 50 letters"):
            rendered(f"name={name}")


def test_what_slurm_is_given() -> None:
    config, _ = compose(
        ["cluster=slurm", "cluster.nodes=16", "cluster.slurm.partition=train", "cluster.slurm.time='12:00:00'",
         "cluster.slurm.setup='module load cuda'", "cluster.max_restarts=5"]
    )  # fmt: skip
    command = slurm.options(config, Path("/runs/one"))
    assert command[:2] == ["sbatch", "--parsable"] and command[-2:] == ["--config", "/runs/one/config.yaml"]
    assert {"--nodes=16", "--partition=train", "--time=12:00:00", "--gpus-per-node=8"} < set(command)
    assert command[-3] == str(ROOT / "launch" / "slurm.sbatch")
    found = slurm.environment(config)
    assert found == {"PROCESSES_PER_NODE": "8", "MAX_RESTARTS": "5", "SETUP": "module load cuda", "CONTAINER": ""}
    config.cluster.slurm.gres = "gpu:h100:8"
    assert "--gpus-per-node=8" not in slurm.options(config, Path("/runs/one"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster=slurm"], "there is no sbatch here"),
        (K8S, "there is no kubectl here"),
        (K8S[:-1], "runs_dir=.* lies on no claim of cluster.k8s.volumes"),
        (["cluster.nodes=2"], "start each of them with its line above"),
        (["cluster=slurm", "cluster.nodes=0"], "cluster.nodes"),
    ],
)
def test_who_has_no_cluster_hears_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ClipscaleError, match=message):
        launch([*overrides, f"runs_dir={tmp_path}"])


def test_what_would_be_submitted_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = f"runs_dir={tmp_path}"
    assert launch(["cluster=slurm", here, "name=one"], show=True) == 0
    assert f"--config {tmp_path}/one/config.yaml" in (shown := capsys.readouterr().out) and "scontrol requeue" in shown
    assert launch([*K8S, here], show=True) == 0 and documents(capsys.readouterr().out)[1]["kind"] == "Job"
    assert launch(["cluster.nodes=2", "cluster.processes_per_node=4", here], show=True) == 0
    assert capsys.readouterr().out.startswith("HEAD=HOST:29400 NODES=2 GPUS=4 ")
    assert commands(compose(["seed=3"])[0], ["seed=3"]) == [f"GPUS=1 {ROOT}/launch/torchrun.sh seed=3"]
    assert not list(tmp_path.iterdir()), "showing makes nothing"


def test_what_a_node_ends_with(tmp_path: Path) -> None:
    """Asked to end while its ranks still start, a job is to be started again, whether there is a run by then or not."""
    assert _outcome(None, "why", 0, asked=True) is _outcome(tmp_path, "why", 0, asked=True) is ExitCode.PREEMPTED
    assert _outcome(None, "why", 1, asked=False) is _outcome(tmp_path, "why", 1, asked=False) is ExitCode.FAILED
    write_result(tmp_path, "diverged", ExitCode.DIVERGED)
    assert _outcome(tmp_path, "why", 0, asked=True) is ExitCode.DIVERGED


def test_groups_of_the_users_own(tmp_path: Path) -> None:
    """They are found here, and named in what the nodes are given."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nglobal_batch_size: 64\n")
    given = ["launch", "--print", "cluster.nodes=2", "experiment=mine", "--config-dir", str(tmp_path)]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0 and f"['\"'\"'file://{tmp_path}'\"'\"']" in done.stdout, done.output
    with pytest.raises(ClipscaleError, match="there is no such directory"):
        CliRunner().invoke(app, [*given[:-1], "nowhere"], catch_exceptions=False)
