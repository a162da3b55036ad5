"""The root schema."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from clipscale.config.data import Data, Storage, Tokenizer
from clipscale.config.fields import event, fixed, free, group
from clipscale.config.model import Init, Model
from clipscale.config.optim import Divergence, Ema, Lock, Loss, Optim, Precision, Schedule
from clipscale.config.running import Checkpoint, Cluster, Distributed, Eval, Parallel, Tracking


class Device(Enum):
    """Where tensors live; `auto` is CUDA when there is a GPU."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclass
class Config:
    """Everything that makes a run."""

    name: str | None = free(None)
    """Name of the run; null: `<experiment>-<8 hex of the fixed and event keys>`, so the same command resumes."""
    runs_dir: str = free("runs")
    """Directory that holds the run directories."""
    seed: int = fixed(0)
    """Seed of weights, sample order and augmentation."""
    device: Device = free(Device.auto)
    """Device of the towers."""
    global_batch_size: int = event(256)
    """Pairs per optimizer step over all processes: the batch that the contrastive loss sees."""
    total_samples: int = free(1_000_000)
    """Pairs to train on, rounded up to whole batches; may be raised on resume."""
    model: Model = group(Model)
    init: Init = group(Init)
    data: Data = group(Data)
    storage: Storage = group(Storage)
    tokenizer: Tokenizer = group(Tokenizer)
    loss: Loss = group(Loss)
    lock: Lock = group(Lock)
    optim: Optim = group(Optim)
    schedule: Schedule = group(Schedule)
    precision: Precision = group(Precision)
    ema: Ema = group(Ema)
    divergence: Divergence = group(Divergence)
    parallel: Parallel = group(Parallel)
    cluster: Cluster = group(Cluster)
    distributed: Distributed = group(Distributed)
    checkpoint: Checkpoint = group(Checkpoint)
    eval: Eval = group(Eval)
    tracking: Tracking = group(Tracking)
