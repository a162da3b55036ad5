"""What a run says when it starts: what is trained on what, and what is not as it should be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from clipscale.config.model import model_summary
from clipscale.config.rundir import log_event
from clipscale.data.io import PIPE
from clipscale.evals import damaged_shards

if TYPE_CHECKING:
    from clipscale.trainer.trainer import Trainer


def tell_start(trainer: Trainer, say: Callable[[str], None]) -> None:
    """Say it line by line; a damaged shard is an event, too."""
    for line in _lines(trainer):
        say(line)
    for name, problem in trainer.checkpoints.damaged.items():
        say(f"warning: checkpoint {name} is damaged ({problem}); going on from the one before")
    for name in trainer.unfinished:
        say(f"warning: checkpoint {name} was never finished, and is removed")
    for name, damage in (trainer.train.damaged | damaged_shards(trainer.evaluators)).items():
        say(f"warning: shard {name} {damage}")
        if trainer.runtime.is_main:
            log_event(trainer.path, "damaged_shard", shard=name, damage=damage)


def _lines(trainer: Trainer) -> Iterator[str]:
    config, saved, runtime, order = trainer.config, trainer.saved, trainer.runtime, trainer.train.order
    start = f"resuming at {saved.samples_seen:,}" if saved.samples_seen else "starting"
    start += f" from {trainer.starts_from}," if trainer.starts_from else ""
    parameters = sum(p.numel() for p in trainer.model.parameters())
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    locked = f" ({trained / 1e6:.1f} M trained)" if trained < parameters else ""
    parts = f", {trainer.step.microbatches} microbatches on each process" if trainer.step.microbatches > 1 else ""
    yield f"{trainer.path}: {start} of {config.total_samples:,} samples in batches of {config.global_batch_size}{parts}"
    yield (
        f"  model {model_summary(config.model)}, {parameters / 1e6:.1f} M parameters{locked}; "
        f"{config.parallel.strategy.value}, {runtime.world} x {runtime.device.type}, {config.precision.name.value}"
    )
    for change in trainer.resized:
        yield f"  {config.init.weights}: {change}"
    yield (
        f"  data {trainer.train.samples:,} samples in {len(order.shards)} shards; {order.streams} streams, "
        f"windows of {order.window_size}"
    )
    if runtime.spares:
        started = runtime.world + runtime.spares
        yield (
            f"warning: {runtime.spares} of {started} processes idle: {order.streams} streams cannot be shared "
            f"evenly by more than {runtime.world}; a new run begun with {started} uses all where they divide "
            "global_batch_size"
        )
    if any(file.location.startswith(PIPE) for file in trainer.train.files):
        yield "warning: pipe: shards are read from their beginning for each part of them; other locations are faster"
