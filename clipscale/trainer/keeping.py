"""What a run notes in its checkpoints about which of them stay, and beside them for other machines."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

from clipscale.checkpoint import TOKENIZER, Saved
from clipscale.checkpoint.places import home
from clipscale.config import Config
from clipscale.config.rundir import log_event
from clipscale.data.io import ShardStore
from clipscale.data.order import SampleOrder
from clipscale.errors import ConfigError

log = logging.getLogger("clipscale")


def mark_best(saved: Saved, metric: str | None, values: Mapping[str, float]) -> bool:
    """Note an evaluation that is the best by ``metric`` so far; whether it is. Raises ConfigError if it is missing."""
    if metric is None:
        return False
    if metric not in values:
        raise ConfigError(
            f"checkpoint.best_metric={metric} is not measured in this run; choose from {', '.join(values) or 'none'}"
        )
    value, best = values[metric], saved.best_value
    if not math.isfinite(value):
        return False
    if saved.best_step and not (value < best if metric.endswith("loss") else value > best):
        return False
    saved.best_step, saved.best_value = saved.step, value
    return True


def mark_kept(saved: Saved, every_samples: int | None) -> None:
    """Note that the checkpoint that is about to be written is kept for good, if it is the first past a multiple."""
    if every_samples and saved.samples_seen // every_samples > saved.kept_at // every_samples:
        saved.kept_at = saved.samples_seen


def make_own(saved: Saved) -> None:
    """Forget what another run's checkpoint says of that run alone."""
    saved.best_step, saved.kept_at, saved.wandb_id = 0, 0, ""


def record_elsewhere(config: Config, path: Path) -> None:
    """Put what makes the run at ``path`` beside its checkpoints, for a machine that has no directory of it."""
    store = ShardStore(config.storage)
    for file in (path / "config.yaml", *sorted((path / TOKENIZER).glob("*"))):
        store.write(f"{home(config)}/{file.relative_to(path)}", file.read_bytes())


def record_damage(path: Path, damaged: Mapping[str, str]) -> None:
    """Log the checkpoints that were passed over, and what is wrong with each."""
    for name, problem in damaged.items():
        log.warning("checkpoint %s is damaged: %s", name, problem)
        log_event(path, "damaged_checkpoint", checkpoint=name, problem=problem)


def check_order(saved: Saved, order: SampleOrder, path: Path) -> None:
    """Raise ConfigError when a checkpoint's place in the data is of other data than a run's."""
    if saved.fingerprint != order.fingerprint:
        raise ConfigError(
            f"the training data is not the one that {path} was trained on: its shards, their sample counts, "
            f"weights, seed, streams or window changed (order {saved.fingerprint} in the checkpoint, "
            f"{order.fingerprint} now); restore the data or choose another name=…"
        )
