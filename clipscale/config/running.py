"""``parallel``, ``cluster``, ``distributed``, ``checkpoint``, ``eval`` and ``tracking``: where and how a run runs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from clipscale.config.fields import free


class Strategy(Enum):
    """How parameters, gradients and optimizer state lie on the ranks."""

    ddp = "ddp"
    fsdp = "fsdp"


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
    """`ddp` replicates; `fsdp` shards parameters, gradients and optimizer state (FSDP2, a unit per block)."""
    activation_checkpointing: Any = free("none")
    """`none`, or `full`: recompute every block in the backward pass instead of keeping its activations."""
    compile: bool = free(False)
    """torch.compile each block of the vision tower, and on GPUs of the text tower, whose batches are then filled up to
    a multiple of 256 tokens; it pays on GPUs, and needs a C++ compiler on CPUs."""


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
    """Times that `clipscale train` starts its processes again, from the last checkpoint, after one of several died."""


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
    """Save at the first step at or past each multiple of this many samples; null or 0 saves only at the end."""
    keep_last: int = free(2)
    """Number of newest checkpoints kept."""


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
    """The metric that a sweep maximises, and that result.json repeats as `objective`."""


@dataclass
class Tracking:
    """Where numbers go besides RUN/metrics.jsonl; never images, captions, keys or code."""

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
    log_every_steps: int = free(10)
    """Steps between two rows of training metrics."""
