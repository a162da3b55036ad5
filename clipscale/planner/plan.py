"""The answer to ``clipscale plan``: what a configuration takes, what would fit, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from clipscale.config import Config
from clipscale.config.data import Builtin
from clipscale.config.optim import PrecisionName
from clipscale.config.running import Strategy
from clipscale.planner.job import Job
from clipscale.planner.memory import Memory, memory, state_bytes
from clipscale.planner.speed import Calibration, Speed, speed

# Of a step's time, the least and the most that it may turn out to be, as factors.
UNMEASURED_GPU, UNMEASURED_CPU, MEASURED = (0.7, 3.0), (0.4, 3.0), (0.8, 1.25)
AS_QUICK = 1.05  # times the step of the quickest layout


@dataclass(frozen=True)
class Fitting:
    """A layout and the least activation checkpointing with which a configuration fits; ``microbatches`` as it has them,
    unless it needs more."""

    strategy: str
    activation_checkpointing: str | int
    microbatches: int
    memory: Memory
    step_s: float

    def overrides(self) -> list[str]:
        """What says so on the command line."""
        found = [f"parallel={self.strategy}", f"parallel.activation_checkpointing={self.activation_checkpointing}"]
        return [*found, f"optim.microbatches={self.microbatches}"]


@dataclass(frozen=True)
class Plan:
    """What a job takes.

    ``data_samples`` are those of its training data, where known; ``price`` of a device for an hour.
    """

    job: Job
    memory: Memory
    speed: Speed
    fitting: Fitting | None
    calibration: Calibration | None = None
    data_samples: int | None = None
    price: float | None = None

    @property
    def fits(self) -> bool:
        """Whether it does as it is configured."""
        return self.memory.total <= self.job.hardware.usable_bytes

    @property
    def samples_per_s(self) -> float:
        """Of all processes."""
        return self.job.config.global_batch_size / self.speed.step_s

    @property
    def run_s(self) -> float:
        """Seconds of the whole run: steps alone, without start, evaluations, checkpoints and what fails."""
        return self.job.steps * self.speed.step_s

    @property
    def gpu_hours(self) -> float:
        """Of all processes that the cluster has, whether they train or idle."""
        return self.run_s / 3600 * self.job.asked

    @property
    def cost(self) -> float | None:
        """At the price, if one is given."""
        return None if self.price is None else self.gpu_hours * self.price

    @property
    def epochs(self) -> float | None:
        """Passes over the data."""
        return None if not self.data_samples else self.job.config.total_samples / self.data_samples

    @property
    def range(self) -> tuple[float, float]:
        """Between which factors of a step's time the truth is to be expected."""
        if self.calibration is not None and self.calibration.processes == self.job.world:
            return MEASURED
        return UNMEASURED_GPU if self.job.hardware.is_gpu else UNMEASURED_CPU

    @property
    def mfu(self) -> tuple[float, float]:
        """Share of the peak that what is needed takes of a step, and that what papers count (``NOMINAL``) would."""
        arithmetic = {PrecisionName.fp32: "fp32", PrecisionName.amp_fp16: "fp16"}
        peak = self.job.hardware.peak[arithmetic.get(self.job.config.precision.name, "bf16")]
        per_s = self.job.pairs / self.speed.step_s
        return self.job.flops.training * per_s / peak, self.job.nominal * per_s / peak

    def as_json(self) -> dict[str, Any]:
        """Plain numbers; sizes and counts are integers, times in seconds."""
        job, low_high = self.job, self.range
        parameters = {"vision": job.parameters.vision, "text": job.parameters.text, "total": job.parameters.total}
        sizes = vars(self.memory) | {"total": self.memory.total}
        return {
            "model": job.config.model.name,
            "hardware": job.hardware.name,
            "processes": job.world,
            "spare_processes": job.asked - job.world,
            "pairs_per_process": job.pairs,
            "microbatches": job.microbatches,
            "tokens_per_caption": job.tokens,
            "parameters": parameters | {"trained": job.trained},
            "flops_per_sample": round(job.nominal),
            "flops_needed_per_sample": round(job.flops.training),
            "flops_executed_per_sample": round(job.executed),
            "memory_bytes": sizes,
            "usable_memory_bytes": job.hardware.usable_bytes,
            "fits": self.fits,
            "least_that_fits": None if self.fitting is None else self.fitting.overrides(),
            "step_time_s": self.speed.step_s,
            "step_time_parts_s": {name.removesuffix("_s"): value for name, value in vars(self.speed).items()},
            "step_time_range_s": [factor * self.speed.step_s for factor in low_high],
            "measured": self.calibration is not None,
            "samples_per_s": self.samples_per_s,
            "mfu": self.mfu[0],
            "mfu_nominal": self.mfu[1],
            "steps": job.steps,
            "days": self.run_s / 86400,
            "gpu_hours": self.gpu_hours,
            "cost": self.cost,
            "epochs": self.epochs,
            "checkpoint_bytes": state_bytes(job),
        }


