"""``clipscale data pack``: images and captions into shuffled shards, split by groups that stay together."""

from __future__ import annotations

import csv
import os
import re
import shlex
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rich.console
from numpy.typing import NDArray
from rich.table import Table

from clipscale.apps.data.account import brace_pattern, refuse_foreign, refuse_gone, root_override, train_command
from clipscale.apps.data.jobs import Jobs, Tasks, share
from clipscale.apps.data.packing import (
    FORMATTER,
    Sample,
    Settings,
    Shard,
    group_values,
    hash_files,
    image_path,
    pack_shard,
)
from clipscale.apps.data.splits import assign, check_apart, connect, parse_split
from clipscale.apps.data.tables import Rows, Source, read_source
from clipscale.apps.writing import whole_text
from clipscale.config import Config
from clipscale.data.order import permutation
from clipscale.data.samples import BadSample
from clipscale.errors import ConfigError, DataError

HASHED = 4096  # image files per task that hashes them
TRIED = 100  # samples of which one image file at least must be there


class Plan(NamedTuple):
    """Which rows make a sample, and which samples a shard.

    ``rows`` int64 [rows] holds row numbers by sample, those of sample ``i`` at ``ends[i] <= place < ends[i + 1]``;
    ``shards`` the numbers of the samples of each shard, by file name.
    """

    rows: NDArray[np.int64]
    ends: NDArray[np.int64]
    shards: dict[str, NDArray[np.int64]]


def pack(
    source: Path,
    output: Path,
    *,
    images: Path | None,
    image_column: str | None,
    caption_column: str | None,
    caption_template: str | None,
    split: str,
    group_by: str | None,
    size: int,
    quality: int,
    window: str | None,
    shard_samples: int,
    seed: int,
    jobs: int,
    ray: bool,
) -> None:
    """Pack a source into ``output/train-000000.tar …``, and print what was packed and what to type next.

    The arguments are the options of the command. Raises ConfigError for options that are wrong, DataError for a source
    that cannot be read or an output that cannot be written.
    """
    shares = parse_split(split)
    if size < 0 or not 1 <= quality <= 100:
        raise ConfigError(f"--size {size} --quality {quality}: a size is 0 or more, a quality 1 to 100")
    limits = _parse_window(window)
    if source.is_dir() and source.resolve() == output.resolve():
        raise ConfigError(f"{output} is the source; choose another directory for the shards")
    if group_by and len(shares) == 1:
        raise ConfigError(f"--group-by {group_by} is for more than one split; add --split 0.9/0.05/0.05")
    if ready := _ready(source):
        _tell_ready(source, ready)
        return
    refuse_foreign(output, "pack")
    fields = _template_fields(caption_template) if caption_template is not None else []
    table = read_source(source, images, image_column, caption_column, with_captions=caption_template is None)
    _check_columns(table, [*fields, *([group_by] if group_by else [])])
    settings = Settings(
        str(table.images.resolve()), table.image_column, table.caption_column, caption_template, group_by, size,
        quality, limits, Config().data.max_pixels,
    )  # fmt: skip
    made_of = f"column {table.caption_column}" if caption_template is None else repr(caption_template)
    print(f"{table.path}: {len(table.rows):,} rows; images of column {table.image_column}, captions of {made_of}")
    options = {
        **vars(settings), "source": table.rows.digest(), "split": split, "shard_samples": shard_samples, "seed": seed,
    }  # fmt: skip
    engine = Jobs(output, "pack", options, jobs, ray)
    rows, ends = _samples(table.rows, table.image_column)
    _try_some(table, settings, rows[ends[:-1]])
    groups = _groups(engine, table.rows, settings, rows, ends, hashed=len(shares) > 1)
    shards = _shards(assign(groups, shares, seed), shares, shard_samples, seed)
    plan = Plan(rows, ends, shards)
    tasks = Tasks(list(shards), partial(_task, output, table.rows, plan, list(shards)))
    results = engine.run("pack", partial(pack_shard, settings), tasks)
    _finish(output, settings, shares, results)


