"""What a model is asked: one data set each, how its samples are read, and the score that counts."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipscale.config.data import Data
from clipscale.data.associations import LAYOUT, Associations, association_table, open_associations
from clipscale.data.collections import CLIP_FIELD, IMAGE_KEYS, Collection, Folder, listed_captions, open_collection
from clipscale.data.evalset import EvalSet
from clipscale.data.labels import places_among
from clipscale.data.samples import BadSample, Member, find_captions, find_field, find_label
from clipscale.data.table import is_table
from clipscale.errors import ConfigError, DataError
from clipscale.evals.asked import Asked, ask_associations, ask_classes, ask_labels, ask_pairs
from clipscale.evals.outcomes import Outcome
from clipscale.evals.prompts import templates, usable
from clipscale.evals.protocol import EvalContext

KINDS = ("zeroshot", "multilabel", "retrieval", "associations")
MAIN = {"zeroshot": "top1", "multilabel": "map", "retrieval": "mean_r1", "associations": "jaccard"}
UNKNOWN = ("", "nan", "-1", "-1.0")  # of a yes-or-no label; -1 is CheXpert's mark for what a report leaves open
NAMED = 5  # reasons, or labels, that a warning names
YES, NO = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no")


@dataclass(frozen=True)
class Task:
    """A data set and a question. Fields are the keys of a suite's tasks, and options of ``clipscale eval``."""

    path: str
    """What :func:`clipscale.data.collections.open_collection` takes, or WinoGAViL's table or its directory."""
    name: str = ""
    """Shown in tables; empty is the last part of the path."""
    kind: str = ""
    """``zeroshot``, ``multilabel``, ``retrieval`` or ``associations``; empty: what the data tell."""
    metric: str = ""
    """The score that counts; empty: top1, map, mean_r1 or jaccard."""
    split: str = "test"
    """Of CLIP_benchmark's layout."""
    templates: str = ""
    """A set of prompt templates by name, or a file; empty: the data's own, or a photo of a …; of associations, a …"""
    negatives: str = ""
    """Templates that deny a label, for ``multilabel``: a file; empty: none."""
    classes: str = ""
    """File of class names: one a line, or JSON with ``classnames`` (and ``templates``, ``negatives``); empty: the
    data's own."""
    label_key: str = ""
    """Where a label stands: a member, ``json:FIELD``, or a column of a table."""
    caption_key: str = ""
    """Where captions stand, likewise; several columns with commas between."""
    group_key: str = ""
    """Retrieval: where the name stands that makes two samples the same. Zero-shot: where a sample's group stands, also
    ``npy:COLUMN``."""
    image_column: str = ""
    """Of a table, where its name does not tell."""
    labels: tuple[str, ...] = ()
    """For ``multilabel``: columns or fields of 0 and 1, one a label."""
    clips: bool = False
    """Folders of frames are videos, whose frames' features are averaged."""

    @property
    def shown(self) -> str:
        """Its name in tables."""
        return self.name or Path(self.path.rstrip("/")).name


@dataclass(frozen=True)
class Answer:
    """What came of a task, and what is wrong with its archives, by name."""

    task: Task
    asked: Asked
    damaged: dict[str, str] = field(default_factory=dict)

    @property
    def outcome(self) -> Outcome:
        """What was found of every query."""
        return self.asked.outcome

    @property
    def bad(self) -> int:
        """How many samples could not be used."""
        return self.asked.bad.total()

    @property
    def metric(self) -> str:
        """The score that counts."""
        return self.task.metric or MAIN[self.outcome.kind]

    @property
    def warnings(self) -> list[str]:
        """What of the data did not count, a line each."""
        found = [f"shard {shard} {damage}" for shard, damage in self.damaged.items()]
        if self.bad:
            found.append(f"samples that could not be used: {_most(self.asked.bad)}")
        if self.asked.strange:
            found.append(f"labels of the data that are none of the classes do not count: {_most(self.asked.strange)}")
        return found


def _most(counted: Counter[str]) -> str:
    named = ", ".join(f"{name} ({count:,})" for name, count in counted.most_common(NAMED))
    return f"{named}, …" if len(counted) > NAMED else named


