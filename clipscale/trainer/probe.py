"""A look at some training samples before training: whether they hold what the loss asks for beside pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from clipscale.config import Config
from clipscale.data.embeddings import StoredTeacher, read_embeddings
from clipscale.data.manifest import ShardFile, Summary
from clipscale.data.samples import BadSample, Member, find_label, find_negatives, list_members
from clipscale.data.stream import read_samples
from clipscale.errors import DataError

MOST_SHARDS, MOST_SAMPLES = 64, 2048  # that are looked at, where nothing is found before


def probe(config: Config, files: Sequence[ShardFile], summaries: Sequence[Summary]) -> tuple[StoredTeacher, ...]:
    """The teachers whose embeddings stand with the samples.

    Raises DataError for them, hard negatives or labels, where no sample that is looked at has what the configuration
    names.
    """
    if config.data.negatives_key is not None:
        require_negatives(files, summaries, config.data.negatives_key)
    if config.data.label_key is not None:
        require_labels(files, summaries, config.data.label_key, len(config.model.classes or ()))
    stored = [one for one in config.loss.teachers if isinstance(one, dict)]
    return tuple(find_teacher(files, summaries, one["image"], one["text"]) for one in stored)


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


def require_labels(files: Sequence[ShardFile], summaries: Sequence[Summary], key: str, classes: int) -> None:
    """Raise DataError when no sample that is looked at has the index of a class."""
    reasons, held = Counter[str](), ""
    for sample in _some(files, summaries):
        try:
            if 0 <= find_label(sample, key) < classes:
                return
            reasons[f"label outside of the {classes} classes"] += 1
        except BadSample as error:
            reasons[str(error)] += 1
        held = held or _on_one_line(list_members(sample))
    found = ", ".join(f"{count} x {reason}" for reason, count in reasons.items())
    raise DataError(
        f"data.label_key={key}: no sample that was looked at has a class there ({found or 'no sample'}); the "
        f"first holds {held or 'nothing'}"
    )


def find_teacher(files: Sequence[ShardFile], summaries: Sequence[Summary], image: str, text: str) -> StoredTeacher:
    """The teacher whose embeddings stand in these members; the first sample that holds both tells the dimension.

    Raises DataError when none that is looked at does.
    """
    reasons, held = Counter[str](), ""
    for sample in _some(files, summaries):
        try:
            vectors = read_embeddings(sample, image), read_embeddings(sample, text)
            if vectors[0].shape[1] == vectors[1].shape[1]:
                return StoredTeacher(image, text, vectors[0].shape[1])
            reasons["image and text of different dimensions"] += 1
        except BadSample as error:
            reasons[str(error)] += 1
        held = held or _on_one_line(list_members(sample))
    found = ", ".join(f"{count} x {reason}" for reason, count in reasons.items())
    raise DataError(
        f"loss.teachers: no sample that was looked at holds embeddings in {image} and {text} ({found or 'no sample'}); "
        f"the first holds {held or 'nothing'}"
    )


def _some(files: Sequence[ShardFile], summaries: Sequence[Summary]) -> Iterator[Member]:
    """Samples of shards over all the list, so that one source among many is met; the same on every rank."""
    holding = [(file, found.samples) for file, found in zip(files, summaries, strict=True) if found.samples]
    chosen = holding[:: -(-len(holding) // MOST_SHARDS)]
    for file, samples in chosen:
        some = read_samples(file, 0, min(samples, -(-MOST_SAMPLES // len(chosen))))
        yield from (sample for sample in some if not sample.problem)


def _on_one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:160]
