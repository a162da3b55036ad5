"""Memory of a process while it trains, from the configuration alone; imports no torch.

Parts are what exists at the peak, where the loss has been formed and the backward pass begins: their sum is the peak.
Hence gradients count where they are there already (DDP's buckets, which stay, and those that microbatches have
gathered), or where there is no room in what the backward pass frees.
"""

from __future__ import annotations

from dataclasses import dataclass

from clipscale.config.optim import LossDtype, LossName, MaskDuplicates, PrecisionName
from clipscale.config.running import Strategy
from clipscale.losses.memory import loss_memory
from clipscale.models.flops import Activations
from clipscale.planner.job import Job

ON_THE_WAY = 0.5  # of what a block keeps: the gradients inside it, while it is computed again and goes backward
BUCKET = 25 * 2**20  # bytes of a bucket of DDP's


@dataclass(frozen=True)
class Memory:
    """Bytes of one process: ``state`` (weights, moments, averages, gradients that stay, casts, what is gathered of
    shards), ``activations`` (of a microbatch), ``loss``, ``input``."""

    state: int
    activations: int
    loss: int
    input: int

    @property
    def total(self) -> int:
        """At the peak."""
        return self.state + self.activations + self.loss + self.input


def memory(job: Job) -> Memory:
    """Of a process of ``job`` on its device."""
    kept = job.activations()
    activations = int(job.microbatch * (kept.total + ON_THE_WAY * kept.live))
    loss, inputs = _loss(job), _inputs(job)
    casts = _casts(job)
    if job.config.parallel.activation_checkpointing in ("full", "selective"):
        # A checkpointed block's are gone when it begins to be computed again.
        casts = max(0, casts - int(job.microbatch * kept.live))
    state = _weights(job) + casts + _gathered(job) + _gradients(job, kept, loss + casts)
    return Memory(state, activations, loss, inputs)


def state_bytes(job: Job) -> int:
    """What a checkpoint of the run holds: fp32 weights, the optimizer's moments, the average."""
    averaged = 4 * job.parameters.total if job.config.ema.decay is not None else 0
    return 4 * job.parameters.total + 8 * job.trained + averaged


def _weights(job: Job) -> int:
    """Weights, moments and averages, or this process's shards of them."""
    if job.config.parallel.cpu_offload:
        return 0
    averaged = 4 * job.trained if job.config.ema.decay is not None else 0  # what is locked is its own average
    return (4 * job.parameters.total + 8 * job.trained + averaged) // job.shards


def _casts(job: Job) -> int:
    """Autocast keeps a copy of each matrix in 16 bits, of one that is gathered from shards too."""
    autocast = job.config.precision.name in (PrecisionName.amp_bf16, PrecisionName.amp_fp16)
    return 2 * (job.parameters.total - job.tables) if autocast else 0


def _gathered(job: Job) -> int:
    """Of what is sharded: the root's parameters, a block and the next one, and the gradient of a block."""
    if not job.config.parallel.strategy.shards:
        return 0
    each = 2 if job.config.precision.name is PrecisionName.bf16 else 4
    rest = job.parameters.total - sum(job.blocks)
    return each * (rest + 2 * max(job.blocks)) + 4 * max(job.blocks)


def _gradients(job: Job, kept: Activations, freed: int) -> int:
    """Those that are there at the peak; ``freed`` is what the backward pass frees beside activations."""
    strategy, all_of_them = job.config.parallel.strategy, 4 * job.trained
    if job.microbatches > 1:  # they gather whole, whatever is sharded
        return all_of_them
    if strategy is Strategy.ddp and job.world > 1:
        return all_of_them + (BUCKET if job.config.parallel.bf16_reduce else 0)
    # They come to be as the backward pass frees activations, the image tower's first.
    mine = all_of_them // job.shards if not job.config.parallel.cpu_offload else 0
    after_images = int(mine * job.trained_vision / max(job.trained, 1)) + int(job.microbatch * kept.text)
    return max(0, max(mine, after_images) - int(job.microbatch * kept.total) - freed)


def _loss(job: Job) -> int:
    """The loss, and the features of all microbatches, whose gradients wait for their turn."""
    config, dim = job.config, job.config.model.embed_dim
    features = 8 * job.pairs * dim * (2 if job.microbatches > 1 else 1)
    if config.loss.name is LossName.cross_entropy:
        return 4 * features
    taken = loss_memory(
        job.pairs,
        job.world,
        dim,
        loss=config.loss.name.value,
        feature_bytes=2 if config.loss.dtype is LossDtype.bf16 else 4,
        cuda=job.hardware.is_gpu,
        kernels=job.hardware.is_gpu,
        extra=job.pairs * config.data.negatives_per_sample if config.data.negatives_key else 0,
        cache_mb=config.loss.cache_mb,
        smoothing=config.loss.label_smoothing > 0,
        masked=config.loss.mask_duplicates is not MaskDuplicates.none,
    )
    return features + taken.peak


def _inputs(job: Job) -> int:
    """Images as bytes, and what tells of captions: on a GPU of a microbatch, in a host's memory of the whole batch."""
    pairs = job.microbatch if job.hardware.is_gpu else job.pairs
    return int(pairs * (3 * job.config.model.vision.image_size**2 + 8 + 40 * job.tokens))