def run_task(task: Task, context: EvalContext) -> Answer:
    """Ask a model. Every rank calls it, and every rank gets the same.

    Raises ConfigError or DataError, in one line that names the data set, for what does not fit.
    """
    try:
        samples = _open(task)
        kind = task.kind or _told_kind(task, samples)
        if kind not in KINDS:
            raise ConfigError(f"kind {kind}: choose from {', '.join(KINDS)}")
        if kind != task.kind:
            task = replace(task, kind=kind)
            samples = _open(task) if is_table(task.path) else samples  # of one with captions, rows become images
        asked = _ASK[kind](task, samples, context)
    except (ConfigError, DataError) as error:
        text = str(error)
        raise type(error)(text if task.path in text else f"{task.shown}: {text}") from None
    metric = task.metric or MAIN[kind]
    if metric not in (scores := asked.outcome.scores(asked.outcome.all)):
        raise ConfigError(f"{task.shown}: metric {metric} is none of {', '.join(scores)}")
    return Answer(task, asked, samples.about.damaged)


def is_listed(path: str) -> bool:
    """Whether it names shards by a pattern or a list, or lies elsewhere, and so is no path here."""
    return any(mark in path for mark in ("://", "::", "{"))


def _open(task: Task) -> Collection:
    columns: dict[str, Any] = {}
    asked = task.kind in ("", "associations") and not is_listed(task.path)
    if asked and (table := association_table(task.path)) is not None:
        return open_associations(table)
    if task.kind == "associations":
        raise DataError(f"{task.path} neither is nor holds {LAYOUT}")
    if is_table(task.path):
        columns = {
            "image_column": task.image_column or None,
            "caption_columns": [column for column in task.caption_key.split(",") if column],
            "label_column": None if task.labels else task.label_key.removeprefix("json:") or None,
            "one_per_image": task.kind == "retrieval",
        }
    return open_collection(task.path, split=task.split, clips=task.clips, **columns)


def _told_kind(task: Task, samples: Collection) -> str:
    about, first = samples.about, next(samples.read(0, 1), None)
    members = first.members if first is not None else {}
    if about.kind in KINDS:
        return about.kind
    if task.labels or ("npy" in members and "cls" not in members):  # beside a class it holds groups
        return "multilabel"
    if about.classes or task.classes or task.label_key:
        return "zeroshot"
    if task.caption_key or members.get("txt"):
        return "retrieval"
    raise ConfigError("it has neither classes nor captions; say --kind, and where they stand: --classes, --caption-key")


# ---- reading --------------------------------------------------------------------------------------------------------


def _evalset(task: Task, samples: Collection, context: EvalContext, *asked: Callable[[Member], Any]) -> EvalSet:
    if task.clips and not isinstance(samples, Folder):
        raise ConfigError("--clips is for folders of frames, which this is not")
    asked = (*asked, lambda sample: sample.members[CLIP_FIELD].decode(errors="replace")) if task.clips else asked
    return EvalSet(samples, IMAGE_KEYS, context.model.config.vision, Data().max_pixels, asked)


def _label(task: Task, places: Sequence[int] | None) -> Callable[[Member], int]:
    """The class of a sample; ``places`` holds those of the data's own numbers among the names of --classes."""

    def find(sample: Member) -> int:
        if "cls" in sample.members and (not task.label_key or is_table(task.path)):
            number = find_label(sample, "cls")
            return number if places is None else places[number]
        return find_label(sample, task.label_key or "json:label")

    return find


def _captions(task: Task) -> Callable[[Member], list[str]]:
    def find(sample: Member) -> list[str]:
        if task.caption_key and not is_table(task.path):
            return find_captions(sample, task.caption_key)
        if not (found := listed_captions(sample)):
            raise BadSample("no_caption")
        return found

    return find


