"""Steps that went wrong: each is counted and named, and when there are too many the run goes back and around them."""

from __future__ import annotations

import statistics
from collections import deque
from pathlib import Path
from typing import NamedTuple

import torch

from clipscale.checkpoint import Saved
from clipscale.config import Config
from clipscale.config.rundir import append_rows, log_event
from clipscale.data.loader import Batch
from clipscale.distributed.collectives import gather
from clipscale.distributed.runtime import Runtime


class _Trained(NamedTuple):
    step: int
    samples_seen: int
    start: torch.Tensor  # Int64[streams of this rank], where they stood before
    keys: list[str]


class Divergence:
    """Judges the last steps by what the ranks agreed on, so that all come to the same end.

    Keys of what was skipped go to ``RUN/diverged/rank*.jsonl``.
    """

    def __init__(self, config: Config, path: Path, runtime: Runtime) -> None:
        self._rule, self._path, self._runtime, self._lr = config.divergence, path, runtime, config.optim.lr
        self._recent: deque[_Trained] = deque(maxlen=self._rule.within_steps)

    def resumed(self, saved: Saved, attempt: int) -> None:
        """Go on from a checkpoint; what is found from here on is written to ``saved``."""
        self._saved, self._attempt = saved, attempt
        self._recent.clear()

    def trained(self, start: torch.Tensor, batch: Batch) -> None:
        """Remember the step just made, on a batch before which this rank's streams stood at ``start``."""
        self._recent.append(_Trained(self._saved.step, self._saved.samples_seen, start, batch.keys))

    def judge(self, step: int, skipped: bool, bad: bool, loss: float) -> None:
        """Take what the ranks agreed on a step, one of the last two."""
        saved, rule = self._saved, self._rule
        known = saved.recent_losses
        if rule.spike_factor is not None and len(known) == rule.within_steps:
            bad |= loss > rule.spike_factor * statistics.median(known)
        if skipped:
            saved.skipped_steps += 1
            where = next(one for one in self._recent if one.step == step)
            self._name([where], "skipped")
            self._tell("skipped_step", step=step, samples_seen=where.samples_seen, bad=bad)
        saved.bad_steps = [one for one in saved.bad_steps if one > step - rule.within_steps] + [step] * bad
        if not skipped and rule.spike_factor is not None:
            saved.recent_losses = [*known, loss][-rule.within_steps :]

    @property
    def is_too_much(self) -> bool:
        """Whether going on is of no use."""
        return len(self._saved.bad_steps) >= self._rule.bad_steps

    @property
    def first(self) -> int:
        """The step before the remembered ones."""
        return self._recent[0].step - 1

    def skip(self, positions: torch.Tensor, now: Saved) -> None:
        """Have the remembered batches passed over by a run that has gone back to ``now``; a collective.

        ``positions`` Int64[streams of this rank] is where they end.
        """
        before, ends = self._saved, gather(positions.to(self._runtime.device)).tolist()
        starts = gather(self._recent[0].start.to(self._runtime.device)).tolist()
        starts = [max(pair) for pair in zip(starts, now.positions, strict=True)]  # it may lie behind their first
        now.skipped, now.rollbacks = [*before.skipped, [starts, ends]], before.rollbacks + 1
        self._name([one for one in self._recent if one.step > now.step], "diverged")
        self._tell(
            "rolled_back", step=before.step, samples_seen=before.samples_seen, to=now.samples_seen,
            bad_steps=before.bad_steps, diverged_samples=sum(ends) - sum(starts),
        )  # fmt: skip

    def why_it_ends(self, checkpoint: Path | None) -> str:
        """What to tell the user of a run that does not go back to ``checkpoint`` once more."""
        saved, rule = self._saved, self._rule
        why = f"it has gone back {saved.rollbacks} times (divergence.max_rollbacks={rule.max_rollbacks})"
        then = f"; the same command goes on from {checkpoint}"
        if checkpoint is None:
            why, then = "there is no checkpoint to go back to", ""
        return (
            f"training diverged: {len(saved.bad_steps)} of the last {rule.within_steps} steps were bad, the last at "
            f"step {saved.bad_steps[-1]}, and {why}; lower optim.lr (now {self._lr}) or set optim.clip_grad_norm{then}"
        )

    def _name(self, steps: list[_Trained], reason: str) -> None:
        folder = self._path / "diverged"
        folder.mkdir(exist_ok=True)
        rows = [
            {"attempt": self._attempt, "step": one.step, "samples_seen": one.samples_seen, "key": key, "reason": reason}
            for one in steps
            for key in one.keys
        ]
        append_rows(folder / f"rank{self._runtime.rank}.jsonl", rows)

    def _tell(self, event: str, **details: object) -> None:
        if self._runtime.is_main:
            log_event(self._path, event, **details)


def diverged_samples(saved: Saved) -> int:
    """Samples that are passed over because training on them went wrong."""
    return sum(sum(stops) - sum(starts) for starts, stops in saved.skipped)