def _parse_window(window: str | None) -> tuple[float, float] | None:
    if window is None:
        return None
    try:
        low, high = (float(part) for part in window.split("/"))
    except ValueError:
        low = high = 0.0
    if not low < high:
        raise ConfigError(f"--window {window}: give LOW/HIGH, e.g. 0/4095")
    return low, high


def _template_fields(template: str) -> list[str]:
    try:
        parts = list(FORMATTER.parse(template))
    except ValueError as error:
        raise ConfigError(f"--caption-template {template!r}: {error}") from None
    names = [name for _, name, _, _ in parts if name is not None]
    if not names or any(form or conversion for _, _, form, conversion in parts):
        raise ConfigError(
            f"--caption-template {template!r}: name columns in braces, e.g. '{{findings}} {{impression}}'"
        )
    return names


def _check_columns(table: Source, wanted: Sequence[str]) -> None:
    if unknown := [name for name in wanted if name not in table.rows.columns]:
        raise ConfigError(
            f"{table.path} has no column {', '.join(map(repr, unknown))}; it has {', '.join(table.rows.columns)}"
        )


def _samples(rows: Rows, column: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows with the same image are one sample: ``(rows, ends)`` of a plan, samples in the order of first rows."""
    numbers, seen, count = array("q"), dict[str, int](), 0
    for row in range(len(rows)):
        name = rows[row].get(column)
        path = os.path.normpath(name) if isinstance(name, str) and name else None
        number = seen.setdefault(path, count) if path else count
        count += number == count
        numbers.append(number)
    by_row = np.frombuffer(numbers, dtype=np.int64)
    return np.argsort(by_row, kind="stable"), np.searchsorted(np.sort(by_row), np.arange(count + 1))


def _try_some(table: Source, settings: Settings, firsts: NDArray[np.int64]) -> None:
    """Raises DataError when no image of the first samples is there: the directory is wrong, or these are addresses."""
    paths: list[Path] = []
    for row in firsts[:TRIED].tolist():
        try:
            paths.append(image_path(settings, table.rows[row]))
        except BadSample:
            continue
    names = [str(path.relative_to(settings.images) if path.is_relative_to(settings.images) else path) for path in paths]
    if names and all(re.match(r"(https?|s3|gs):/", name) for name in names):
        raise DataError(
            f"{table.path}: column {table.image_column} holds addresses; fetch them with img2dataset, whose shards are "
            "ready for training"
        )
    if not any(path.is_file() for path in paths):
        looked = f"; looked for {paths[0]}" if paths else " named"
        raise DataError(f"{table.path}: none of the first {len(paths)} images is there{looked}; set --images")


def _groups(
    engine: Jobs, rows: Rows, settings: Settings, order: NDArray[np.int64], ends: NDArray[np.int64], hashed: bool
) -> NDArray[np.int64]:
    """The group of each sample, int64 [samples]: what must not be parted. Raises DataError for a row without one."""
    count = len(ends) - 1
    if not hashed:  # there is one split, and nothing to part
        return np.arange(count)
    if settings.group_by:
        for row in range(len(rows)):
            if "" in group_values(settings, [rows[row]]):
                raise DataError(f"row {row + 1:,} has no value in column {settings.group_by}; --group-by needs one")
    starts = range(0, count, HASHED)

    def task(number: int) -> list[bytes]:
        return [rows.text(row) for row in order[ends[starts[number] : min(starts[number] + HASHED, count)]].tolist()]

    found = engine.run("hash", partial(hash_files, settings), Tasks([f"{start:09d}" for start in starts], task))

    def keys() -> Iterator[list[object]]:
        sample = 0
        for hashes in found.values():
            for value in hashes:
                own = order[ends[sample] : ends[sample + 1]].tolist() if settings.group_by else []
                named = group_values(settings, [rows[row] for row in own])
                yield [*named, *([] if value is None else [value])]
                sample += 1

    return connect(keys())


def _shards(
    splits: NDArray[np.int64], shares: Mapping[str, float], size: int, seed: int
) -> dict[str, NDArray[np.int64]]:
    shards: dict[str, NDArray[np.int64]] = {}
    for number, name in enumerate(shares):
        members = np.flatnonzero(splits == number)
        members = members[permutation(len(members), seed, 2, number)]
        for start in range(0, len(members), size):
            shards[f"{name}-{start // size:06d}.tar"] = members[start : start + size]
    return shards


def _task(output: Path, rows: Rows, plan: Plan, names: Sequence[str], number: int) -> Shard:
    samples = []
    for sample in plan.shards[names[number]].tolist():
        own = plan.rows[plan.ends[sample] : plan.ends[sample + 1]].tolist()
        samples.append(Sample(sample, own[0], [rows.text(row) for row in own]))
    return Shard(output / names[number], samples)


def _finish(output: Path, settings: Settings, shares: Mapping[str, float], results: Mapping[str, Any]) -> None:
    """Check that no shard is gone and nothing in two splits, list what was skipped, and tell what was made."""
    refuse_gone(output, results)
    by_split = {name: [r for shard, r in results.items() if shard.startswith(f"{name}-")] for name in shares}
    for what, kind in (("groups", f"values of {settings.group_by}"), ("files", "image files")):
        check_apart({name: [h for r in made for h in r[what]] for name, made in by_split.items()}, kind)
    skipped = sorted(each for result in results.values() for each in result["skipped"])
    reasons = Counter(reason for _, _, reason in skipped)
    with whole_text(output / "skipped.csv") as out:
        csv.writer(out).writerows([("row", "path", "reason"), *skipped])
    if empty := [name for name, made in by_split.items() if not any(each["samples"] for each in made)]:
        told = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        raise DataError(f"no sample of {' and '.join(empty)} could be packed ({told}); see {output / 'skipped.csv'}")
    if share()[0]:  # the first node tells
        return
    table = Table(title=str(output), title_justify="left")
    for column in ("split", "samples", "captions", "shards", "MB", *(["groups"] if settings.group_by else [])):
        table.add_column(column, justify="left" if column == "split" else "right")
    for name, made in by_split.items():
        counts = [f"{sum(each[what] for each in made):,}" for what in ("samples", "captions")]
        groups = [f"{len({g for each in made for g in each['groups']}):,}"] if settings.group_by else []
        size = f"{sum(each['bytes'] for each in made) / 1e6:,.1f}"
        table.add_row(name, *counts, f"{len(made):,}", size, *groups)
    rich.console.Console().print(table)
    if reasons:
        print(f"skipped {len(skipped):,}, listed in {output / 'skipped.csv'}:")
        for reason, count in reasons.most_common():
            print(f"  {count:,} {reason}")
    several = any(each["captions"] > each["samples"] for each in results.values())
    splits = {name: [shard for shard in results if shard.startswith(f"{name}-")] for name in shares}
    _tell_next(output, splits, ["data.caption_key=json:captions"] if several else [])


def _ready(source: Path) -> list[str]:
    """Names of the tars of a folder that holds shards already."""
    return sorted(path.name for path in source.glob("*.tar")) if source.is_dir() else []


def _tell_ready(source: Path, shards: Sequence[str]) -> None:
    print(f"{source} holds {len(shards):,} shards already: there is nothing to pack, and nothing was written")
    under_way = [n for n in shards if re.fullmatch(r"\d+\.tar", n) and not (source / f"{n[:-4]}_stats.json").is_file()]
    if any(source.glob("*_stats.json")) and under_way:
        print(f"{len(under_way):,} of them have no _stats.json yet, first {under_way[0]}: is img2dataset still at it?")
    _tell_next(source, {"train": shards}, [])


def _tell_next(root: Path, splits: Mapping[str, Sequence[str]], overrides: Sequence[str]) -> None:
    shards = "::".join(map(brace_pattern, splits.values()))
    print("\nnext:")
    print(" ", shlex.join(["clipscale", "data", "index", shards, root_override(root)]))
    if "train" in splits:
        print(" ", train_command(root, splits, overrides))
    if "test" in splits:
        test = [root_override(root), f"data.val.shards={brace_pattern(splits['test'])}", *overrides]
        print(f"and when it is trained, clipscale eval RUN {shlex.join(test)}")
