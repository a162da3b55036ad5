"""What a run says when it ends, and the ``result.json`` that it leaves."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from clipscale.checkpoint.places import CHECKPOINTS, home
from clipscale.config.rundir import log_event, write_result
from clipscale.errors import ExitCode
from clipscale.telemetry import last_values
from clipscale.trainer.account import listed
from clipscale.trainer.divergence import diverged_samples

if TYPE_CHECKING:
    from clipscale.trainer.trainer import Trainer

log = logging.getLogger("clipscale")


def tell_end(trainer: Trainer, code: ExitCode) -> None:
    """Tell of a run that is done, or has stopped and was saved. Every rank calls it."""
    config, saved, path = trainer.config, trainer.saved, trainer.path
    bad = trainer.account.by_reason(saved.bad_samples)
    log.info("%s at %s samples", code.name.lower(), saved.samples_seen)
    if not trainer.runtime.is_main:
        return
    say, done = trainer.sinks.console.say, code is ExitCode.DONE
    trainer.sinks.console.close()
    metrics = _write_result(trainer, code)
    trainer.sinks.checkpoint = f"{home(config)}/{CHECKPOINTS}/step_{saved.step:08d}"
    log_event(path, "done" if done else "preempted", samples_seen=saved.samples_seen)
    if not done:
        say(f"stopped at {saved.samples_seen:,} samples and saved; the same command goes on from there")
        return
    minutes = trainer.timesheet.time_s / 60
    title = f"{path.name}: {saved.samples_seen:,} samples, {saved.step:,} steps, {minutes:.1f} min"
    trainer.sinks.console.summary(title, metrics)
    if bad:
        say(f"bad samples passed over: {listed(bad)}; keys in {path}/bad_samples")
    if saved.skipped_steps or saved.skipped:
        say(
            f"training went wrong: {saved.skipped_steps} steps moved nothing, {diverged_samples(saved):,} samples were "
            f"passed over; keys in {path}/diverged"
        )
    if trainer.gave_up:
        say(f"ended early: {config.eval.patience} evaluations did not improve {config.eval.objective} (eval.patience)")
    if config.eval.objective not in metrics and trainer.evaluators:
        say(f"warning: eval.objective={config.eval.objective} was not measured in this run")
    say(f'done: {path}; use it with clipscale.load("{path}") or: clipscale eval {path}')


def tell_nothing_to_do(trainer: Trainer) -> None:
    """Tell of a run that was done before it was started."""
    trainer.timesheet.began_training()  # and did no more
    if trainer.runtime.is_main:
        _write_result(trainer, ExitCode.DONE)
        config = trainer.config
        what, key = f"has seen all of its {config.total_samples:,} samples", "total_samples"
        if trainer.gave_up:
            what, key = f"ended when {config.eval.objective} no longer improved", "eval.patience"
        print(f"{trainer.path} {what}; nothing to do (raise {key} to train on, or choose another name=…)")


def _write_result(trainer: Trainer, code: ExitCode) -> dict[str, float]:
    """Returns the last value of every metric."""
    metrics = last_values(trainer.path / "metrics.jsonl") | trainer.timesheet.read()
    write_result(
        trainer.path,
        "done" if code is ExitCode.DONE else "preempted",
        code,
        objective=metrics.get(trainer.config.eval.objective),
        samples_seen=trainer.saved.samples_seen,
        metrics=metrics,
    )
    return metrics
