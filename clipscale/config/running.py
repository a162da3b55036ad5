"""``parallel``, ``cluster``, ``distributed``, ``checkpoint``, ``eval`` and ``tracking``: where and how a run runs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from clipscale.config.fields import event, free, group

RECOMPUTED = ("none", "selective", "full")
"""What `parallel.activation_checkpointing` may say beside a number of blocks."""


class Strategy(Enum):
    """How parameters, gradients and optimizer state lie on the ranks."""

    ddp = "ddp"
    fsdp = "fsdp"
    hsdp = "hsdp"

    @property
    def shards(self) -> bool:
        """Whether a process holds parts of the parameters only."""
        return self is not Strategy.ddp


class Scheduler(Enum):
    """Who starts the nodes."""

    none = "none"
    slurm = "slurm"
    kubernetes = "kubernetes"


class TrackingMode(Enum):
    """Weights & Biases: `auto` is online with a key and offline without one."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass
class Parallel:
    """How the model is laid out over the ranks."""

    strategy: Strategy = free(Strategy.ddp)
    """`ddp` replicates; `fsdp` shards parameters, gradients and optimizer state over all processes (FSDP2, a unit per
    block); `hsdp` shards them within groups of `shard_size` processes, each of which holds a copy."""
    shard_size: int | None = free(None)
    """Processes that share a copy of the model under `hsdp`; null: those of one node."""
    activation_checkpointing: Any = free("none")
    """What the backward pass computes again instead of keeping it: `none`, a number of blocks (the first ones of each
    tower), `full` (all blocks), or `selective` (all blocks, but for attention and the products that widen)."""
    compile: bool = free(False)
    """torch.compile each block of the vision tower, and on GPUs of the text tower, whose batches are then filled up to
    a multiple of 256 tokens; it pays on GPUs, and needs a C++ compiler on CPUs."""
    cpu_offload: bool = free(False)
    """Keep the shards of `fsdp` and `hsdp`, their gradients and the optimizer's state in the host's memory: room on the
    GPU, for much slower steps."""
    bf16_reduce: bool = event(False)
    """`ddp` sends gradients as bf16, half as many bytes, and rounds each to 8 bits on its way."""


class K8sKind(Enum):
    """What Kubernetes is given."""

    job = "job"
    trainjob = "trainjob"


@dataclass
class Slurm:
    """What a job is submitted with; null leaves it to the cluster."""

    partition: str | None = free(None)
    """Where it is queued."""
    account: str | None = free(None)
    """Who pays."""
    qos: str | None = free(None)
    """Quality of service."""
    time: str | None = free(None)
    """Limit of one go, as `12:00:00`; a run that is not done saves before, and is queued again."""
    grace_s: int = free(120)
    """Seconds before that limit at which a run is asked to save."""
    gres: str | None = free(None)
    """GPUs of a node as this cluster names them, as `gpu:h100:8`; null: `--gpus-per-node` of as many as processes."""
    constraint: str | None = free(None)
    """Features that nodes must have."""
    exclude: str | None = free(None)
    """Nodes that must not be taken, as `'node[3,7]'`, quotes and all."""
    container: str | None = free(None)
    """Image to run in, where Slurm has pyxis."""
    setup: str | None = free(None)
    """Shell commands that come first on each node, as `module load cuda; source venv/bin/activate`."""


@dataclass
class Kubernetes:
    """What goes into the manifest."""

    kind: K8sKind = free(K8sKind.job)
    """`job`: an Indexed Job and a headless Service, of Kubernetes itself; `trainjob`: of Kubeflow Trainer 2."""
    namespace: str | None = free(None)
    """Null: that of the current context."""
    image: str = free("clipscale")
    """Made by the Dockerfile, or by yours."""
    pull_secret: str | None = free(None)
    """Secret to pull it with."""
    service_account: str | None = free(None)
    """What the pods act as, for a bucket that knows it."""
    env_from: list[str] = free([])
    """Secrets whose entries become environment variables, as `WANDB_API_KEY` and keys of a bucket."""
    volumes: list[str] = free([])
    """Persistent volume claims and where each is mounted: `[data:/data]`."""
    shm_size: str = free("64Gi")
    """Shared memory of a pod; loaders hand batches over in it."""
    node_selector: list[str] = free([])
    """Labels that nodes must have: `[gpu=h100]`."""
    tolerations: list[str] = free([])
    """Keys of taints that pods bear: `[nvidia.com/gpu]`."""
    resources: list[str] = free([])
    """Limits of a pod beside its GPUs: `[memory=900Gi]`."""


