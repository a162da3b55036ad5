"""A look at some training samples before training: whether they hold what the loss asks for beside pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from clipscale.config import Config
from clipscale.data.embeddings import StoredTeacher, read_embeddings
from clipscale.data.manifest import ShardFile, Summary
from clipscale.data.samples import BadSample, Member, find_label, find_negatives, list_members
from clipscale.data.stream import read_samples
from clipscale.errors import DataError

T = TypeVar("T")

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

    def read(sample: Member) -> int:
        label = find_label(sample, key)
        if not 0 <= label < classes:
            raise BadSample(f"label outside of the {classes} classes")
        return label

    label, why, held = _first(files, summaries, read)
    if label is None:
        raise DataError(
            f"data.label_key={key}: no sample that was looked at has a class there ({why}); the first holds {held}"
        )


def find_teacher(files: Sequence[ShardFile], summaries: Sequence[Summary], image: str, text: str) -> StoredTeacher:
    """The teacher whose embeddings stand in these members; the first sample that holds both tells the dimension.

    Raises DataError when none that is looked at does.
    """

    def read(sample: Member) -> StoredTeacher:
        vectors = read_embeddings(sample, image), read_embeddings(sample, text)
        if vectors[0].shape[1] != vectors[1].shape[1]:
            raise BadSample("image and text of different dimensions")
        return StoredTeacher(image, text, vectors[0].shape[1])

    teacher, why, held = _first(files, summaries, read)
    if teacher is None:
        raise DataError(
            f"loss.teachers: no sample that was looked at holds embeddings in {image} and {text} ({why}); the first "
            f"holds {held}"
        )
    return teacher


def _first(
    files: Sequence[ShardFile], summaries: Sequence[Summary], read: Callable[[Member], T]
) -> tuple[T | None, str, str]:
    """What ``read`` gives of the first sample that it raises no BadSample for; and until then, why it did for how many,
    and what the first of them holds."""
    reasons, held = Counter[str](), ""
    found = None
    for sample in _some(files, summaries):
        try:
            found = read(sample)
            break
        except BadSample as error:
            reasons[str(error)] += 1
        held = held or _on_one_line(list_members(sample))
    why = ", ".join(f"{count} x {reason}" for reason, count in reasons.items())
    return found, why or "no sample", held or "nothing"


def _some(files: Sequence[ShardFile], summaries: Sequence[Summary]) -> Iterator[Member]:
    """Samples of shards over all the list, so that one source among many is met; the same on every rank."""
    holding = [(file, found.samples) for file, found in zip(files, summaries, strict=True) if found.samples]
    chosen = holding[:: -(-len(holding) // MOST_SHARDS)]
    for file, samples in chosen:
        some = read_samples(file, 0, min(samples, -(-MOST_SAMPLES // len(chosen))))
        yield from (sample for sample in some if not sample.problem)


def _on_one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:160]
