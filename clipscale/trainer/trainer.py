"""The training loop."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Generator, Iterable
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from clipscale.checkpoint import TOKENIZER, Checkpointer, Saved, Stored
from clipscale.checkpoint.places import CHECKPOINTS, home
from clipscale.config import Config, save_config
from clipscale.config.model import HeadStart
from clipscale.config.rundir import count_events, log_event, report
from clipscale.data.io import ShardStore
from clipscale.data.loader import Batch
from clipscale.distributed.collectives import gather, world_size
from clipscale.distributed.faults import Agreed, Agreement
from clipscale.distributed.runtime import Runtime, waiting_up_to
from clipscale.distributed.watchdog import Watchdog
from clipscale.errors import ClipscaleError, DivergedError, ExitCode, SaveError
from clipscale.evals import build_evaluators
from clipscale.models import Classifier, build_model
from clipscale.optim import Ema, build_optimizer, configure, learning_rate
from clipscale.parallel import build_scaler, heights, lock, parallelize
from clipscale.telemetry import Meters, Sinks, Stragglers, Timesheet, read_run_id, write_run_id
from clipscale.trainer import keeping
from clipscale.trainer.account import Account
from clipscale.trainer.build import (
    build_loader,
    build_store,
    build_train_data,
    eval_context,
    once_per_node,
    place_data,
    read_classes,
    read_tokenizer,
    run_path,
    start_from,
    start_head,
)
from clipscale.trainer.divergence import Divergence, diverged_samples
from clipscale.trainer.ending import tell_end, tell_nothing_to_do
from clipscale.trainer.examples import record_examples, show_batch
from clipscale.trainer.objective import build_objective
from clipscale.trainer.opening import tell_start
from clipscale.trainer.step import TrainStep
from clipscale.trainer.teachers import pin_teachers
from clipscale.trainer.work import build_work

log = logging.getLogger("clipscale")


class Trainer:
    """One run on this rank: everything is built here, and :meth:`fit` trains."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.path = run_path(config)
        place, keep_last = f"{home(config)}/{CHECKPOINTS}", config.checkpoint.keep_last
        store, behind = ShardStore(config.storage), config.divergence.within_steps
        self.checkpoints = Checkpointer(place, keep_last, store, self.path / "scratch", behind)
        self.tokenizer = read_tokenizer(config, runtime)
        self.from_elsewhere = False
        # What a run starts from, in this order: its own newest checkpoint that is whole, checkpoint.resume_from,
        # init.weights, and what its seed draws.
        newest = self.checkpoints.newest()
        if newest is None and config.checkpoint.resume_from is not None:
            newest = self.checkpoints.elsewhere(config.checkpoint.resume_from)
            self.from_elsewhere = True
        self.newest = newest
        taught_by = newest.manifest().saved.teachers if newest else []
        teachers = once_per_node(runtime, lambda: pin_teachers(config, self.tokenizer, taught_by))
        self.data = place_data(config.data, runtime)
        self.store = build_store(config, runtime.world)
        classes = read_classes(config, self.data, self.store, runtime)
        self.train = build_train_data(config, self.data, self.store, runtime)
        model = build_model(
            config.model,
            seed=config.seed,
            logit_scale=config.loss.init_logit_scale,
            logit_bias=config.loss.first_bias,
            drawn=not config.parallel.strategy.shards,
        )
        self.starts_from, self.resized = (
            start_from(model, config, self.tokenizer, runtime) if newest is None else ("", [])
        )
        lock(model, config.lock)
        one_pass = config.optim.count_microbatches(config.global_batch_size // runtime.world) == 1
        laid_out = parallelize(model, config.parallel, runtime.device, config.precision.name, one_pass=one_pass)
        self.model = laid_out.model
        if newest is None and classes is not None and config.init.head is HeadStart.zeroshot:
            assert isinstance(self.model, Classifier)
            start_head(config, self.model, classes, self.tokenizer, runtime.device)
        optimizer = build_optimizer(self.model, config.optim, heights(self.model))
        self.ema = Ema(self.model, config.ema.decay) if config.ema.decay is not None else None
        scaler = build_scaler(config.precision.name, runtime.device)
        objective = build_objective(config, teachers, runtime.device)
        self.step = TrainStep(config, runtime, laid_out, objective, optimizer, scaler, self.ema)
        self.evaluators = build_evaluators(self.data, self.store, config.model, config.global_batch_size)
        keeping.check_measured(config, self.evaluators)
        self.saved = Saved(positions=[0] * self.train.order.streams, fingerprint=self.train.order.fingerprint)
        self.saved.teachers = [str(teacher) for teacher in teachers]
        self.account = Account(config, self.path, runtime, self.train)
        self.divergence = Divergence(config, self.path, runtime)
        self.stragglers = self.step.stragglers = Stragglers(self.path, runtime.device)
        self.timesheet = Timesheet(self.path)
        self.attempt = 1 + count_events(self.path, "started")
        self.positions = torch.zeros(0, dtype=torch.int64)  # of this rank's streams, after the last step
        self.evaluated_at = 0  # samples seen at the last evaluation
        self.checkpointed_at = -1
        self.asked_to_save = self.shown_batch = self.gave_up = False

    def fit(self) -> ExitCode:
        """Resume, then step, log, evaluate and save until the samples are seen or somebody asks to stop.

        Returns DONE or PREEMPTED. Raises DivergedError when training goes wrong again and again.
        """
        self._resume()
        where = f"rank {self.runtime.rank} of {self.runtime.world} on {self.runtime.device}"
        log.info("attempt %s: %s, from %s samples", self.attempt, where, self.saved.samples_seen)
        if self._is_over and not self._evaluation_is_due():
            tell_nothing_to_do(self)
            return ExitCode.DONE
        work = build_work(self.config, self.runtime.device)
        self.meters = Meters(self.runtime.device, self.runtime.world, self.stragglers, self.timesheet, work)
        self.sinks = self._open_sinks()
        limit_s = self.config.distributed.watchdog_s
        self.watchdog = Watchdog(self.path / "logs", self.runtime.rank, limit_s, partial(report, self.path))
        try:
            batches = self._batches()
            # After the workers' server, which must not inherit its handlers.
            self.agreement = Agreement(self.runtime.device)
            self.timesheet.began_training()
            try:
                while (code := self._train(batches)) is None:
                    batches.close()
                    if self.divergence.is_too_much:
                        self.watchdog.begin("return")
                        self._go_back()
                    batches = self._batches()
                return code
            except ClipscaleError:
                self._settle()  # what was being saved when it happened is good
                raise
            finally:
                batches.close()
                self.agreement.release()
        finally:
            self.watchdog.release()
            self.sinks.close(sys.exception())

    def _train(self, batches: Generator[Batch]) -> ExitCode | None:
        """None if other batches must come: from before training went wrong, or from behind."""
        self._evaluate()  # what a kill in an evaluation left undone
        while not self._is_over:
            self._train_on(next(batches))
            saves = self._due(self.config.checkpoint.every_samples) or self._is_over
            stops = self._agree(saves or self._logs() or self._evaluation_is_due())
            if self.divergence.is_too_much:
                return None
            self._warn_of_save(self.checkpoints.failure())
            if self._logs():
                self._log()
            if saves or self.asked_to_save:
                self._save()
            self._evaluate()
            self.watchdog.begin()
            if stops and not self._is_over:
                self._save()
                return self._finish(ExitCode.PREEMPTED)
            if self.divergence.arrived(self.positions):
                return None
        self._save()  # unless it just was
        return self._finish(ExitCode.DONE)

    def _agree(self, now: bool) -> bool:
        """Exchange with all ranks what this step came to, for the next one, or for ``now``. Returns whether to stop."""
        assert self.step.verdict is not None
        before = self._hear(self.agreement.exchange(self._is_time_to_save(), self.step.verdict), self.saved.step - 1)
        if now or before or self.asked_to_save:
            return self._hear(self.agreement.settle(), self.saved.step) or before
        return before

    def _hear(self, agreed: Agreed | None, step: int) -> bool:
        if agreed is None:
            return False
        skipped, bad, loss = agreed.said
        self.divergence.judge(step, bool(skipped), bool(bad), loss)
        self.asked_to_save |= agreed.save
        return agreed.stop

    def _is_time_to_save(self) -> bool:
        minutes = self.config.checkpoint.every_minutes  # by one clock: ranks would disagree on the step
        return bool(minutes) and self.runtime.is_main and time.perf_counter() - self.started >= 60 * (minutes or 0)

    def _logs(self, ahead: int = 0) -> bool:
        """Whether this step, or the one in so many samples, is logged."""
        config = self.config
        is_last = self.saved.samples_seen + ahead >= config.total_samples
        return is_last or self._due(config.tracking.log_every_steps * config.global_batch_size, ahead)

    @property
    def _is_over(self) -> bool:
        return self.gave_up or self.saved.samples_seen >= self.config.total_samples

    def _due(self, every_samples: int | None, ahead: int = 0) -> bool:
        """Whether this step, or the one in so many samples, is the first at or past a multiple of ``every_samples``."""
        if not every_samples:
            return False
        seen = self.saved.samples_seen + ahead
        return seen // every_samples > (seen - self.config.global_batch_size) // every_samples

    # ---- step -------------------------------------------------------------------------------------------------

    def _batches(self) -> Generator[Batch]:
        positions, skipped = gather(self.positions.to(self.runtime.device)).cpu().numpy(), self.saved.skipped
        return self._timed(build_loader(self.config, self.train, positions, self.tokenizer, self.runtime, skipped))

    def _timed(self, loader: Iterable[Batch]) -> Generator[Batch]:
        batches = iter(loader)
        self.meters.restart()
        while True:
            started = time.perf_counter()
            batch = next(batches)
            self.meters.waited(time.perf_counter() - started)
            yield batch

    def _train_on(self, batch: Batch) -> None:
        saved, config = self.saved, self.config
        after = saved.samples_seen + config.global_batch_size
        self.lr = learning_rate(config.schedule, config.optim.lr, saved.samples_seen, after, config.total_samples)
        self.model.train()
        self.step.zero_grad()
        self.loss = self.step(batch, saved.samples_seen, self.lr, stats=self._logs(config.global_batch_size))
        saved.samples_seen, saved.step = after, saved.step + 1
        self.divergence.trained(batch)
        self.positions = batch.positions
        self.meters.stepped(config.global_batch_size, self.loss, batch.text_lengths)
        self.account.add(batch, saved)
        show_batch(self, batch)

    # ---- log --------------------------------------------------------------------------------------------------

    def _log(self) -> None:
        bad, truncated = self.account.totals(self.saved)
        values = self.meters.read() | {
            "train/lr": self.lr,
            "train/logit_scale": self.step.logit_scale(),
            **self.step.statistics(),
            "train/grad_norm": self.step.grad_norm(),
            "train/param_norm": self.step.param_norm(),
            "train/bad_samples": float(bad),
            "train/skipped_steps": float(self.saved.skipped_steps),
            "train/diverged_samples": float(diverged_samples(self.saved)),
            "train/truncated_captions": float(truncated),
            **{f"train/bad_samples/{reason}": float(n) for reason, n in self.account.by_reason(bad).items()},
        }
        self._emit(values)
        self.stragglers.tell(self.meters.interval_s, self.sinks.console.say)
        self.account.warn(bad, truncated, self.saved.samples_seen, self.sinks.console.say)
        self.meters.restart()
        self.account.judge(bad, self.saved.samples_seen, self._epoch - self.first_epoch + 1, self._is_over)

    def _emit(self, values: dict[str, float]) -> None:
        saved, time_s = self.saved, round(self.timesheet.time_s, 3)
        where = {"samples_seen": saved.samples_seen, "step": saved.step, "epoch": self._epoch, "time_s": time_s}
        self.sinks.log(where | values)

    @property
    def _epoch(self) -> int:
        return self.train.order.epoch_at(0, int(self.positions[0]))

    # ---- evaluate, save, finish -------------------------------------------------------------------------------

    def _evaluation_is_due(self) -> bool:
        """Whether this step ends with an evaluation that has not been made, be it by an attempt before this one."""
        due = self._is_over or self._due(self.config.eval.every_samples)
        return bool(self.evaluators) and due and self.saved.samples_seen > self.evaluated_at

    def _evaluate(self) -> None:
        if not self._evaluation_is_due():
            return
        self.evaluated_at = self.saved.samples_seen
        values: dict[str, float] = {}
        self.model.eval()
        patient = waiting_up_to(self.config.eval.timeout_s, self.config.distributed.timeout_s)
        watched, timed = self.watchdog.during("evaluation"), self.timesheet.on("evaluation")
        with patient, watched, timed, self.ema.applied() if self.ema else nullcontext():
            context = eval_context(self.config, self.model, self.tokenizer, self.runtime.device)
            for evaluator in self.evaluators:
                values |= evaluator.run(context)
        if keeping.mark_best(self.saved, self.config.checkpoint.best_metric, values, self.runtime):
            self._save(is_best=True)
        self._emit(values)  # last: what is in the metrics is not measured again
        self.evaluated_at, self.gave_up = keeping.look_back(self.config, self.path, self.saved, self.runtime)
        record_examples(self, context.examples)
        self.meters.restart()

    def _save(self, is_best: bool = False) -> None:
        self.asked_to_save = False
        if self.checkpointed_at == self.saved.step:
            if is_best:
                self._settle()
                self.checkpoints.amend(self.saved)
            return
        self.watchdog.begin("save")
        began = time.perf_counter()
        self._settle()
        self.checkpointed_at = self.saved.step
        self.account.save(self.saved)
        self.saved.positions = gather(self.positions.to(self.runtime.device)).tolist()
        self.saved.time_s, self.saved.spent = self.timesheet.time_s, self.timesheet.spent
        self.started = time.perf_counter()
        self.saved.scaler = self.step.scaler.state_dict()
        self.kept_before = self.saved.kept_at
        keeping.mark_kept(self.saved, self.config.checkpoint.keep_every_samples)
        self.saved.wandb_id = read_run_id(self.path)
        ema = self.ema.state_dict() if self.ema else {}
        self.checkpoints.save(self.model, self.step.optimizer, ema, self.saved)
        self.timesheet.add("checkpoint", time.perf_counter() - began)
        self.meters.restart()

    def _go_back(self) -> None:
        """Restore a checkpoint from before training went wrong. Raises DivergedError without one, or after too many."""
        self.agreement.settle()  # on a step that is undone
        saved, checkpoint = self.saved, self.checkpoints.before(self.divergence.first)
        if checkpoint is None or saved.rollbacks >= self.config.divergence.max_rollbacks:
            raise DivergedError(self.divergence.why_it_ends(checkpoint.location if checkpoint else None))
        passed = self.divergence.window(self.positions)
        self._restore(checkpoint)
        if self.runtime.is_main:
            self.checkpoints.forget_after(self.saved.step)
        told = self.divergence.skip(passed, self.saved)
        self._begin(time.perf_counter())
        self.sinks.rewind(self.saved.samples_seen)
        self.sinks.console.say(f"warning: {told}")

    def _settle(self) -> None:
        """Wait for the save that is under way; one that failed is told, and the last good checkpoint stands."""
        try:
            self.checkpoints.wait()
        except SaveError as error:
            self._warn_of_save(str(error))

    def _warn_of_save(self, problem: str) -> None:
        if not problem:
            return
        log.warning(problem)
        self.saved.kept_at = self.kept_before  # the next one may be kept in its place
        if self.runtime.is_main:
            log_event(self.path, "save_failed", samples_seen=self.saved.samples_seen, problem=problem)
            self.sinks.console.say(f"warning: {problem}; training goes on, and the last good checkpoint is kept")

    def _finish(self, code: ExitCode) -> ExitCode:
        self.watchdog.begin("save")
        with self.timesheet.on("checkpoint"):
            self.checkpoints.wait()
        tell_end(self, code)
        return code

    # ---- start ------------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        self.started = time.perf_counter()
        self.lr = 0.0
        self.unfinished: list[str] = []
        newest = self.newest
        if world_size() > 1:
            dist.barrier()  # before the main rank counts this start, or removes anything
        if newest is not None:
            self._restore(newest)
            if self.from_elsewhere:
                self.checkpointed_at = -1
                keeping.make_own(self.saved)
        self._begin(self.runtime.began)
        if self.runtime.is_main:
            keeping.record_damage(self.path, self.checkpoints.damaged)
            self.unfinished = self.checkpoints.clean()
            save_config(self.config, self.path / "config.yaml")  # with the window that was chosen
            if self.saved.wandb_id:
                write_run_id(self.path, self.saved.wandb_id)
            log_event(
                self.path, "started", attempt=self.attempt, world_size=self.runtime.world,
                samples_seen=self.saved.samples_seen, checkpoint=newest and newest.name,
                startup_s=round(time.perf_counter() - self.runtime.began, 1),
            )  # fmt: skip
            self.tokenizer.save(self.path / TOKENIZER)  # now: until it has started, a run may be given another
            if self.config.checkpoint.dir is not None:
                keeping.record_elsewhere(self.config, self.path)

    def _restore(self, checkpoint: Stored) -> None:
        ema = self.ema.state_dict() if self.ema else {}
        self.saved = self.checkpoints.restore(checkpoint, self.model, self.step.optimizer, ema)
        keeping.check_order(self.saved, self.train.order, self.path)
        configure(self.step.optimizer, self.config.optim)
        if self.saved.scaler:  # empty if the run had none until now
            self.step.scaler.load_state_dict(self.saved.scaler)
        self.checkpointed_at = self.saved.step

    def _begin(self, since: float) -> None:
        """Count from where the run stands, and time from ``since``."""
        self.timesheet.resumed(self.saved.time_s, self.saved.spent, since)
        mine = np.array_split(np.arange(self.train.order.streams), self.runtime.world)[self.runtime.rank]
        self.positions = torch.tensor(self.saved.positions, dtype=torch.int64)[mine]
        self.account.resumed(self.saved, self.attempt)
        self.divergence.resumed(self.saved, self.attempt, self.positions)
        self.first_epoch = self._epoch
        self.evaluated_at, self.gave_up = keeping.look_back(self.config, self.path, self.saved, self.runtime)

    def _open_sinks(self) -> Sinks:
        sinks = Sinks(self.path, self.config, self.saved.samples_seen, self.runtime.is_main)
        tell_start(self, sinks.console.say)
        return sinks