@dataclass
class Cluster:
    """Where and how many."""

    scheduler: Scheduler = free(Scheduler.none)
    """What starts the nodes; `none` starts the processes of one node itself."""
    nodes: int = free(1)
    """Number of machines."""
    processes_per_node: int = free(1)
    """Processes (GPUs) per machine."""
    max_restarts: int = free(3)
    """Times that the processes are started again, from the last checkpoint, after one of several died."""
    preflight: bool = free(True)
    """Look before a run of several nodes begins, all of them together: libraries, shards, open files, clocks, slow
    devices and the network between them (as `clipscale doctor` does of one machine); what would break it ends it."""
    slurm: Slurm = group(Slurm)
    k8s: Kubernetes = group(Kubernetes)


@dataclass
class Distributed:
    """Process groups."""

    timeout_s: float = free(1800.0)
    """Seconds after which a collective that does not complete ends the run."""
    watchdog_s: float | None = free(900.0)
    """Seconds without a step after which a rank writes to RUN/logs what its threads and collectives do, and ends; null:
    never. Starting, evaluating and saving have ten times as long."""


@dataclass
class Checkpoint:
    """When the run is saved, and what is kept."""

    every_samples: int | None = free(1_000_000)
    """Save at the first step at or past each multiple of this many samples; null or 0: not by samples. The end of a run
    is saved in any case."""
    every_minutes: float | None = free(None)
    """Save when so many minutes have passed since the last save; null or 0: not by time."""
    keep_last: int = free(2)
    """Number of newest checkpoints kept. One that holds a file named `PINNED` is never removed."""
    keep_every_samples: int | None = free(None)
    """Keep for good the first checkpoint at or past each multiple of this many samples; null or 0 keeps none."""
    best_metric: str | None = free(None)
    """Keep the checkpoint that is best by this metric of the evaluations, e.g. `val/zeroshot/top1`, and save where it
    is best; of a metric whose name ends in `loss` the lowest is, of others the highest. null: none."""
    dir: str | None = free(None)
    """Directory or URL (`s3://BUCKET/PREFIX`, `gs://…`, `az://…`) below which, by the run's name, its checkpoints lie,
    with its configuration; `storage.*` says how it is reached. null: in the run's own directory."""
    resume_from: str | None = free(None)
    """A checkpoint or run, of any location, that a run without a checkpoint goes on from as if it were its own:
    weights, optimizer, averages, counters and place in the data."""


@dataclass
class Eval:
    """Evaluation inside the training loop."""

    every_samples: int | None = free(1_000_000)
    """Evaluate at the first step at or past each multiple of this many samples, and at the end; null or 0: only at
    the end."""
    batch_size: int = free(256)
    """Images or captions per forward pass."""
    timeout_s: float = free(7200.0)
    """Seconds for which ranks wait for each other in an evaluation, in place of `distributed.timeout_s`."""
    objective: str = free("val/retrieval/i2t_r1")
    """The metric that a sweep is to improve (the highest is best; of one whose name ends in `loss`, the lowest), and
    that result.json repeats as `objective`."""
    patience: int | None = free(None)
    """End the run, as done, after so many evaluations in a row that did not improve `eval.objective`; null or 0:
    train to `total_samples`."""


@dataclass
class Tracking:
    """Where numbers go besides RUN/metrics.jsonl; images, captions, code and checkpoints only where it says so."""

    mode: TrackingMode = free(TrackingMode.auto)
    """Weights & Biases mode."""
    project: str = free("clipscale")
    """W&B project."""
    entity: str | None = free(None)
    """W&B entity; null is the account's default."""
    group: str | None = free(None)
    """W&B group."""
    tags: list[str] = free([])
    """W&B tags."""
    job_type: str = free("train")
    """W&B job type."""
    alerts: bool = free(True)
    """Alert by W&B when steps are skipped, training goes back or stands still, a rank is slow, a checkpoint cannot be
    written, or an error ends the run; numbers only."""
    media: bool = free(False)
    """Send pictures to W&B: a batch as training sees it, with its captions, and of each evaluation retrieved images,
    similarities and the confusion of classes."""
    code: bool = free(False)
    """Send W&B the commit of the code that runs, and what was changed since."""
    checkpoints: bool = free(False)
    """Send W&B the last checkpoint when the run ends, as an artifact (one in a bucket as a reference), and wait for it
    up to an hour."""
    tensorboard: bool = free(False)
    """Write RUN/tensorboard as well, for `tensorboard --logdir RUN/tensorboard`; its steps are samples seen."""
    log_every_steps: int = free(10)
    """Steps between two rows of training metrics."""
