"""Fills in ``launch/k8s-*.yaml`` from the configuration, and applies it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from clipscale.config import Config, validate
from clipscale.config.resume import identity
from clipscale.config.running import K8sKind, Kubernetes
from clipscale.errors import ClipscaleError, ConfigError
from clipscale.launch import template

PORT = 29400
LONGEST_NAME = 50  # of a run: with a pod's number behind it, a label of DNS holds 63


def submit(config: Config, experiment: str, overrides: Sequence[str], show: bool) -> int:
    """Apply the manifest of a run. Nothing is written here: its pods open its directory, or its bucket. Returns 0.

    Raises ClipscaleError when there is no kubectl, or it refuses.
    """
    cluster = config.cluster
    validate(config, cluster.nodes * cluster.processes_per_node)
    text = manifest(config, experiment, overrides)
    if show:
        print(text, end="")
        return 0
    mounted = _pairs(cluster.k8s.volumes, ":", "cluster.k8s.volumes").values()
    if config.checkpoint.dir is None and not any(Path(config.runs_dir).is_relative_to(path) for path in mounted):
        raise ConfigError(
            f"checkpoint.dir is null, and runs_dir={config.runs_dir} lies on no claim of cluster.k8s.volumes: what "
            "pods write would go with them; use checkpoint.dir=s3://…, or a runs_dir on a claim"
        )
    try:
        done = subprocess.run(["kubectl", "apply", "-f", "-"], input=text, capture_output=True, text=True)
    except FileNotFoundError:
        raise ClipscaleError(
            "cluster.scheduler=kubernetes, but there is no kubectl here; write the manifest, and apply it elsewhere: "
            "clipscale launch --print"
        ) from None
    if done.returncode:
        raise ClipscaleError(f"Kubernetes refuses the job: {done.stderr.strip()}")
    print(done.stdout, end="")
    if "unchanged" in done.stdout.splitlines()[-1]:
        raise ClipscaleError("that job is there already, running or over; to run it anew, kubectl delete it first")
    return 0


def manifest(config: Config, experiment: str, overrides: Sequence[str]) -> str:
    """The YAML of a run: an Indexed Job and its Service, or a TrainJob."""
    name = (config.name or f"{experiment}-{identity(config)}").lower().replace("_", "-").replace(".", "-")
    if len(name) > LONGEST_NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise ConfigError(
            f"name={config.name or name}: Kubernetes takes up to {LONGEST_NAME} letters, digits and hyphens, from a "
            "letter to a letter or digit"
        )
    kind = config.cluster.k8s.kind
    filled = _trainjob(config, name, overrides) if kind is K8sKind.trainjob else _job(config, name, overrides)
    for part in filled:
        part["metadata"] |= {"name": name} | _present(namespace=config.cluster.k8s.namespace)
    return yaml.safe_dump_all(filled, sort_keys=False)


def _job(config: Config, name: str, overrides: Sequence[str]) -> list[dict[str, Any]]:
    cluster, k8s = config.cluster, config.cluster.k8s
    service, job = _template("k8s-job.yaml")
    service["spec"]["selector"] = {"job-name": name}
    job["spec"] |= {"completions": cluster.nodes, "parallelism": cluster.nodes}
    inside = job["spec"]["template"]
    inside["metadata"]["labels"] = {"job-name": name}
    (container,) = inside["spec"]["containers"]
    container["image"] = k8s.image
    container["args"] = [
        f"--nnodes={cluster.nodes}", f"--nproc-per-node={cluster.processes_per_node}",
        f"--max-restarts={cluster.max_restarts}", "--rdzv-backend=c10d", f"--rdzv-endpoint={name}-0.{name}:{PORT}",
        f"--rdzv-id={name}", "--", *overrides,
    ]  # fmt: skip
    container["resources"] = {"limits": _limits(config)}
    container |= _present(envFrom=[{"secretRef": {"name": secret}} for secret in k8s.env_from])
    volumes = _pairs(k8s.volumes, ":", "cluster.k8s.volumes")
    container["volumeMounts"] += [{"name": claim, "mountPath": path} for claim, path in volumes.items()]
    shared, *_ = inside["spec"]["volumes"]
    shared["emptyDir"]["sizeLimit"] = k8s.shm_size
    claims = [{"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in volumes]
    inside["spec"] |= {"subdomain": name, "volumes": [shared, *claims]} | _present(
        serviceAccountName=k8s.service_account,
        imagePullSecrets=[{"name": k8s.pull_secret}] if k8s.pull_secret else None,
        nodeSelector=_pairs(k8s.node_selector, "=", "cluster.k8s.node_selector"),
        tolerations=[{"key": key, "operator": "Exists"} for key in k8s.tolerations],
    )
    return [service, job]


def _trainjob(config: Config, name: str, overrides: Sequence[str]) -> list[dict[str, Any]]:
    cluster, k8s = config.cluster, config.cluster.k8s
    (job,) = _template("k8s-trainjob.yaml")
    job["spec"]["trainer"] |= {
        "image": k8s.image, "numNodes": cluster.nodes, "numProcPerNode": cluster.processes_per_node,
        "args": [f"--max-restarts={cluster.max_restarts}", "--", *overrides],
        "resourcesPerNode": {"limits": _limits(config)},
    }  # fmt: skip
    refused = ("env_from", "node_selector", "pull_secret", "service_account", "shm_size", "tolerations", "volumes")
    if given := next((key for key in refused if getattr(k8s, key) != getattr(Kubernetes(), key)), None):
        raise ConfigError(
            f"cluster.k8s.{given} belongs to the runtime of a TrainJob: set it in torch-distributed, or use "
            "cluster.k8s.kind=job"
        )
    return [job]


def _limits(config: Config) -> dict[str, Any]:
    gpus = {} if config.device.value == "cpu" else {"nvidia.com/gpu": config.cluster.processes_per_node}
    return gpus | _pairs(config.cluster.k8s.resources, "=", "cluster.k8s.resources")


def _pairs(given: Sequence[str], sign: str, key: str) -> dict[str, str]:
    for one in given:
        if sign not in one.strip(sign):
            raise ConfigError(f"{key}: {one!r} is no NAME{sign}VALUE")
    names = [one.partition(sign)[0] for one in given]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"{key}: {twice} stands there twice")
    return {name: value for name, _, value in (one.partition(sign) for one in given)}


def _template(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(Path(template(name)).read_text()))


def _present(**given: Any) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value}
