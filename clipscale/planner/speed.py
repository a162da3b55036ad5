"""How long a step takes, and of what: a model of products, memory, links and the loader; imports no torch.

A step is its parts one after the other; what runs beside the towers' products (gradients on their way, the loader)
counts with what is left of it when those are done. Where nothing has been measured (:mod:`clipscale.planner.measure`),
rates are the catalogue's and the constants here, which are assumptions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from clipscale.config.data import Builtin
from clipscale.config.optim import LossDtype, LossName, PrecisionName
from clipscale.config.running import Strategy
from clipscale.models.flops import activations
from clipscale.planner.job import Job
from clipscale.planner.memory import BUCKET

# Each byte that is kept for the backward pass is written, read, and has a gradient of its size, which is written and
# read; with what is not kept, six times over memory. Compiled blocks save a third of that.
TRAVERSALS, COMPILED_TRAVERSALS = 6, 4
SUSTAINED = 0.8  # of the memory's bandwidth
OPERATIONS = 60  # that the host starts for a block, forward and backward
HIDDEN = 0.9  # of the products' time, beside which a collective can run
LOADED_PER_S = 700.0  # photos of 500x375 that one worker decodes and crops (docs/benchmarks/loader.md)
LOADED_SMALL_PER_S = 3000.0  # of 64 pixels


@dataclass(frozen=True)
class Speed:
    """Seconds of a step: ``compute`` of the towers and the update, ``loss`` with its collectives, ``communication`` of
    gradients and parameters and ``data`` so far as the towers have to wait for them."""

    compute_s: float
    loss_s: float
    communication_s: float
    data_s: float

    @property
    def step_s(self) -> float:
        """All of it."""
        return self.compute_s + self.loss_s + self.communication_s + self.data_s


@dataclass(frozen=True)
class Calibration:
    """What was measured here, in place of the catalogue, by steps of ``pairs`` on each of ``processes``: the towers and
    the update take ``fixed_s`` and ``per_flop_s`` for each FLOP; the loss and links between processes."""

    pairs: int
    processes: int
    fixed_s: float
    per_flop_s: float
    loss_per_flop_s: float
    bandwidth: float | None = None
    hop_s: float | None = None


def speed(job: Job, calibration: Calibration | None = None) -> Speed:
    """Of a step of ``job``."""
    if calibration is not None:
        job = _with_links(job, calibration)
    compute = _compute(job, calibration)
    loss = _loss_products(job, calibration) + _loss_collectives(job)
    communication = _communication(job, compute)
    data = _data(job, compute + loss + communication)
    return Speed(compute, loss, communication, data)


def _with_links(job: Job, found: Calibration) -> Job:
    if found.bandwidth is None or found.hop_s is None:
        return job
    return replace(job, hardware=replace(job.hardware, node_bandwidth=found.bandwidth, hop_s=found.hop_s))


def rate(job: Job) -> float:
    """FLOP/s at which the towers' products run."""
    arithmetic = {PrecisionName.fp32: "fp32", PrecisionName.amp_fp16: "fp16"}.get(job.config.precision.name, "bf16")
    return job.hardware.peak[arithmetic] * job.hardware.attained


def _compute(job: Job, calibration: Calibration | None) -> float:
    """The towers, forward and backward, and the update."""
    if calibration is not None:
        return calibration.fixed_s + calibration.per_flop_s * job.executed * job.pairs
    compiled, again = job.config.parallel.compile, job.executed / job.flops.training
    everything = replace(job.execution, checkpointing="none")
    kept = activations(job.config.model, everything, job.config.precision.name)
    bandwidth = SUSTAINED * job.hardware.memory_bandwidth
    moved = (COMPILED_TRAVERSALS if compiled else TRAVERSALS) * (kept.vision + kept.text) * again * job.pairs
    towers = job.executed * job.pairs / rate(job) + moved / bandwidth
    if not compiled:
        passes = 2 * job.microbatches - 1
        towers = max(towers, OPERATIONS * len(job.blocks) * passes * job.hardware.launch_s)
    averaged = 12 if job.config.ema.decay is not None else 0
    # AdamW reads four numbers and writes three; the norm reads one; autocast reads one and writes a half.
    updated = (32 + averaged) * job.trained / job.shards + 6 * job.parameters.total * job.microbatches
    return towers + updated / bandwidth


