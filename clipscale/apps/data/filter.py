"""``clipscale data filter``: keep the samples that meet every condition."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from clipscale.apps.data.account import Account, open_shards, output_names, train_command
from clipscale.apps.data.examine import address, own_key
from clipscale.apps.data.jobs import Jobs
from clipscale.apps.data.score import read_scores, score_shards
from clipscale.apps.data.shards import all_samples, distinct, identity, write_shard
from clipscale.apps.data.where import field_names, holds, parse
from clipscale.config.data import Data
from clipscale.data.manifest import ShardFile
from clipscale.data.samples import BadSample, Member, find_captions, find_field, find_image
from clipscale.errors import ConfigError

OWN = ("key", "shard", "caption", "width", "height", "json")  # names that are no json fields
LOOKED_AT = 100  # samples in which the fields of --where are looked for before the work begins
TURNED = 5  # EXIF orientations from this one on have width and height the other way round


class FilterTask(NamedTuple):
    """One shard, where its kept samples go, and what is asked of them."""

    file: ShardFile
    path: Path
    data: Data
    where: str | None
    keep: Path | None
    drop: Path | None
    scores: Path | None
    min_score: float | None


def filter_shards(
    shards: str,
    output: Path,
    overrides: Sequence[str],
    *,
    where: str | None = None,
    keep: Path | None = None,
    drop: Path | None = None,
    model: Path | None = None,
    min_score: float | None = None,
    jobs: int = 0,
    ray: bool = False,
) -> Account | None:
    """Write each shard again under its name, without the samples that fail a condition.

    With ``model`` and no ``min_score``, scores are computed and printed, nothing is filtered, and None comes back.
    """
    if min_score is not None and model is None:
        raise ConfigError(f"--min-score {min_score} needs --model RUN, whose scores are compared")
    if not (where or keep or drop or model):
        raise ConfigError("nothing to filter by: give --where, --keep, --drop or --model")
    condition = parse(where) if where else None
    listed = {name: len(read_keys(path)) for name, path in (("--keep", keep), ("--drop", drop)) if path}
    files, config = open_shards(shards, output, overrides, "filter")
    if condition is not None:
        _refuse_unknown(field_names(condition), files)
    scores: list[Path] | None = None
    if model is not None:
        scores = score_shards(files, output, model, config.data, jobs, ray)
        if min_score is None:
            again = ["clipscale", "data", "filter", shards, str(output), *overrides, "--model", str(model)]
            print(f"next: {shlex.join(again)} --min-score SCORE")
            return None
    options = {
        "shards": identity(files), "where": where, "keep": _version(keep), "drop": _version(drop), "model": model,
        "min_score": min_score, "caption_key": config.data.caption_key, "image_keys": config.data.image_keys,
        "max_pixels": config.data.max_pixels,
    }  # fmt: skip
    names = output_names(files)
    tasks = {
        name: FilterTask(
            file, output / name, config.data, where, keep, drop, scores[i] if scores else None, min_score
        )
        for i, (file, name) in enumerate(zip(files, names, strict=True))
    }  # fmt: skip
    results = Jobs(output, "filter", options, jobs, ray).run("filter", filter_shard, tasks)
    account = Account.of(files, results)
    account.shards = {name: result["kept"] for name, result in results.items()}
    met = sum((Counter(result["met"]) for result in results.values()), Counter[str]())
    for option, count in listed.items():
        if not met[option]:
            print(f"warning: none of the {count:,} keys of {option} is in these shards", file=sys.stderr)
    account.close(output, "filter", train_command(output, {"train": names}, overrides))
    return account


def filter_shard(task: FilterTask) -> dict[str, Any]:
    """Write the samples of one shard that meet all conditions; ``met`` counts those that stand in a list."""
    dropped, met = Counter[str](), Counter[str]()
    scores = iter(read_scores(task.scores)) if task.scores else None
    condition = _condition(task.where) if task.where else None

    def kept() -> Iterator[Member]:
        for sample in all_samples(task.file):
            score = next(scores) if scores else None
            try:
                judge(sample, score)
            except BadSample as reason:
                dropped[str(reason)] += 1
            else:
                yield sample

    def judge(sample: Member, score: tuple[str, str] | None) -> None:
        if sample.problem:
            raise BadSample(sample.problem)
        if task.drop and _listed(sample, task.file, task.drop):
            met["--drop"] += 1
            raise BadSample("in_drop")
        if task.keep:
            if not _listed(sample, task.file, task.keep):
                raise BadSample("not_in_keep")
            met["--keep"] += 1
        if condition is not None and not holds(condition, Fields(sample, task.data)):
            raise BadSample("where")
        if score is not None and task.min_score is not None:
            if score[1]:
                raise BadSample(score[1])
            if float(score[0]) < task.min_score:
                raise BadSample("below_min_score")

    count = write_shard(task.path, distinct(kept()))
    read = count + dropped.total()
    return {"read": read, "kept": count, "dropped": dropped, "met": met, "damage": task.file.summary.damage}


class Fields:
    """What ``--where`` can ask of a sample: its own names first, then the fields of its json. Raises BadSample."""

    def __init__(self, sample: Member, data: Data) -> None:
        self._sample, self._data = sample, data
        self._found: dict[str, Any] = {}

    def __call__(self, name: str) -> Any:
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    def _find(self, name: str) -> Any:
        shard, _, key = self._sample.key.partition("/")
        match name:
            case "key":
                return key
            case "shard":
                return shard
            case "caption":
                return find_captions(self._sample, self._data.caption_key)[0]
            case "width" | "height":
                self._found["width"], self._found["height"] = _size(find_image(self._sample, self._data.image_keys))
                return self._found[name]
            case "json":
                return _json(self._sample)
        return find_field(self._sample, f"json:{name}")


def _json(sample: Member) -> Any:
    try:
        return json.loads(sample.members["json"])
    except KeyError:
        raise BadSample("no_json") from None
    except (ValueError, RecursionError):
        raise BadSample("bad_json") from None


def _size(data: bytes) -> tuple[int, int]:
    """Width and height of an image as it is seen, from its header."""
    try:
        image = Image.open(io.BytesIO(data))
        turned = image.getexif().get(0x0112, 1) >= TURNED
    except Exception as error:
        raise BadSample("undecodable_image") from error
    return (image.height, image.width) if turned else image.size


@cache
def _condition(where: str) -> Any:
    return parse(where)


@cache
def read_keys(path: Path) -> frozenset[str]:
    """Sample keys, as ``shard/key`` or ``key``: a line each, or of a .csv or .jsonl file the ``shard`` and the ``key``.

    Raises ConfigError when the file cannot be read or holds no key.
    """
    try:
        with path.expanduser().open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
            if path.suffix == ".csv":
                keys = frozenset(map(_row_key, csv.DictReader(lines)))
            elif path.suffix == ".jsonl":
                keys = frozenset(_row_key(json.loads(line)) for line in lines if line.strip())
            else:
                keys = frozenset(line.strip() for line in lines)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (KeyError, TypeError):
        raise ConfigError(f"{path} has no column `key`") from None
    except (ValueError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not keys - {""}:
        raise ConfigError(f"{path} holds no key")
    return keys - {""}


def _row_key(row: Mapping[str, Any]) -> str:
    key = str(row["key"])
    return f"{row['shard']}/{key}" if row.get("shard") else key


def _listed(sample: Member, file: ShardFile, path: Path) -> bool:
    key = own_key(sample)
    return not read_keys(path).isdisjoint((sample.key, key, f"{address(file)}/{key}"))


def _version(path: Path | None) -> str | None:
    return hashlib.sha256(path.expanduser().read_bytes()).hexdigest() if path else None


def _refuse_unknown(names: set[str], files: Sequence[ShardFile]) -> None:
    """Raise ConfigError for a field that none of the first samples has: a slip would drop everything, hours later."""
    seen: set[str] = set()
    samples = (sample for file in files if file.summary.samples for sample in all_samples(file))
    for sample in islice(samples, LOOKED_AT):
        try:
            fields = _json(sample)
        except BadSample:
            continue
        seen |= set(fields) if isinstance(fields, dict) else set()
    for name in sorted(names - seen - {*OWN}):
        near = difflib.get_close_matches(name, [*seen, *OWN], n=1)
        raise ConfigError(
            f"--where: none of the first {LOOKED_AT} samples has a json field {name!r}"
            + (f"; did you mean {near[0]}?" if near else f"; they have: {', '.join(sorted(seen)) or 'none'}")
            + f" A rare field is written json['{name}']"
        )