def _group(task: Task) -> Callable[[Member], str | None]:
    column = task.group_key.removeprefix("npy:") if task.group_key.startswith("npy:") else ""
    if column and not column.isdecimal():
        raise ConfigError(f"--group-key {task.group_key}: npy: takes the number of a column, such as npy:0")

    def find(sample: Member) -> str | None:
        if not task.group_key:
            return None
        if column:
            if int(column) >= len(row := _row(sample)):
                raise BadSample(f"no_{task.group_key}")
            return str(row[int(column)])
        table = is_table(task.path) and not task.group_key.startswith("json:")
        return str(find_field(sample, f"json:{task.group_key}" if table else task.group_key))

    return find


Marks = tuple[list[float], list[str]]


def _marks(task: Task, names: Sequence[str]) -> Callable[[Member], Marks]:
    """L numbers of a sample, 1 yes, 0 no, NaN unknown; and the labels it lists that are none of the L."""
    place = {name: number for number, name in enumerate(names)}

    def find(sample: Member) -> Marks:
        if task.labels:
            return [_mark(find_field(sample, f"json:{label.removeprefix('json:')}")) for label in task.labels], []
        if "npy" in sample.members and not task.label_key:
            if len(row := _row(sample)) != len(names):
                raise BadSample("labels_of_another_number")
            return [_mark(value) for value in row], []
        key = task.label_key or "cls"
        value = find_field(sample, f"json:{key}" if is_table(task.path) and ":" not in key else key)
        if value is None:
            raise BadSample(f"no_{key.removeprefix('json:')}")
        listed = value if isinstance(value, list) else str(value).replace("|", "\n").splitlines()
        marked, strange = [0.0] * len(names), []
        for one in filter(None, (str(part).strip() for part in listed)):
            number = place.get(one, int(one) if one.isdecimal() else len(names))
            if number < len(names):
                marked[number] = 1.0
            else:
                strange.append(one)
        return marked, strange

    return find


def _row(sample: Member) -> NDArray[Any]:
    """The numbers of a sample's ``npy``."""
    try:
        return np.load(io.BytesIO(sample.members["npy"]), allow_pickle=False).reshape(-1)
    except (KeyError, ValueError, OSError, EOFError):
        raise BadSample("no_npy") from None


def _mark(value: Any) -> float:
    text = str(value).strip().lower() if value is not None else ""
    if text in UNKNOWN:
        return float("nan")
    if text in YES or text in NO:
        return float(text in YES)
    raise BadSample("label_is_no_yes_or_no")


# ---- asking ---------------------------------------------------------------------------------------------------------


def _ask_classes(task: Task, samples: Collection, context: EvalContext) -> Asked:
    told, own = _told(task, samples), samples.about
    places = places_among(told.names, own.classes, task.classes) if own.by_name and task.classes else None
    images = _evalset(task, samples, context, _label(task, places), _group(task))
    return ask_classes(context, images, told.names, told.templates, task.clips)


def _ask_labels(task: Task, samples: Collection, context: EvalContext) -> Asked:
    told = _told(task, samples)
    images = _evalset(task, samples, context, _marks(task, told.names))
    return ask_labels(context, images, told.names, told.templates, told.negatives, task.clips)


def _ask_pairs(task: Task, samples: Collection, context: EvalContext) -> Asked:
    group, captions = _group(task), _captions(task)

    def right(sample: Member) -> list[str]:
        name = group(sample)
        return [name] if name is not None else captions(sample)

    return ask_pairs(context, _evalset(task, samples, context, right), task.clips)


def _ask_associations(task: Task, samples: Collection, context: EvalContext) -> Asked:
    if not isinstance(samples, Associations):
        raise DataError(f"{task.path} says that it holds associations, and has no {LAYOUT.removeprefix('a ')}")
    prompts = usable(templates(task.templates), task.shown) if task.templates else None
    return ask_associations(context, _evalset(task, samples, context), samples.questions, prompts)


_ASK: dict[str, Callable[[Task, Collection, EvalContext], Asked]] = {
    "zeroshot": _ask_classes,
    "multilabel": _ask_labels,
    "retrieval": _ask_pairs,
    "associations": _ask_associations,
}


@dataclass(frozen=True)
class _Told:
    names: list[str]
    templates: list[str]
    negatives: list[str]


