"""Steps that went wrong: each is counted and named, and when there are too many the run goes back and around them."""

from __future__ import annotations

import statistics
from collections import deque
from pathlib import Path
from typing import NamedTuple

import torch

from clipscale.checkpoint import Saved
from clipscale.config import Config
from clipscale.config.rundir import append_of_rank, log_event
from clipscale.data.loader import Batch
from clipscale.distributed.collectives import gather
from clipscale.distributed.runtime import Runtime


class _Trained(NamedTuple):
    step: int
    samples_seen: int
    keys: list[str]


class Passed(NamedTuple):
    """Batches to be passed over: those behind ``step``, up to ``stops``, a position of every stream."""

    step: int
    stops: list[int]


class Divergence:
    """Judges the last steps by what the ranks agreed on, so that all come to the same end.

    Keys of what was skipped go to ``RUN/diverged/rank*.jsonl``.
    """

    def __init__(self, config: Config, path: Path, runtime: Runtime) -> None:
        self._rule, self._path, self._runtime, self._lr = config.divergence, path, runtime, config.optim.lr
        self._recent: deque[_Trained] = deque(maxlen=self._rule.within_steps)

    def resumed(self, saved: Saved, attempt: int, positions: torch.Tensor) -> None:
        """Go on from a checkpoint, ``positions`` Int64[streams of this rank]; what is found is written to ``saved``."""
        self._saved, self._attempt = saved, attempt
        self._recent.clear()
        self.arrived(positions)

    def trained(self, batch: Batch) -> None:
        """Remember the step just made."""
        self._recent.append(_Trained(self._saved.step, self._saved.samples_seen, batch.keys))

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
        """The step behind which the batches lie that are to be passed over."""
        return max(0, self._saved.step - self._rule.within_steps)

    def window(self, positions: torch.Tensor) -> Passed:
        """What is to be passed over, up to ``positions`` Int64[streams of this rank]; a collective."""
        return Passed(self.first, gather(positions.to(self._runtime.device)).tolist())

    def skip(self, passed: Passed, now: Saved) -> str:
        """Have a run that has gone back to ``now`` pass over a window, once it has come to where that begins.

        Where it begins is said by its step, not by this process's memory: so it does not matter when the run was
        resumed last. Returns what to tell the user.
        """
        before = self._saved
        first = max(passed.step, now.step)  # the checkpoint may lie in the window
        now.skipped, now.rollbacks = before.skipped, before.rollbacks + 1
        # Windows ahead of this one come so many steps sooner, now that it is passed over.
        ahead = [[step - (before.step - first), *stops] for step, *stops in before.jumps]
        begins_here = bool(ahead) and ahead[0][0] == first  # one follows at once: both are passed over as one
        now.jumps = ahead if begins_here else [[first, *passed.stops], *ahead]
        now.bad_steps = []  # of the way that is not gone again
        self._name([one for one in self._recent if one.step > first], "diverged")
        self._tell(
            "rolled_back", step=before.step, samples_seen=before.samples_seen, to=now.samples_seen,
            bad_steps=before.bad_steps, passed_over=[first + 1, before.step],
        )  # fmt: skip
        return (
            f"training went wrong, steps {', '.join(map(str, before.bad_steps))} were bad; back to step {now.step}, "
            f"and around the batches from step {first + 1} to {before.step}; keys in {self._path}/diverged"
        )

    def arrived(self, positions: torch.Tensor) -> bool:
        """Whether a window begins here, after a step that left this rank's streams at ``positions``; a collective."""
        saved = self._saved
        if not saved.jumps or saved.jumps[0][0] != saved.step:
            return False
        (_, *stops), *saved.jumps = saved.jumps
        starts = gather(positions.to(self._runtime.device)).tolist()
        saved.skipped = [*saved.skipped, [starts, stops]]
        self._tell(
            "passed_over", step=saved.step, samples_seen=saved.samples_seen, diverged_samples=sum(stops) - sum(starts)
        )
        return True

    def why_it_ends(self, checkpoint: str | None) -> str:
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
        rows = [
            {"attempt": self._attempt, "step": one.step, "samples_seen": one.samples_seen, "key": key, "reason": reason}
            for one in steps
            for key in one.keys
        ]
        append_of_rank(self._path, "diverged", self._runtime.rank, rows)

    def _tell(self, event: str, **details: object) -> None:
        if self._runtime.is_main:
            log_event(self._path, event, **details)


def diverged_samples(saved: Saved) -> int:
    """Samples that are passed over because training on them went wrong, each counted once."""
    count = 0
    windows = [zip(starts, stops, strict=True) for starts, stops in saved.skipped]
    for of_a_stream in zip(*windows, strict=True):
        reached = 0
        for start, stop in sorted(of_a_stream):
            count += max(0, stop - max(start, reached))
            reached = max(reached, stop)
    return count
