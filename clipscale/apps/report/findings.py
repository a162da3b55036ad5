"""What stands out in a run, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator

from clipscale.apps.quantities import duration
from clipscale.apps.record import Record
from clipscale.errors import masked

WAITS = 0.1  # share of its time for which a run may wait for data before that is told
LOST = 0.05
CUT = 0.01
BAD = 0.001
DUPLICATES = 0.05


def findings(record: Record) -> list[str]:
    """One line each, the gravest first; empty for a run of which there is nothing to say."""
    return [*_how_it_ended(record), *_training(record), *_data(record), *_time(record)]


def _how_it_ended(record: Record) -> Iterator[str]:
    if error := record.result.get("error"):
        yield f"It ended with an error: {masked(str(error))}"
    elif record.state == "stopped":
        yield "It was killed; the same command goes on from the last checkpoint."
    elif record.state == "preempted":
        yield "It was asked to stop and saved; the same command goes on from there."


def _training(record: Record) -> Iterator[str]:
    last = record.last
    if steps := last.get("train/skipped_steps"):
        yield (
            f"{steps:,.0f} steps moved nothing, because their loss or gradient was not finite; RUN/diverged names the "
            "samples."
        )
    if samples := last.get("train/diverged_samples"):
        yield f"{samples:,.0f} samples were passed over because training on them went wrong; see RUN/diverged."
    for event in ("save_failed", "damaged_checkpoint"):
        if found := [row for row in record.events if row["event"] == event]:
            yield f"{event.replace('_', ' ')}, {len(found)} times; the last: {masked(str(found[-1].get('problem')))}"
    key, value = record.objective
    luck = last.get(f"{key}_chance")
    if value is not None and luck and record.state == "done" and value < 1.5 * luck:
        yield f"{key} is {value:.3g}, hardly above what chance scores ({luck:.3g})."


def _data(record: Record) -> Iterator[str]:
    last, seen = record.last, record.samples_seen
    if (bad := last.get("train/bad_samples", 0)) > BAD * seen > 0:
        yield f"{bad:,.0f} samples could not be used, {bad / (bad + seen):.2%}; RUN/bad_samples names them."
    if (cut := last.get("train/truncated_captions", 0)) > CUT * seen > 0:
        yield f"{cut / seen:.1%} of captions were cut; raise model.context_length, or see data.long_caption."
    duplicates = [y for _, y in record.series("train/duplicate_fraction")]
    masks = record.config.get("loss.mask_duplicates")
    if duplicates and not masks and (mean := sum(duplicates) / len(duplicates)) > DUPLICATES:
        yield f"{mean:.0%} of pairs share their caption with another of their batch; see loss.mask_duplicates."
    if damaged := {str(event.get("shard")) for event in record.events if event["event"] == "damaged_shard"}:
        yield f"{len(damaged):,} shards are damaged, for one {sorted(damaged)[0]}; clipscale data check tells more."


def _time(record: Record) -> Iterator[str]:
    last = record.last
    wall = last.get("time/wall_s", 0)
    if not wall:
        return
    if (waited := last.get("time/data_wait_s", 0)) > WAITS * wall:
        yield f"{waited / wall:.0%} of the time went by waiting for data: raise data.workers, or storage.cache_dir."
    if (lost := last.get("time/lost_s", 0)) > LOST * wall:
        yield (
            f"{lost / wall:.0%} of the time ({duration(lost)}) was lost to restarts: nothing ran, or steps "
            "were made again; checkpoint.every_minutes bounds the second."
        )
    for event in [event for event in record.events if event["event"] == "straggler"][:5]:
        yield (
            f"Rank {event.get('rank')} {event.get('what')} for {event.get('seconds', 0):.1f} of "
            f"{event.get('of', 0):.1f} s, the median rank for {event.get('median', 0):.1f} s: all waited for it."
        )
