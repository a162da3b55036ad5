"""The page: one self-contained file that shows a run, or several beside each other."""

from __future__ import annotations

import shlex
import statistics
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from clipscale.apps.quantities import duration, number, size
from clipscale.apps.record import Record, differing, find_records, read_record
from clipscale.apps.report import charts, parts
from clipscale.apps.report.charts import percent, pictures
from clipscale.apps.report.findings import findings
from clipscale.apps.report.style import STYLE
from clipscale.apps.webpage import document, section
from clipscale.apps.writing import whole_text
from clipscale.errors import ConfigError

REPORT = "report.html"
MOST_RUNS = charts.COLOURS
FEW = 6  # rows of a table that is shown at once


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of one run, or of several, to ``out``; by default ``RUN/report.html``, and ``report.html`` here.

    A directory that holds runs stands for all of them. Returns where the page is. Raises ConfigError for a path that is
    no run, and for more runs than a page can tell apart.
    """
    records = [record for path in runs for record in _records(path)]
    if len(records) > MOST_RUNS:
        raise ConfigError(f"{len(records)} runs: a page shows up to {MOST_RUNS} beside each other; name fewer")
    target = out or (records[0].path / REPORT if len(records) == 1 else Path(REPORT))
    page = _single(records[0]) if len(records) == 1 else _several(records)
    with whole_text(target) as file:
        file.write(page)
    return target


def _records(path: Path) -> list[Record]:
    return [read_record(path)] if (path / "config.yaml").exists() or not path.is_dir() else find_records(path)


def _single(record: Record) -> str:
    told = "".join(f"<li>{escape(line)}</li>" for line in findings(record))
    one = [record]
    sections = {
        "training": ("Training", pictures(charts.TRAINING, one)),
        "evaluations": ("Evaluations", pictures((*charts.EVALUATION, *charts.others(one)), one)
                        + parts.evaluations(record)),
        "examples": ("Examples", parts.examples(record)),
        "speed": ("Speed", pictures(charts.SPEED, one)),
        "time": ("Where the time went", parts.shares(record) + pictures(charts.TIME, one) + parts.attempts(record)),
        "data": ("Data", pictures(charts.DATA, one) + parts.data_health(record)),
        "configuration": ("Configuration", _configuration(record)),
        "environment": ("Environment", parts.keys(record.environment)),
        "events": ("Events", _folded(parts.events(record), len(record.events), "events")),
    }  # fmt: skip
    head = (
        f'<h1>{escape(record.name)} <span class="state {record.state.split()[0]}">{record.state}</span></h1>'
        f'<p class="soft">{escape(_subtitle(record))}</p>{_links(sections)}{parts.tiles(_tiles(record))}'
        + (f'<ul class="found">{told}</ul>' if told else "")
    )
    return document(f"{record.name} · clipscale", STYLE, head + _sections(sections))


def _several(records: Sequence[Record]) -> str:
    sections = {
        "runs": ("", _overview(records)),
        "training": ("Training", pictures(charts.TRAINING, records)),
        "evaluations": ("Evaluations", pictures((*charts.EVALUATION, *charts.others(records)), records)
                        + parts.compared_evaluations(records)),
        "speed": ("Speed", pictures(charts.SPEED, records)),
        "time": ("Where the time went", "".join(parts.shares(record, record.name) for record in records)),
        "data": ("Data", pictures(charts.DATA, records)),
        "configuration": ("Configuration: what differs", _differences(records, "config")),
        "environment": ("Environment: what differs", _differences(records, "environment")),
    }  # fmt: skip
    head = f"<h1>{len(records)} runs</h1>{_links(sections)}"
    return document(f"{len(records)} runs · clipscale", STYLE, head + _sections(sections))


def _sections(sections: dict[str, tuple[str, str]]) -> str:
    return "".join(section(name, title, body) for name, (title, body) in sections.items() if body)


def _links(sections: dict[str, tuple[str, str]]) -> str:
    links = "".join(f'<a href="#{name}">{name}</a>' for name, (title, body) in sections.items() if body and title)
    return f"<nav>{links}</nav>"


def _subtitle(record: Record) -> str:
    config = record.config
    starts = record.starts
    where = f"{starts[-1].get('world_size', 1)} × {_device(record)}" if starts else ""
    described = [
        str(config.get("model.name", "")), f"batch {config.get('global_batch_size', 0):,}",
        f"{config.get('parallel.strategy', '')} on {where}" if where else "", str(config.get("precision.name", "")),
        f"begun {starts[0]['time'].replace('T', ' ').removesuffix('Z')} UTC" if starts else "",
        f"page made {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC",
    ]  # fmt: skip
    return " · ".join(part for part in described if part)


def _device(record: Record) -> str:
    gpus = record.environment.get("gpus")
    return str(gpus[0]) if isinstance(gpus, list) and gpus else "CPU"


def _tiles(record: Record) -> dict[str, tuple[str, str]]:
    last, seen, total = record.last, record.samples_seen, record.config.get("total_samples") or 0
    rates = [y for _, y in record.series("train/samples_per_s")]
    key, value = record.objective
    luck = last.get(f"{key}_chance")
    found = {"samples seen": (f"{seen:,}", f"{seen / total:.0%} of {total:,}" if total else "")}
    if "train/loss" in last:
        held = last.get("val/loss")
        found["training loss"] = (f"{last['train/loss']:.4f}", "" if held is None else f"held out {held:.4f}")
    if value is not None:
        found[key.removeprefix("val/")] = (f"{value:.4f}", "" if luck is None else f"chance {luck:.4f}")
    if rates:
        per_gpu = last.get("train/samples_per_s_per_gpu", 0)
        found["samples/s, median"] = (
            number(float(f"{statistics.median(rates):.3g}")),
            f"last {number(per_gpu)} per GPU",
        )
    if "train/mfu" in last:
        found["MFU"] = (percent(last["train/mfu"]), "")
    if "time/goodput" in last:
        again = last.get("time/restarts", 0)
        restarts = "1 restart" if again == 1 else f"{again:.0f} restarts"
        found["goodput"] = (percent(last["time/goodput"]), f"of {duration(last['time/wall_s'])}, {restarts}")
    if "train/memory_peak_bytes" in last:
        found["memory peak"] = (size(last["train/memory_peak_bytes"]), "fullest rank")
    if "train/bad_samples" in last:
        cut = last.get("train/truncated_captions", 0)
        found["bad samples"] = (f"{last['train/bad_samples']:,.0f}", f"{cut:,.0f} captions cut")
    return found


def _overview(records: Sequence[Record]) -> str:
    rows = []
    for i, record in enumerate(records):
        last, (key, value) = record.last, record.objective
        rates = [y for _, y in record.series("train/samples_per_s")]
        rows.append([
            f'<i class="key s{i}"></i>{escape(record.name)}', record.state, f"{record.samples_seen:,}",
            *(f"{last[name]:.4f}" if name in last else "" for name in ("train/loss", "val/loss")),
            "" if value is None else f"{value:.4f} <span class=soft>{escape(key.removeprefix('val/'))}</span>",
            number(float(f"{statistics.median(rates):.3g}")) if rates else "",
            percent(last["time/goodput"]) if "time/goodput" in last else "",
            duration(last["time/wall_s"]) if "time/wall_s" in last else "",
        ])  # fmt: skip
    heads = ("run", "state", "samples seen", "loss", "held-out loss", "objective", "samples/s", "goodput", "time")
    return parts.table(heads, rows)


def _configuration(record: Record) -> str:
    words = shlex.join(["clipscale", "train", *record.overrides])
    return f"<pre>{escape(words)}</pre>{_folded(parts.keys(record.config), len(record.config), 'keys')}"


def _differences(records: Sequence[Record], part: str) -> str:
    found = {key: row for key, row in differing(records, part).items() if key != "name"}
    rows = [[escape(key), *map(parts.shown, row)] for key, row in found.items()]
    return parts.table(("key", *(record.name for record in records)), rows, "left") or '<p class="soft">Nothing.</p>'


def _folded(body: str, rows: int, what: str) -> str:
    return f"<details><summary>All {rows} {what}</summary>{body}</details>" if rows > FEW else body