def make_plan(
    job: Job, calibration: Calibration | None = None, data_samples: int | None = None, price: float | None = None
) -> Plan:
    """What ``job`` takes, and what would make it fit. Raises ConfigError for towers whose cost is not known."""
    samples = _known_samples(job.config) if data_samples is None else data_samples
    fitting = least_that_fits(job, calibration)
    return Plan(job, memory(job), speed(job, calibration), fitting, calibration, samples, price)


def least_that_fits(job: Job, calibration: Calibration | None = None) -> Fitting | None:
    """The simplest of the quickest layouts, each with the least that is computed again; more microbatches where nothing
    else helps. None where not even one pair at a time fits."""
    microbatches = job.microbatches
    while True:
        found = [fit for strategy in _strategies(job) if (fit := _fit(job, strategy, microbatches, calibration))]
        if found:  # the simplest of those that are as quick
            least = min(fit.step_s for fit in found)
            return next(fit for fit in found if fit.step_s <= AS_QUICK * least)
        if microbatches >= job.pairs:
            return None
        microbatches = min(2 * microbatches, job.pairs)


def _strategies(job: Job) -> list[Strategy]:
    if job.world == 1:
        return [job.config.parallel.strategy]
    found = [] if job.config.precision.name is PrecisionName.bf16 else [Strategy.ddp]
    return [*found, *([Strategy.hsdp] if job.nodes > 1 else []), Strategy.fsdp]


def _fit(job: Job, strategy: Strategy, microbatches: int, calibration: Calibration | None) -> Fitting | None:
    ways = [_changed(job, strategy, way, microbatches) for way in _ways(job)]
    ways.sort(key=lambda way: way.executed)
    for way in ways:
        needed = memory(way)
        if needed.total <= job.hardware.usable_bytes:
            again = way.config.parallel.activation_checkpointing
            return Fitting(strategy.value, again, microbatches, needed, speed(way, calibration).step_s)
    return None


def _ways(job: Job) -> Iterator[str | int]:
    most = len(job.blocks)
    yield from ("none", "selective", "full")
    yield from range(1, most)


def _changed(job: Job, strategy: Strategy, again: str | int, microbatches: int) -> Job:
    config = deepcopy(job.config)
    config.parallel.strategy, config.parallel.activation_checkpointing = strategy, again
    config.parallel.bf16_reduce &= strategy is Strategy.ddp
    if strategy is not Strategy.hsdp:
        config.parallel.shard_size = None
    if strategy is Strategy.ddp:
        config.parallel.cpu_offload = False
    config.optim.microbatches, config.optim.max_microbatch = microbatches, None
    return replace(job, config=config)


def _known_samples(config: Config) -> int | None:
    """Of data that is made here."""
    made = {Builtin.shapes: config.data.shapes.train, Builtin.synthetic: config.data.synthetic.samples}
    return made.get(config.data.builtin)
