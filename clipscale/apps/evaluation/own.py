"""``clipscale eval MODEL [KEY=VALUE]``: the numbers of the training loop, on a run's own data or on other data."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import rich.console

from clipscale.apps.asking import here
from clipscale.checkpoint.loading import open_model
from clipscale.config import Config, validate
from clipscale.config.compose import override
from clipscale.config.data import Builtin
from clipscale.errors import ConfigError
from clipscale.evals import build_evaluators, damaged_shards
from clipscale.parallel import unsharded
from clipscale.telemetry.console import summary_table
from clipscale.trainer.build import build_store, eval_context, once_per_node, place_data


def evaluate(where: str | Path, overrides: Sequence[str], device: str, as_json: bool) -> dict[str, float]:
    """Evaluate a model and print a table, or JSON. ``overrides`` change ``data.*`` and ``eval.*`` keys.

    Raises ClipscaleError for a path that is no model, data that is not there, or nothing to evaluate.
    """
    runtime = here(device)
    model, config, tokenizer = once_per_node(runtime, lambda: open_model(where))
    config = _override(config, overrides)
    config.precision.name = unsharded(config.precision.name)
    context = eval_context(config, model.eval().to(runtime.device), tokenizer, runtime.device)
    data = place_data(config.data, runtime)
    evaluators = build_evaluators(data, build_store(config), config.model, config.global_batch_size)
    if not evaluators:
        raise ConfigError(
            "nothing to evaluate: name a data set, or set data.val.shards=… or data.zeroshot.shards=… "
            "data.zeroshot.classes=…"
        )
    metrics: dict[str, float] = {}
    for shard, damage in damaged_shards(evaluators).items():
        print(f"warning: shard {shard} {damage}", file=sys.stderr)
    for evaluator in evaluators:
        metrics |= evaluator.run(context)
    if runtime.is_main and as_json:
        print(json.dumps(metrics))
    elif runtime.is_main:
        rich.console.Console().print(summary_table(str(where), metrics))
    return metrics


def _override(config: Config, overrides: Sequence[str]) -> Config:
    changed = override(config, overrides, ("data.", "eval."))
    validate(changed, changed.parallel.shard_size)  # on how many processes it was trained matters no more
    named = {key for key, _, value in (o.partition("=") for o in overrides) if value not in ("null", "0")}
    if changed.data.builtin is not Builtin.none and named & {"data.root", "data.val.shards", "data.zeroshot.shards"}:
        # Other data than what clipscale rendered: all of it is the user's, so what was not named is not there.
        changed.data.builtin = Builtin.none
        for key, evaluation in (("data.val.shards", changed.data.val), ("data.zeroshot.shards", changed.data.zeroshot)):
            if key not in named:
                evaluation.shards = None
    return changed