def _loss_products(job: Job, calibration: Calibration | None) -> float:
    """Over tiles of the logits (docs/loss.md)."""
    loss, batch = job.config.loss, job.world * job.pairs
    if loss.name is LossName.cross_entropy:
        return 0.0
    kept = 4 * job.pairs * batch <= loss.cache_mb * 2**20 and not job.hardware.is_gpu
    times = 6 if loss.name is LossName.siglip or kept else 8
    products = times * job.pairs * batch * job.config.model.embed_dim
    if calibration is not None:
        return products * calibration.loss_per_flop_s
    arithmetic = "bf16" if loss.dtype is LossDtype.bf16 else "fp32"
    return products / (job.hardware.peak[arithmetic] * job.hardware.attained)


def _loss_collectives(job: Job) -> float:
    """Texts to all ranks, their gradients back, and what joins the sums of rows and columns."""
    loss, batch = job.config.loss, job.world * job.pairs
    if loss.name is LossName.cross_entropy or job.world == 1:
        return _all_reduce(job, 4, job.world)
    each = 2 if loss.dtype is LossDtype.bf16 else 4
    there = 0.0 if loss.overlap_gather else _gather(job, each * batch * job.config.model.embed_dim, job.world)
    back = _gather(job, 4 * batch * job.config.model.embed_dim, job.world)
    return there + back + 2 * _all_reduce(job, 8 * batch, job.world)


def _communication(job: Job, compute: float) -> float:
    """What is left of gradients and parameters on their way when the products are done."""
    if job.world == 1:
        return 0.0
    hidden = HIDDEN * compute if job.hardware.is_gpu else 0.0  # gloo takes the cores that compute
    if job.config.parallel.strategy is Strategy.ddp:
        sent = (2 if job.config.parallel.bf16_reduce else 4) * job.trained
        beside = hidden * 2 / 3 / job.microbatches
        last = _all_reduce(job, min(BUCKET, sent), job.world)  # begins when the backward pass has ended
        return max(0.0, _all_reduce(job, sent, job.world) - last - beside) + last
    return _sharded(job, hidden)


def _sharded(job: Job, hidden: float) -> float:
    """Parameters are gathered unit by unit for every pass, gradients reduced in the last one."""
    each = 2 if job.config.precision.name is PrecisionName.bf16 else 4
    units, group = len(job.blocks) + 2, job.shards
    gathers = 3 * job.microbatches - 1
    unit = job.parameters.total / units
    gathered = gathers * units * _gather(job, each * unit, group)
    reduced = units * _gather(job, 4 * unit, group)
    copies = job.world // group
    if copies > 1:  # the processes of a node share its links to the others
        shard = 4 * job.trained / group * min(group, job.per_node)
        reduced += 2 * shard * (copies - 1) / copies / _bandwidth(job, job.world) + _latency(job, copies)
    first = _gather(job, each * unit, group)
    return max(0.0, gathered + reduced - first - hidden) + first


def _bandwidth(job: Job, group: int) -> float:
    return job.hardware.node_bandwidth if group <= job.per_node else job.hardware.network_bandwidth


def _gather(job: Job, size: float, group: int) -> float:
    """An all-gather to, or a reduce-scatter of, ``size`` bytes, by a ring."""
    if group == 1:
        return 0.0
    return size * (group - 1) / group / _bandwidth(job, group) + (group - 1) * job.hardware.hop_s


def _all_reduce(job: Job, size: float, group: int) -> float:
    """Of ``size`` bytes, by trees."""
    if group == 1:
        return 0.0
    return 2 * size * (group - 1) / group / _bandwidth(job, group) + _latency(job, group)


def _latency(job: Job, group: int) -> float:
    return 2 * math.ceil(math.log2(group)) * job.hardware.hop_s


def _data(job: Job, step: float) -> float:
    """What a step waits for the loader, and for the copy to the device."""
    size = 3 * job.config.model.vision.image_size**2 * job.pairs
    copied = size / job.hardware.host_bandwidth if job.hardware.is_gpu else 0.0
    data = job.config.data
    if data.builtin is Builtin.synthetic:
        return copied
    each = 1 / (LOADED_SMALL_PER_S if job.config.model.vision.image_size <= 64 else LOADED_PER_S)
    if data.workers == 0:
        return copied + job.pairs * each
    return copied + max(0.0, job.pairs * each / data.workers - step)
