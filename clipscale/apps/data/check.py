"""``clipscale data check``: every byte of every shard, and every sample as training would take it."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clipscale.apps.data.check_report import Report, print_report
from clipscale.apps.data.examine import ShardTask, examine, labels, own_key, shown
from clipscale.apps.data.jobs import MARKERS, Jobs, share
from clipscale.apps.data.repeats import find_repeats, save_hashes, within
from clipscale.apps.data.shards import all_samples, declared_shards, digest, identity
from clipscale.apps.data.summaries import Top
from clipscale.apps.writing import whole, whole_text
from clipscale.config.data import Data
from clipscale.data.index import Declared
from clipscale.data.manifest import ShardFile
from clipscale.data.samples import BadSample, Member, list_members
from clipscale.data.stream import read_samples
from clipscale.errors import DataError, ExitCode

SMALLEST = 16  # pixels; images below are mostly tracking pixels and icons
WIDEST = 20  # longer side over the shorter one
FREQUENT = 1000  # captions that are kept of a shard
CAPTION_CHARACTERS = 200  # of what is kept of a caption

_FILE_NAME = re.compile(
    r"[\w\-. ()]+\.(jpe?g|png|gif|webp|bmp|tiff?|svg|avif|heic)|(img|dsc[nf]?|pict|dcim|image)[_-]?\d{3,}[\d_-]*",
    re.IGNORECASE,
)
_URL = re.compile(r"(https?://|www\.)\S+", re.IGNORECASE)
_NOT_ASCII = re.compile(r"[^\x00-\x7f]{2,}")
_BROKEN = re.compile("[\x00-\x08\x0e-\x1f\x7f\ufffd\ud800-\udfff]")


@dataclass(frozen=True)
class _Task(ShardTask):
    declared: Declared | None


def check(
    shards: str, output: Path, overrides: Sequence[str], *, jobs: int = 0, ray: bool = False, as_json: bool = False
) -> int:
    """Check shards; writes ``report.json``, ``bad_samples.csv`` and ``warnings.csv``, and prints tables, or the report.

    Returns the exit code: 4 when training on these shards would stop, else 0. Raises ConfigError and DataError.
    """
    files, config = declared_shards(shards, overrides)
    data = config.data
    entries = [file.declared for file in files]
    files = [replace(file, declared=None) for file in files]  # what they hold is found out anew
    options = {
        "shards": identity(files), "image_keys": data.image_keys, "caption_key": data.caption_key,
        "max_pixels": data.max_pixels,
        "index": [entry and [entry.samples, entry.size, entry.sha256] for entry in entries],
    }  # fmt: skip
    parts = output / MARKERS / "check" / "parts"
    named = enumerate(zip(labels(files), files, entries, strict=True))
    tasks = [_Task(i, label, file, data, parts, entry) for i, (label, file, entry) in named]
    engine = Jobs(output, "check", options, jobs, ray)
    results = engine.run("samples", _check_shard, {f"{task.number:06d}_{task.file.name}": task for task in tasks})
    repeats = find_repeats(engine, "keys", [task.part("keys.npy") for task in tasks])
    report = Report.make(
        [task.label for task in tasks], list(results.values()), repeats, data.max_bad_fraction,
        _frequent(task.part("captions.json") for task in tasks), [_example(tasks, pair) for pair in repeats.examples],
    )  # fmt: skip
    if not share()[0]:
        _write(output, report.document, tasks)
        if as_json:
            print(json.dumps(report.document))
        else:
            print_report(report.document, output)
    return ExitCode.DONE if report.document["passed"] else ExitCode.DATA_BUDGET


@dataclass
class _Found:
    """What was found in one shard."""

    samples: int = 0
    keys: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)
    captions: Top = field(default_factory=lambda: Top(FREQUENT))
    held: Top = field(default_factory=lambda: Top(5))  # members of samples that lack one

    def add(self, sample: Member, data: Data, beyond: bool) -> None:
        """Look at one sample; ``beyond`` what a hint says that there is, training takes none."""
        key = own_key(sample)
        self.samples += 1
        self.keys.append(key)
        if beyond:
            self.bad.append((key, "beyond_count"))
            return
        try:
            captions, image = examine(sample, data)
        except BadSample as error:
            self.bad.append((key, str(error)))
            if str(error).startswith("no_"):
                self.held.add([shown(list_members(sample), 160)])
            return
        self.captions.add({caption[:CAPTION_CHARACTERS] for caption in captions})
        found = {*image_warnings(image.shape[-1], image.shape[-2]), *(w for c in captions for w in caption_warnings(c))}
        self.warnings += [(key, warning) for warning in sorted(found)]


def _check_shard(task: _Task) -> dict[str, Any]:
    found, damage, unreadable, expected = _Found(), "", "", 0
    declared, mismatches = task.declared, list[str]()
    hinted = declared is not None and declared.places is None
    try:
        if declared:
            mismatches = differences(task.file, declared)
        expected, _, damage = task.file.summary
        for number, sample in enumerate(all_samples(task.file)):
            found.add(sample, task.data, declared is not None and hinted and number >= declared.samples)
    except DataError as error:
        unreadable = str(error)
    if declared:
        expected = max(expected, declared.samples)
    reasons = Counter(reason for _, reason in found.bad)
    if expected > found.samples:
        reasons["missing" if hinted else "lost_with_the_archive"] = expected - found.samples
    save_hashes(task.part("keys.npy"), found.keys)
    _save_rows(task.part("bad_samples.csv"), task.label, found.bad)
    _save_rows(task.part("warnings.csv"), task.label, found.warnings)
    with whole_text(task.part("captions.json")) as out:
        out.write(json.dumps(found.captions.to_json()))
    return {
        "samples": max(expected, found.samples), "reasons": reasons, "damage": damage, "unreadable": unreadable,
        "mismatches": [] if hinted else mismatches, "hints": mismatches if hinted else [],
        "warnings": Counter(warning for _, warning in found.warnings),
        "duplicate_keys": within(task.part("keys.npy")), "held": dict(found.held.counts),
    }  # fmt: skip


def image_warnings(width: int, height: int) -> list[str]:
    """What is odd about an image of this size, which training takes all the same."""
    found = ["tiny_image"] if min(width, height) < SMALLEST else []
    return [*found, "extreme_aspect_ratio"] if max(width, height) > WIDEST * min(width, height) else found


def caption_warnings(caption: str) -> list[str]:
    """What is odd about a caption, which training takes all the same."""
    found = ["caption_is_a_url"] if _URL.fullmatch(caption) else []
    if len(caption) < 256 and _FILE_NAME.fullmatch(caption):
        found.append("caption_is_a_file_name")
    if _BROKEN.search(caption) or any(_was_utf8(run[0]) for run in _NOT_ASCII.finditer(caption[:10_000])):
        found.append("caption_in_broken_encoding")
    return found


def _was_utf8(run: str) -> bool:
    """Whether these characters are the bytes of others, taken one by one (é as Ã©)."""
    for codec in ("cp1252", "latin-1"):
        try:
            return len(run.encode(codec).decode()) < len(run)
        except UnicodeError:
            continue
    return False


def differences(file: ShardFile, declared: Declared) -> list[str]:
    """How a shard differs from what is declared of it; the checksum is taken where the size agrees."""
    said = "its index says" if declared.places else "sizes.json or its _stats.json says"
    size = file.store.version(file.location).size
    if declared.size not in (None, size):
        return [f"holds {size:,} bytes, its index says {declared.size:,}"]
    found = []
    if declared.sha256 and digest(file)[1] != declared.sha256:
        found.append("its sha256 is not the one of its index: bytes in it changed")
    if file.summary.samples != declared.samples:
        found.append(f"holds {file.summary.samples:,} samples, {said} {declared.samples:,}")
    return found


def _example(tasks: Sequence[_Task], pair: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """The key that two places share."""
    number, place = pair[0]
    sample = next(iter(read_samples(tasks[number].file, place, place + 1)))
    return {"key": own_key(sample), "shards": [tasks[shard].label for shard, _ in pair]}


def _frequent(paths: Iterable[Path]) -> Top:
    found = Top(20 * FREQUENT)
    for path in paths:
        found.merge(Top.from_json(json.loads(path.read_text())))
    return found


def _save_rows(path: Path, label: str, rows: Iterable[tuple[str, str]]) -> None:
    with whole_text(path) as out:
        csv.writer(out).writerows((label, key, reason) for key, reason in rows)


def _write(output: Path, document: Mapping[str, Any], tasks: Sequence[_Task]) -> None:
    for name in ("bad_samples.csv", "warnings.csv"):
        with whole(output / name) as out:
            out.write(b"shard,key,reason\r\n")
            for task in tasks:
                with task.part(name).open("rb") as rows:
                    shutil.copyfileobj(rows, out)
    with whole_text(output / "report.json") as report:
        report.write(json.dumps(document, indent=1))
