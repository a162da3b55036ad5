"""A look at some training samples before training: whether they hold what the loss asks for beside pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from clipscale.data.manifest import ShardFile, Summary
from clipscale.data.samples import Member, find_negatives, list_members
from clipscale.data.stream import read_samples
from clipscale.errors import DataError

MOST_SHARDS, MOST_SAMPLES = 64, 32  # shards that are looked into, and samples of each


def require_negatives(files: Sequence[ShardFile], summaries: Sequence[Summary], key: str) -> None:
    """Raise DataError when no sample that is looked at has a hard negative: the key is wrong then."""
    seen, held = 0, ""
    for sample in _some(files, summaries):
        if find_negatives(sample, key):
            return
        seen, held = seen + 1, held or _on_one_line(list_members(sample))
    raise DataError(
        f"data.negatives_key={key}: none of the {seen} samples that were looked at has a text there; the first holds "
        f"{held or 'nothing'}; null turns hard negatives off"
    )


def _some(files: Sequence[ShardFile], summaries: Sequence[Summary]) -> Iterator[Member]:
    """Samples of shards over all the list, so that one source among many is met; the same on every rank."""
    holding = [(file, found.samples) for file, found in zip(files, summaries, strict=True) if found.samples]
    for file, samples in holding[:: -(-len(holding) // MOST_SHARDS)]:
        yield from (sample for sample in read_samples(file, 0, min(samples, MOST_SAMPLES)) if not sample.problem)


def _on_one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:160]
