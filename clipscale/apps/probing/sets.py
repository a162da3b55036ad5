"""Data sets as the commands here take them: labelled images, with class names where there are some."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from clipscale.apps.evaluation.tasks import read_class_file
from clipscale.config.data import Data
from clipscale.data.collections import IMAGE_KEYS, Collection, Table, listed_captions, open_collection
from clipscale.data.evalset import EvalSet
from clipscale.data.samples import BadSample, Member, find_captions, find_field, find_label
from clipscale.data.table import is_table
from clipscale.distributed.collectives import rank
from clipscale.errors import DataError
from clipscale.evals import Classes, EvalContext
from clipscale.evals.prompts import templates, usable
from clipscale.models import CLIP

LABEL_KEYS = ("cls", "json:label")  # where a label is looked for, unless it is said


def images_of(collection: Collection, model: CLIP, *fields: Callable[[Member], Any]) -> EvalSet:
    """A collection made ready for a model, with what ``fields`` find of each sample."""
    return EvalSet(collection, IMAGE_KEYS, model.config.vision, Data().max_pixels, fields)


def open_labelled(where: str, split: str, label_key: str | None) -> Collection:
    """A collection; of a table, ``label_key`` may name the column of labels."""
    column = label_key if is_table(where) and not (label_key or "").startswith("json:") else None
    return open_collection(where, split=split, label_column=column)


def labels_at(key: str | None, collection: Collection) -> Callable[[Member], int]:
    """What finds the class index of a sample at ``key``, or where it usually is; raises BadSample without one."""
    by_column = isinstance(collection, Table) and not (key or "").startswith("json:")
    return partial(_label, key=None if by_column else key)


def _label(sample: Member, key: str | None) -> int:
    usual = LABEL_KEYS[0] if LABEL_KEYS[0] in sample.members else LABEL_KEYS[1]
    return find_label(sample, key or usual)


def texts_at(sample: Member, key: str) -> list[str]:
    """The texts at ``key`` that are right for an image. Raises BadSample where there are none."""
    if key == "txt":  # of which collections have one a line
        if not (found := listed_captions(sample)):
            raise BadSample("no_caption")
        return found
    value = find_field(sample, key)
    return find_captions(sample, key) if isinstance(value, list) else [str(value)]


def warn_of_damage(collection: Collection) -> None:
    """Say on stderr what is wrong with its archives; the first rank does."""
    for shard, damage in ({} if rank() else collection.about.damaged).items():
        print(f"warning: shard {shard} {damage}", file=sys.stderr)


@contextmanager
def watched(context: EvalContext, title: str) -> Iterator[EvalContext]:
    """The same context, whose encoding shows a bar on stderr."""
    with Progress(console=Console(stderr=True), transient=True, disable=bool(rank())) as bar:
        task = bar.add_task(escape(title), total=None)
        yield replace(context, progress=lambda done, total: bar.update(task, completed=done, total=total))


@contextmanager
def explaining(name: str, keys: str) -> Iterator[None]:
    """What is wrong with the samples of a set is said of it, with the options by which they are read."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{name}: {error}; check {keys}") from None


def check_labels(labels: Sequence[int], count: int, name: str) -> None:
    """Raise DataError unless every label of the set ``name`` is the number of one of ``count`` classes."""
    if not 0 <= min(labels) <= max(labels) < count:
        raise DataError(
            f"the labels of the {name} set run from {min(labels)} to {max(labels)}, and there are {count} class names; "
            "--classes FILE names those of all sets"
        )


def class_names(path: Path | None, *collections: Collection) -> Classes | None:
    """Class names and prompts from a file, or else from what data sets tell of themselves; None where neither does.

    Raises DataError where they tell of different classes, or of others than the file.
    """
    told = {collection.about.classes: collection.about for collection in collections if collection.about.classes}
    if len(told) > 1:
        one, other = list(told)[:2]
        differing = ", ".join(sorted(set(one) ^ set(other))[:3]) or "in another order"
        raise DataError(f"the data sets have different classes ({differing}): a label means another one in each")
    if path is not None:
        content = read_class_file(str(path))
        names, prompts = [str(name) for name in content["classnames"]], content.get("templates")
        for listed in told:  # which may have other names for the same classes
            if len(names) != len(listed) or (names != list(listed) and set(names) == set(listed)):
                raise DataError(
                    f"--classes {path}: its {len(names)} classes ({', '.join(names[:3])}, …) are not those of the data "
                    f"in their order, {len(listed)} ({', '.join(listed[:3])}, …): a label would mean another class"
                )
    else:
        if not told:
            return None
        ((tells, about),) = told.items()
        names, prompts = list(tells), about.templates
    return Classes(names, usable(prompts or templates("simple"), str(path or "the data set")), {})