def _told(task: Task, samples: Collection) -> _Told:
    """Class names and prompts: of the options, else of the data, else the plain ones."""
    content = read_class_file(task.classes) if task.classes else {}
    own = [] if task.kind == "multilabel" and samples.about.by_name else list(samples.about.classes)
    names = content.get("classnames") or list(task.labels) or own
    if task.labels and len(names) != len(task.labels):
        raise ConfigError(f"--classes {task.classes} has {len(names)} names for {len(task.labels)} --labels")
    if not names:
        raise ConfigError("it does not name its classes; --classes FILE does, one a line")
    if task.templates:
        positive = templates(task.templates)
    else:
        positive = content.get("templates") or list(samples.about.templates) or templates("simple")
    negative = templates(task.negatives) if task.negatives else content.get("negatives", [])
    return _Told(
        [str(name) for name in names],
        usable(positive, task.shown),
        usable(negative, task.shown) if negative else [],
    )


def read_class_file(where: str) -> Mapping[str, Any]:
    """``classnames``, and perhaps ``templates`` and ``negatives``, of a JSON file or a text with a class a line.

    Raises DataError for a file that is neither.
    """
    try:
        text = Path(where).read_text()
        if not where.endswith(".json"):
            return {"classnames": [line.strip() for line in text.splitlines() if line.strip()]}
        found = json.loads(text)
        found = {"classnames": found} if isinstance(found, list) else found
        if not isinstance(found, dict) or not isinstance(found.get("classnames"), list):
            raise ValueError("it has no list classnames")
        return found
    except (OSError, ValueError) as error:
        raise DataError(f"--classes {where}: {getattr(error, 'strerror', None) or error}") from None


# ---- suites ---------------------------------------------------------------------------------------------------------


def shipped_suites() -> dict[str, Path]:
    """The suites that come with clipscale, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "suites").glob("*.yaml"))}


def read_suite(where: str, data_dir: str | None) -> list[Task]:
    """The tasks of a suite: a name of a shipped one, or a YAML file; paths are below ``data_dir``, else beside it.

    Raises ConfigError for what is no suite, a key that is none, or a shipped suite without a directory of data.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    own = shipped_suites()
    if where in own and data_dir is None:
        raise ConfigError(f"--suite {where} needs --data-dir DIR, where its data sets lie")
    path = own.get(where, Path(where))
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        listed = content["tasks"] if isinstance(content, dict) else None
        if not isinstance(listed, list) or not listed or not all(isinstance(o, dict) and "path" in o for o in listed):
            raise ValueError("it needs a list tasks, each with a path")
    except FileNotFoundError:
        raise ConfigError(f"--suite {where} is no file, and none of {', '.join(own)}") from None
    except (OSError, OmegaConfBaseException, YAMLError, ValueError, KeyError) as error:
        raise ConfigError(f"--suite {where}: {str(error).splitlines()[0]}") from None
    known = {one.name for one in fields(Task)}
    if unknown := next((key for one in listed for key in one if key not in known), None):
        raise ConfigError(f"--suite {where}: a task has no key {unknown!r}; it has {', '.join(sorted(known))}")
    folder = Path(data_dir) if data_dir is not None else path.parent
    return [_below(_typed(one), folder) for one in listed]


def _typed(task: Mapping[str, Any]) -> Task:
    labels = task.get("labels") or ()
    listed = [part.strip() for part in labels.split(",")] if isinstance(labels, str) else labels
    lists: dict[str, Any] = {"labels": tuple(map(str, listed)), "clips": bool(task.get("clips", False))}
    given: dict[str, Any] = {key: str(value) for key, value in task.items() if key not in lists and value is not None}
    return Task(**given, **lists)


def _below(task: Task, folder: Path) -> Task:
    def place(name: str) -> str:
        listed = name.split("::") if name else []
        return "::".join(part if "://" in part else str(folder / Path(part).expanduser()) for part in listed)

    own = folder / task.templates
    prompts = str(own) if own.is_file() else task.templates
    denying, classes = place(task.negatives), place(task.classes)
    return replace(task, path=place(task.path), templates=prompts, negatives=denying, classes=classes)
