"""``clipscale plan --measure``: real steps of the configuration's own model on this machine, in place of assumptions.

As many processes as a node of the configuration has step together here, laid out as it says, on as large a share of
its batch as a few seconds allow, and on a quarter of that; then they time collectives. What a step takes beside what
the model of :mod:`clipscale.planner.speed` has for its loss and its communication is the towers': a part for each FLOP,
and a fixed one. Importing this imports no torch: the processes that measure do.
"""

from __future__ import annotations

import os
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipscale.config import Config
from clipscale.config.optim import LossName
from clipscale.errors import ConfigError
from clipscale.planner.job import Job
from clipscale.planner.memory import BUCKET, memory
from clipscale.planner.processes import together
from clipscale.planner.speed import Calibration, speed

if TYPE_CHECKING:
    from clipscale.distributed.runtime import Runtime
    from clipscale.trainer.step import TrainStep

STEP_S, STEPS_S = 2.0, 6.0  # of a step that is timed, as the catalogue has it; of all of them
ROUNDS = (5, 40)  # steps that are timed, at least and at most
LOSS_PAIRS, REDUCED = 1024, 12  # of a loss that is timed; times that each all-reduce is


@dataclass(frozen=True)
class Task:
    """What the processes time: steps of ``pairs`` each, and of ``fewer``."""

    config: Config
    lengths: list[int]
    pairs: int
    fewer: int
    processes: int
    rounds: int


@dataclass(frozen=True)
class Found:
    """Seconds of the steps, round by round, of a loss of ``LOSS_PAIRS``, and of all-reduces of ``BUCKET`` bytes and of
    a number."""

    steps_s: list[float]
    fewer_s: list[float]
    loss_s: float
    bucket_s: float
    number_s: float


def calibrate(job: Job) -> Calibration:
    """Time steps of ``job`` on this machine, whose hardware it names, in as many processes as a node of it has.

    Raises ConfigError where that cannot be: a classifier, which has no batch before its data are read, or a model that
    does not fit here; ClipscaleError when a process fails.
    """
    if job.is_classifier:
        raise ConfigError("--measure: loss=cross_entropy takes its classes from data; plan it without --measure")
    task = _task(job)
    found = _measure(task)
    loss_flops = 8 * LOSS_PAIRS**2 * job.config.model.embed_dim
    links: dict[str, float] = {}
    if task.processes > 1:
        sent = 2 * (task.processes - 1) / task.processes * BUCKET
        links["bandwidth"] = sent / max(found.bucket_s - found.number_s, 1e-6)
        links["hop_s"] = found.number_s / (2 * (task.processes - 1).bit_length())
    rough = Calibration(task.pairs, task.processes, 0.0, 0.0, found.loss_s / loss_flops, **links)
    return _fit(job, task, found, rough)


