"""What a run notes in its checkpoints about which of them stay, and beside them for other machines."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from clipscale.checkpoint import TOKENIZER, Saved
from clipscale.checkpoint.places import home
from clipscale.config import Config
from clipscale.config.rundir import log_event
from clipscale.data.io import ShardStore
from clipscale.data.order import SampleOrder
from clipscale.distributed.collectives import total
from clipscale.distributed.runtime import Runtime
from clipscale.errors import ConfigError
from clipscale.evals import Evaluator
from clipscale.telemetry import evaluations

log = logging.getLogger("clipscale")


def mark_best(saved: Saved, metric: str | None, values: Mapping[str, float], runtime: Runtime) -> bool:
    """Note an evaluation that is the best by ``metric`` so far; whether it is. A collective."""
    best = _mark_best(saved, metric, values)
    # By one rank's word: the last digits of others may differ.
    return bool(total(torch.tensor([best and runtime.is_main], dtype=torch.int64, device=runtime.device)))


def _mark_best(saved: Saved, metric: str | None, values: Mapping[str, float]) -> bool:
    if metric is None:
        return False
    value, best = values[metric], saved.best_value
    if not math.isfinite(value):
        return False
    if saved.best_step and not _is_better(metric, value, best):
        return False
    saved.best_step, saved.best_value = saved.step, value
    return True


def _is_better(metric: str, value: float, than: float) -> bool:
    return value < than if metric.endswith("loss") else value > than


def look_back(config: Config, path: Path, saved: Saved, runtime: Runtime) -> tuple[int, bool]:
    """Samples seen at the last evaluation of a run, and whether ``eval.patience`` is at its end with it. A collective.

    What evaluations came to is counted in ``saved``, from the rows of ``metrics.jsonl`` behind those that are counted
    already: a machine without that file goes on from what the checkpoint says.
    """
    metric = config.eval.objective
    # One rank reads the file for all: they must not disagree on what comes next.
    for row in evaluations(path / "metrics.jsonl", saved.samples_seen) if runtime.is_main else ():
        if row["samples_seen"] > saved.looked_at:
            value = row.get(metric)
            saved.looked_at, saved.not_improved = row["samples_seen"], saved.not_improved + 1
            if value is not None and (not saved.objective_at or _is_better(metric, value, saved.objective)):
                saved.objective, saved.objective_at, saved.not_improved = value, saved.looked_at, 0
    known = [saved.looked_at, saved.not_improved] if runtime.is_main else [0, 0]
    saved.looked_at, saved.not_improved = total(torch.tensor(known, device=runtime.device)).tolist()
    return saved.looked_at, bool(config.eval.patience) and saved.not_improved >= (config.eval.patience or 0)


def check_measured(config: Config, evaluators: Sequence[Evaluator]) -> None:
    """Raise ConfigError for an evaluation by which the run would end, or keep checkpoints, and which is not made."""
    measured = [name for evaluator in evaluators for name in evaluator.measures]
    wanted = {"checkpoint.best_metric": config.checkpoint.best_metric}
    if config.eval.patience:
        wanted["eval.objective"] = config.eval.objective
    for key, name in wanted.items():
        if name is not None and name not in measured:
            choices = f"choose from {', '.join(measured)}" if measured else "it needs data.val.shards"
            raise ConfigError(f"{key}={name} is not measured in this run; {choices}")


def mark_kept(saved: Saved, every_samples: int | None) -> None:
    """Note that the checkpoint that is about to be written is kept for good, if it is the first past a multiple."""
    if every_samples and saved.samples_seen // every_samples > saved.kept_at // every_samples:
        saved.kept_at = saved.samples_seen


def make_own(saved: Saved) -> None:
    """Forget what another run's checkpoint says of that run alone."""
    saved.best_step, saved.kept_at, saved.wandb_id = 0, 0, ""
    saved.objective_at, saved.not_improved, saved.looked_at = 0, 0, 0


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
