"""What a run says of itself before it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from clipscale.config import Config
from clipscale.config.model import model_summary
from clipscale.config.rundir import log_event
from clipscale.data.io import PIPE
from clipscale.distributed.runtime import Runtime
from clipscale.trainer.build import TrainData
from clipscale.trainer.step import TrainStep


def announce(
    say: Callable[[str], None],
    config: Config,
    path: Path,
    runtime: Runtime,
    train: TrainData,
    step: TrainStep,
    start: str,
    resized: Sequence[str],
    damaged: Mapping[str, str],
) -> None:
    """Say what is trained, on what, and how, and warn of what is odd about it.

    ``start`` says from where; ``resized``, what was said of the weights; ``damaged``, what is wrong with which shard.
    """
    order, model = train.order, step.model
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    locked = f" ({trained / 1e6:.1f} M trained)" if trained < parameters else ""
    parts = f", {step.microbatches} microbatches on each process" if step.microbatches > 1 else ""
    say(f"{path}: {start} of {config.total_samples:,} samples in batches of {config.global_batch_size}{parts}")
    say(
        f"  model {model_summary(config.model)}, {parameters / 1e6:.1f} M parameters{locked}; "
        f"{config.parallel.strategy.value}, {runtime.world} x {runtime.device.type}, {config.precision.name.value}"
    )
    for change in resized:
        say(f"  {config.init.weights}: {change}")
    say(
        f"  data {train.samples:,} samples in {len(order.shards)} shards; {order.streams} streams, "
        f"windows of {order.window_size}"
    )
    if runtime.spares:
        say(
            f"warning: {runtime.spares} of {runtime.world + runtime.spares} processes idle: {order.streams} streams "
            f"cannot be shared evenly by more than {runtime.world}; a new run begun with "
            f"{runtime.world + runtime.spares} uses all where they divide global_batch_size"
        )
    if any(file.location.startswith(PIPE) for file in train.files):
        say("warning: pipe: shards are read from their beginning for each part of them; other locations are faster")
    for name, damage in damaged.items():
        say(f"warning: shard {name} {damage}")
        if runtime.is_main:
            log_event(path, "damaged_shard", shard=name, damage=damage)
