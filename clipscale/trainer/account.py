"""The account of what could not be used or was cut: over all ranks, told as it grows, held against the budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clipscale.checkpoint import Saved
from clipscale.config import Config
from clipscale.config.rundir import append_of_rank, log_event
from clipscale.data.accounting import BadSamples, over_budget, worst_shard
from clipscale.data.loader import Batch
from clipscale.distributed.collectives import total, world_size
from clipscale.distributed.runtime import Runtime
from clipscale.errors import DataBudgetError
from clipscale.trainer.build import TrainData

TRUNCATED_WARNING = 0.01
WORST = 5  # shards that are named when samples are bad


class Account:
    """Counts of bad samples and cut captions; keys of bad samples go to ``RUN/bad_samples/rank*.jsonl``, and those of
    all batches, where ``data.trace`` asks for them, to ``RUN/trace/rank*.jsonl``."""

    def __init__(self, config: Config, path: Path, runtime: Runtime, train: TrainData) -> None:
        self._config, self._runtime, self._path, self._train = config, runtime, path, train
        self._bad = BadSamples()  # on this rank since this start
        self._fresh = torch.zeros(2, dtype=torch.int64)  # bad samples and cut captions here since the last save
        self._told: dict[str, int] = {}

    def resumed(self, saved: Saved, attempt: int) -> None:
        """Go on from what a checkpoint counted."""
        self._bad = BadSamples()
        self._fresh.zero_()
        self._told["bad"] = saved.bad_samples
        self._before = Counter(saved.bad_reasons)
        self._gathered = saved.bad_samples, BadSamples()
        self._attempt, self._started_at = attempt, saved.samples_seen

    def add(self, batch: Batch, saved: Saved) -> None:
        """Count a batch of this rank, by which ``saved`` has moved on."""
        rank, world = self._runtime.rank, self._runtime.world
        self._fresh += torch.tensor([len(batch.bad), batch.truncated])
        self._bad.add(batch.bad)
        if batch.bad:
            row = {"attempt": self._attempt, "samples_seen": saved.samples_seen}
            rows = [row | {"key": key, "reason": reason} for reason, key in batch.bad]
            append_of_rank(self._path, "bad_samples", rank, rows)
        if self._config.data.trace:
            row = {"attempt": self._attempt, "step": saved.step, "rank": rank, "world_size": world}
            append_of_rank(self._path, "trace", rank, [row | {"keys": batch.keys}])

    def totals(self, saved: Saved) -> tuple[int, int]:
        """Bad samples and cut captions of the whole run, over all ranks."""
        bad, truncated = total(self._fresh.to(self._runtime.device)).tolist()
        return saved.bad_samples + bad, saved.truncated_captions + truncated

    def save(self, saved: Saved) -> None:
        """Put the counts into what a checkpoint keeps."""
        saved.bad_samples, saved.truncated_captions = self.totals(saved)
        saved.bad_reasons = dict(self.by_reason(saved.bad_samples))
        self._fresh.zero_()

    def by_reason(self, bad: int) -> Counter[str]:
        """The ``bad`` samples of the whole run by reason, over all ranks."""
        return self._before + Counter(self._everywhere(bad).by_reason())

    def warn(self, bad: int, truncated: int, seen: int, say: Callable[[str], None]) -> None:
        """Tell of what is new in the :meth:`totals`."""
        if bad > self._told["bad"]:
            self._told["bad"] = bad
            found = self._everywhere(bad)
            if self._runtime.is_main:
                log_event(
                    self._path, "bad_samples", samples_seen=seen, total=bad, reasons=found.by_reason(),
                    shards=dict(islice(found.by_shard().items(), WORST)),
                )  # fmt: skip
                say(
                    f"warning: {bad} bad samples passed over so far ({listed(found.by_reason())}); keys in "
                    f"{self._path}/bad_samples"
                )
        if truncated > TRUNCATED_WARNING * seen and "truncated" not in self._told:
            self._told["truncated"] = truncated
            if self._runtime.is_main:
                log_event(self._path, "truncated_captions", samples_seen=seen, total=truncated)
                length = self._config.tokenizer.context_length or self._config.model.context_length
                say(
                    f"warning: {truncated / seen:.1%} of captions are longer than {length} tokens and were cut; raise "
                    "model.context_length, or see data.long_caption"
                )

    def judge(self, bad: int, seen: int, epochs: int, is_over: bool) -> None:
        """Hold the counts against the budget; ``epochs`` were begun since this start. Raises DataBudgetError."""
        data = self._config.data
        how = "; mend the data or raise the limit: the same command goes on from the last checkpoint"
        if over_budget(bad, seen, data.max_bad_fraction, is_over):
            found = self._everywhere(bad)
            worst = listed(dict(islice(found.by_shard().items(), WORST)))
            raise DataBudgetError(
                f"{bad:,} of {bad + seen:,} samples could not be used, more than data.max_bad_fraction="
                f"{data.max_bad_fraction}; since the last start: {listed(found.by_reason())}; worst shards: {worst}; "
                f"keys in {self._path}/bad_samples{how}"
            )
        limit = data.max_bad_fraction_per_shard
        if limit is not None and bad > self._told.get("judged", 0):
            self._told["judged"] = bad
            found = self._everywhere(bad)
            if worst_of := worst_shard(found, self._train.reads(epochs), limit):
                name, count, samples = worst_of
                reasons = Counter({reason: n for (shard, reason), n in found.counts.items() if shard == name})
                raise DataBudgetError(
                    f"{count:,} of {samples:,} samples read of shard {name} could not be used ({listed(reasons)}), "
                    f"more than data.max_bad_fraction_per_shard={limit}; keys in {self._path}/bad_samples{how}"
                )

    def _everywhere(self, bad: int) -> BadSamples:
        """Of all ranks since this start; gathered anew when their total ``bad``, which all ranks know, has grown."""
        if bad != self._gathered[0]:
            everyone: list[Any] = [self._bad.counts]
            if world_size() > 1:
                everyone = [None] * world_size()
                dist.all_gather_object(everyone, self._bad.counts)
            self._gathered = bad, BadSamples(sum(everyone, Counter()))
        return self._gathered[1]


def listed(counts: dict[str, int]) -> str:
    """``{"no_image": 3}`` as ``3 x no_image``."""
    return ", ".join(f"{count} x {what}" for what, count in counts.items())
