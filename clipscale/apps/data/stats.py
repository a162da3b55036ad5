"""``clipscale data stats``: what captions, images and fields are like, as tables, plots and a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipscale.apps.data.describe import Place, Summary, describe, tie, uncut
from clipscale.apps.data.examine import ShardTask, labels
from clipscale.apps.data.jobs import MARKERS, Jobs, share
from clipscale.apps.data.repeats import find_repeats, save_hashes
from clipscale.apps.data.shards import all_samples, identity, named_shards
from clipscale.apps.data.stats_page import page
from clipscale.apps.data.stats_pictures import Card, cards
from clipscale.apps.data.stats_plots import plots
from clipscale.apps.data.stats_report import document, print_stats
from clipscale.apps.data.summaries import Spread
from clipscale.apps.writing import whole, whole_text
from clipscale.config import Config
from clipscale.data.manifest import ShardFile
from clipscale.errors import DataError


@dataclass(frozen=True)
class _Task(ShardTask):
    tokenizer: str
    context_length: int


def stats(
    shards: str, output: Path, overrides: Sequence[str], *, jobs: int = 0, ray: bool = False, as_json: bool = False
) -> None:
    """Describe shards; writes ``stats.json``, plots and ``index.html``, and prints tables, or the JSON.

    Raises ConfigError, and DataError for shards that cannot be read or hold nothing that training could use.
    """
    files, config = named_shards(shards, overrides)
    tasks = _tasks(files, config, output)
    uncut(config.tokenizer.name)  # a name that is none should not fail in every process
    data, first = config.data, tasks[0]
    options = {
        "shards": identity(files), "image_keys": data.image_keys, "caption_key": data.caption_key,
        "max_pixels": data.max_pixels, "tokenizer": first.tokenizer, "context_length": first.context_length,
    }  # fmt: skip
    engine = Jobs(output, "stats", options, jobs, ray)
    results = engine.run("samples", _describe_shard, {f"{task.number:06d}_{task.file.name}": task for task in tasks})
    summary = _add_up(tasks, list(results.values()))
    if not summary.counts.get("used"):
        reasons = (
            ", ".join(f"{reason} {count:,}" for reason, count in summary.top("reasons").best(4)) or "there are none"
        )
        raise DataError(
            f"none of the samples of {len(files):,} shards can be used ({reasons}); see data.image_keys and "
            "data.caption_key, and `clipscale data check` for the samples"
        )
    repeats = find_repeats(engine, "captions", [task.part("captions.npy") for task in tasks])
    damage = {task.label: result["damage"] for task, result in zip(tasks, results.values(), strict=True)}
    found = document(summary, repeats, config.tokenizer.name, first.context_length, damage)
    drawn = {name: list(draw) for name, draw in summary.draws.items()}
    sheet = cards(engine, drawn, files, [task.label for task in tasks], data)
    if share()[0]:
        return
    _write(output, found, summary, sheet, first.context_length)
    if as_json:
        print(json.dumps(found))
    else:
        print_stats(found, output)


def _tasks(files: Sequence[ShardFile], config: Config, output: Path) -> list[_Task]:
    length = config.tokenizer.context_length or config.model.context_length
    parts = output / MARKERS / "stats" / "parts"
    return [
        _Task(i, label, file, config.data, parts, config.tokenizer.name, length)
        for i, (label, file) in enumerate(zip(labels(files), files, strict=True))
    ]


def _describe_shard(task: _Task) -> dict[str, Any]:
    summary, captions = Summary(), []
    for number, sample in enumerate(all_samples(task.file)):
        place = Place(task.number, number, tie(task.label, sample))
        found = describe(summary, sample, place, task.data, task.tokenizer, task.context_length)
        summary.count("used", int(bool(found)))
        captions += found
    samples, _, damage = task.file.summary
    save_hashes(task.part("captions.npy"), captions)
    with whole_text(task.part("json")) as out:
        out.write(json.dumps(summary.to_json()))
    size = task.file.store.version(task.file.location).size
    return {"samples": samples, "bytes": int(task.file.index.offsets[-1]) if size is None else size, "damage": damage}


def _add_up(tasks: Sequence[_Task], results: Sequence[dict[str, Any]]) -> Summary:
    summary = Summary()
    summary.spreads |= {"samples_per_shard": Spread(), "bytes_per_shard": Spread()}
    sizes: dict[int | str, tuple[int, int]] = {}
    for task, result in zip(tasks, results, strict=True):
        summary.merge(Summary.from_json(json.loads(task.part("json").read_text())))
        shard = task.number if task.file.rows is None else task.file.location  # a table comes in parts, of one file
        sizes[shard] = (sizes.get(shard, (0, 0))[0] + result["samples"], result["bytes"])
    for samples, size in sizes.values():
        summary.spread("samples_per_shard").add(samples)
        summary.spread("bytes_per_shard").add(size)
    return summary


def _write(
    output: Path, found: dict[str, Any], summary: Summary, sheet: dict[str, list[Card]], context_length: int
) -> None:
    light, dark = (plots(summary, context_length, dark=dark) for dark in (False, True))
    files = {f"{name}.png": data for name, data in light.items()}
    files["stats.json"] = json.dumps(found, indent=1).encode()
    files["index.html"] = page(found, sheet, {name: (light[name], dark[name]) for name in light}).encode()
    for name, data in files.items():
        with whole(output / name) as out:
            out.write(data)