def _fit(job: Job, task: Task, found: Found, rough: Calibration) -> Calibration:
    """The line through what two sizes of steps took beside loss and communication."""
    towers, flops = [], []
    for pairs, rounds in ((task.fewer, found.fewer_s), (task.pairs, found.steps_s)):
        timed = replace(job, config=_of_pairs(job, pairs))
        others = speed(timed, rough)
        # What else the machine does meanwhile is not the configuration's: not the mean, nor the one best.
        taken = sorted(rounds)[len(rounds) // 4]
        towers.append(max(0.3 * taken, taken - others.loss_s - others.communication_s))
        flops.append(timed.executed * pairs)
    whole = towers[1] / flops[1]
    slope = (towers[1] - towers[0]) / (flops[1] - flops[0]) if flops[1] > flops[0] else whole
    per_flop = min(max(slope, 0.5 * whole), whole)  # noise must not turn the line over
    return replace(rough, per_flop_s=per_flop, fixed_s=towers[1] - per_flop * flops[1])


def _of_pairs(job: Job, pairs: int) -> Config:
    """One node of the job, with so many pairs for each of its processes."""
    config = deepcopy(job.config)
    processes = job.per_node if job.world > 1 else 1
    config.global_batch_size, config.optim.microbatches, config.optim.max_microbatch = pairs * processes, 1, None
    config.cluster.nodes, config.cluster.processes_per_node = 1, processes
    config.data.streams = None
    return config


def _task(job: Job) -> Task:
    each = speed(job).compute_s / job.pairs
    pairs = max(1, min(job.pairs, int(STEP_S / each)))
    config = _of_pairs(job, pairs)
    needed, room = memory(replace(job, config=config)).total, job.hardware.usable_bytes
    if needed > room:
        raise ConfigError(
            f"--measure: a step of {pairs} pairs takes {needed / 2**30:.1f} GiB, and a process here has "
            f"{room / 2**30:.1f}; measure a smaller model, or plan without --measure"
        )
    rounds = min(max(int(STEPS_S / (each * pairs)), ROUNDS[0]), ROUNDS[1])
    return Task(config, [*job.lengths], pairs, max(1, pairs // 4), config.cluster.processes_per_node, rounds)


def _measure(task: Task) -> Found:
    """Start the processes; of every round, what the slowest took, for it is waited for."""
    answers: list[Found] = together(task.processes, _time_all, task)
    steps, fewer = (
        [max(each) for each in zip(*rows, strict=True)]
        for rows in ([one.steps_s for one in answers], [one.fewer_s for one in answers])
    )
    rest = [(one.loss_s, one.bucket_s, one.number_s) for one in answers]
    return Found(steps, fewer, *map(max, zip(*rest, strict=True)))


def time_links(processes: int, use_cuda: bool) -> tuple[float, float]:
    """Seconds of an all-reduce of ``BUCKET`` bytes, and of one number, over so many processes on this machine."""
    found: list[tuple[float, float]] = together(processes, _links_alone, processes, use_cuda)
    return max(found)


def time_products(use_cuda: bool) -> float:
    """FLOP/s of large products, bf16 on a GPU and fp32 on a CPU, in this process."""
    import torch

    device, width = torch.device("cuda" if use_cuda else "cpu"), 8192 if use_cuda else 1024
    factor = torch.randn(width, width, device=device, dtype=torch.bfloat16 if use_cuda else torch.float32)
    taken = []
    for _ in range(ROUNDS[0]):
        _wait(device)
        begun = time.perf_counter()
        factor @ factor
        _wait(device)
        taken.append(time.perf_counter() - begun)
    return 2 * width**3 / min(taken)


def _links_alone(rank: int, meeting: Path, barrier: Barrier, processes: int, use_cuda: bool) -> tuple[float, float]:
    import torch.distributed as dist

    found = link_seconds(_join(rank, meeting, processes, use_cuda))
    dist.destroy_process_group()
    return found


def _join(rank: int, meeting: Path, processes: int, use_cuda: bool) -> Any:
    """Start the process group, and choose the device."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    os.environ["LOCAL_WORLD_SIZE"] = str(processes)
    store = dist.FileStore(str(meeting), processes)
    dist.init_process_group("nccl" if use_cuda else "gloo", store=store, rank=rank, world_size=processes)
    return device


def _time_all(rank: int, meeting: Path, barrier: Barrier, task: Task) -> Found:
    import torch
    import torch.distributed as dist

    from clipscale.distributed.runtime import Runtime

    use_cuda = task.config.device.value != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if use_cuda else "cpu")
    if task.processes > 1 or task.config.parallel.strategy.shards:  # as a run has it
        device = _join(rank, meeting, task.processes, use_cuda)
    step = _build(task, Runtime(rank, task.processes, rank, device))
    seconds: dict[int, list[float]] = {task.pairs: [], task.fewer: []}
    for number in range(task.rounds + 1):
        for pairs, taken in seconds.items():
            barrier.wait()
            once = _time_step(step, task, pairs, device)
            if number:  # the first one allocates
                taken.append(once)
    links = link_seconds(device) if task.processes > 1 else (0.0, 0.0)
    if dist.is_initialized():
        dist.destroy_process_group()
    return Found(seconds[task.pairs], seconds[task.fewer], _time_loss(task, device), *links)


def _build(task: Task, runtime: Runtime) -> TrainStep:
    """The step of a run, over these processes."""
    from clipscale.models import build_model
    from clipscale.optim import Ema, build_optimizer
    from clipscale.parallel import build_scaler, heights, lock, parallelize
    from clipscale.trainer.objective import Objective
    from clipscale.trainer.step import TrainStep

    config = task.config
    model = build_model(config.model, seed=config.seed, logit_bias=config.loss.first_bias)
    lock(model, config.lock)
    laid_out = parallelize(model, config.parallel, runtime.device, config.precision.name, one_pass=True)
    optimizer = build_optimizer(laid_out.model, config.optim, heights(laid_out.model))
    scaler = build_scaler(config.precision.name, runtime.device)
    ema = Ema(laid_out.model, config.ema.decay) if config.ema.decay is not None else None
    return TrainStep(config, runtime, laid_out, Objective(config), optimizer, scaler, ema)


def _time_step(step: TrainStep, task: Task, pairs: int, device: Any) -> float:
    import torch

    from clipscale.data.loader import Batch

    size = task.config.model.vision.image_size
    lengths = torch.tensor((task.lengths * -(-pairs // len(task.lengths)))[:pairs], dtype=torch.int32)
    if pairs < len(task.lengths):  # of few, every so many
        lengths = torch.tensor(task.lengths[:: len(task.lengths) // pairs][:pairs], dtype=torch.int32)
    numbers = torch.arange(pairs)
    images = torch.randint(0, 256, (pairs, 3, size, size), dtype=torch.uint8)
    ids = torch.ones(int(lengths.sum()), dtype=torch.int32)
    batch = Batch(images, ids, lengths, torch.zeros(1, dtype=torch.int64), [], numbers, numbers)
    step.model.train()
    _wait(device)
    begun = time.perf_counter()
    step.zero_grad()
    step(batch, 0, 0.0)
    _wait(device)
    return time.perf_counter() - begun


def _time_loss(task: Task, device: Any) -> float:
    import torch
    import torch.nn.functional as F

    from clipscale.losses import LOSSES

    config, taken = task.config, []
    for _ in range(3):
        drawn = torch.randn(2, LOSS_PAIRS, config.model.embed_dim, device=device)
        image, text = (F.normalize(one, dim=-1).requires_grad_() for one in drawn)
        scale = torch.tensor([10.0], device=device, requires_grad=True)
        bias = scale if config.loss.name is LossName.siglip else None
        _wait(device)
        begun = time.perf_counter()
        LOSSES[config.loss.name.value](image, text, scale, bias).backward()
        _wait(device)
        taken.append(time.perf_counter() - begun)
    return min(taken)


def link_seconds(device: Any) -> tuple[float, float]:
    """Seconds of an all-reduce of ``BUCKET`` bytes, and of one number, over all processes."""
    import torch
    import torch.distributed as dist

    found = []
    for count in (BUCKET // 4, 1):
        tensor, taken = torch.zeros(count, device=device), []
        for _ in range(REDUCED):
            dist.barrier()
            _wait(device)
            begun = time.perf_counter()
            dist.all_reduce(tensor)
            _wait(device)
            taken.append(time.perf_counter() - begun)
        found.append(min(taken))
    return found[0], found[1]


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
