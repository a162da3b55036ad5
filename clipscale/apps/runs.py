"""``clipscale runs``: which runs there are, what became of one, and in what two differ."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import rich.console
from rich.markup import escape
from rich.table import Table

from clipscale.apps.quantities import count, duration, number, size
from clipscale.apps.record import Record, differing, find_records, read_record
from clipscale.apps.report.findings import findings
from clipscale.apps.report.parts import SPENT
from clipscale.config.rundir import is_busy
from clipscale.errors import ExitCode, masked

COLOURS = {"done": "green", "running": "cyan", "preempted": "yellow", "stopped": "yellow", "new": "dim"}
BAR = 40  # characters
SHADES = {"step": "green", "data_wait": "yellow", "checkpoint": "magenta", "evaluation": "blue", "start": "cyan",
          "lost": "red"}  # fmt: skip


def list_runs(directory: Path, as_json: bool) -> None:
    """Print the runs below a directory, the newest last. Raises ConfigError if there is none."""
    records = find_records(directory)
    if as_json:
        print(json.dumps([_summary(record) for record in records], indent=2))
        return
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold", min_width=12)
    for heading in ("state", "samples", "", "loss", "objective", "samples/s", "goodput", "age"):
        table.add_column(heading, justify="left" if heading == "state" else "right", no_wrap=True)
    for record in records:
        last, (_, value) = record.last, record.objective
        total = record.config.get("total_samples") or 0
        table.add_row(
            escape(str(record.path.relative_to(directory))), _state(record), count(record.samples_seen),
            f"{record.samples_seen / total:.0%}" if total else "", _four(last.get("train/loss")), _four(value),
            _three(last.get("train/samples_per_s")), _percent(last.get("time/goodput")),
            duration(record.age_s()),
        )  # fmt: skip
    rich.console.Console().print(table)


def show_run(path: Path, as_json: bool) -> None:
    """Print what became of a run. Raises ConfigError for a path that is none."""
    record = read_record(path)
    if as_json:
        print(json.dumps(_summary(record) | {"metrics": record.last}, indent=2))
        return
    console = rich.console.Console(highlight=False)
    last, total = record.last, record.config.get("total_samples") or 0
    console.print(f"[bold]{escape(str(record.path))}[/bold]  {_state(record)}")
    console.print(
        f"{record.samples_seen:,} of {total:,} samples, started {len(record.starts)} times, model "
        f"{escape(str(record.config.get('model.name')))}, batch {record.config.get('global_batch_size', 0):,}",
        style="dim",
    )
    for line in findings(record):
        console.print(f"[yellow]![/yellow] {escape(line)}")
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    rows = {
        "training loss": _four(last.get("train/loss")), "held-out loss": _four(last.get("val/loss")),
        "samples/s": _three(last.get("train/samples_per_s")), "step": _seconds(last.get("train/step_s")),
        "MFU": _percent(last.get("train/mfu")), "memory peak": _size(last.get("train/memory_peak_bytes")),
        "logit scale": _three(last.get("train/logit_scale")), "gradient norm": _three(last.get("train/grad_norm")),
        "tokens per caption": _three(last.get("train/tokens_per_caption")),
        "bad samples": _three(last.get("train/bad_samples")),
    }  # fmt: skip
    told = [(name, value) for name, value in rows.items() if value]
    half = -(-len(told) // 2)
    for (name, value), (other, beside) in zip(told[:half], [*told[half:], ("", "")], strict=False):
        table.add_row(name, value, other, beside)
    console.print(table)
    _print_time(console, record)
    _print_evaluations(console, record)


def _print_time(console: rich.console.Console, record: Record) -> None:
    wall = record.last.get("time/wall_s")
    if not wall:
        return
    shares = {kind: record.last.get(f"time/{kind}_s", 0.0) / wall for kind in SPENT}
    bar = "".join(f"[{SHADES[kind]}]{'█' * round(BAR * share)}[/]" for kind, share in shares.items())
    console.print(f"\n{bar}  goodput {_percent(record.last.get('time/goodput'))} of {duration(wall)}")
    told = [f"[{SHADES[kind]}]■[/] {SPENT[kind][0]} {_percent(share)}" for kind, share in shares.items() if share]
    for start in range(0, len(told), 3):
        console.print("  ".join(told[start : start + 3]))


def _print_evaluations(console: rich.console.Console, record: Record) -> None:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for heading in ("evaluation", "last", "best", "chance"):
        table.add_column(heading, justify="left" if heading == "evaluation" else "right")
    for key in record.last:
        points = record.series(key)
        if key.startswith("val/") and points and not key.endswith(("_chance", "bad_samples")) and "/top1_" not in key:
            best = (min if key.endswith("loss") else max)(value for _, value in points)
            luck = record.last.get(f"{key}_chance")
            table.add_row(key.removeprefix("val/"), _four(points[-1][1]), _four(best), _four(luck))
    if table.rows:
        console.print()
        console.print(table)


def compare_runs(first: Path, second: Path) -> None:
    """Print the keys in which two runs differ, and what came of it. Raises ConfigError for a path that is no run."""
    records = [read_record(first), read_record(second)]
    table = Table(box=None, header_style="dim", pad_edge=False)
    for heading in ("", *(str(record.path) for record in records)):
        table.add_column(escape(heading), overflow="fold")
    for part in ("config", "environment"):
        for key, row in differing(records, part).items():
            table.add_row(key, *(escape(masked(str(value))) for value in row))
    table.add_section()
    keys = dict.fromkeys(key for record in records for key in record.last if key.startswith("val/"))
    for key in ("train/loss", "train/samples_per_s", "time/goodput", *keys):
        if not key.endswith(("_chance", "bad_samples")) and "/top1_" not in key:
            table.add_row(key, *(_four(record.last.get(key)) for record in records))
    rich.console.Console().print(table)


def exit_code(path: Path) -> int:
    """Print the exit code of a run, and return it: what its ``result.json`` says, 1 for one that was killed or that
    has not ended. Raises ConfigError for a path that is no run."""
    record = read_record(path)
    code = record.result.get("exit_code")
    if not isinstance(code, int):
        code = int(ExitCode.FAILED)
        what = "is being trained" if is_busy(path) else "was killed, or never started"
        print(f"{path} {what}: it has no result.json", file=sys.stderr)
    print(code)
    return code


def _summary(record: Record) -> dict[str, object]:
    key, value = record.objective
    return {
        "path": str(record.path), "name": record.name, "state": record.state,
        "exit_code": record.result.get("exit_code"), "samples_seen": record.samples_seen,
        "total_samples": record.config.get("total_samples"), "objective": {key: value},
        "goodput": record.last.get("time/goodput"), "starts": len(record.starts),
    }  # fmt: skip


def _state(record: Record) -> str:
    colour = COLOURS.get(record.state, "red")
    return f"[{colour}]{record.state}[/{colour}]"


def _four(value: float | None) -> str:
    return "" if value is None else f"{value:,.4f}"


def _three(value: float | None) -> str:
    return "" if value is None else number(float(f"{value:.3g}"))


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{1000 * value:,.3g} ms" if value < 1 else duration(value)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _size(value: float | None) -> str:
    return "" if value is None else size(value)
