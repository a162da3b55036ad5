"""What a run directory says of its run, without the model: for lists, comparisons and reports."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from clipscale.config.rundir import is_busy, read_events, read_result, read_rows, unix_time
from clipscale.errors import ConfigError, ExitCode, masked

STATES = {
    ExitCode.DONE: "done", ExitCode.PREEMPTED: "preempted", ExitCode.DIVERGED: "diverged",
    ExitCode.DATA_BUDGET: "data budget exceeded",
}  # fmt: skip
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Record:
    """A run on disk, of whatever version of clipscale, finished or not."""

    path: Path

    @property
    def name(self) -> str:
        """The directory's."""
        return self.path.resolve().name

    @cached_property
    def result(self) -> dict[str, Any]:
        """``result.json``; empty while a run is trained, and after a kill."""
        found = read_result(self.path)
        return found if isinstance(found, dict) else {}

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """``metrics.jsonl``, of those rows that say where they belong."""
        rows = read_rows(self.path / "metrics.jsonl")
        return [row for row in rows if isinstance(row.get("samples_seen"), int)]

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """``events.jsonl``."""
        return read_events(self.path)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration, by dotted key."""
        return _flat(_read_yaml(self.path / "config.yaml"))

    @cached_property
    def overrides(self) -> list[str]:
        """What the last command said."""
        file = self.path / "overrides.txt"
        return [masked(line) for line in file.read_text().splitlines()] if file.exists() else []

    @cached_property
    def environment(self) -> dict[str, Any]:
        """``environment.json``, flat."""
        return _flat(_read_json(self.path / "environment.json"))

    @cached_property
    def examples(self) -> dict[str, Any]:
        """``examples.json``: what the last evaluation saw and said; empty without one."""
        return _read_json(self.path / "examples.json")

    @cached_property
    def state(self) -> str:
        """``running``, ``done``, ``preempted``, ``diverged``, ``data budget exceeded``, ``failed``, ``stopped`` (it was
        killed) or ``new`` (it never started)."""
        if self.result:
            return STATES.get(self.result.get("exit_code"), "failed")  # type: ignore[arg-type]
        if is_busy(self.path):
            return "running"
        return "stopped" if self.starts else "new"

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The events of its starts."""
        return [event for event in self.events if event["event"] == "started"]

    @cached_property
    def last(self) -> dict[str, float]:
        """The last value of every metric."""
        values: dict[str, float] = {}
        for row in [*self.rows, self.result.get("metrics") or {}]:
            values |= {key: value for key, value in row.items() if "/" in key and _is_number(value)}
        return values

    @property
    def samples_seen(self) -> int:
        """Samples trained on, as far as rows tell."""
        return max((row["samples_seen"] for row in self.rows), default=0)

    @property
    def objective(self) -> tuple[str, float | None]:
        """Name and value of what a sweep maximises."""
        key = str(self.config.get("eval.objective", ""))
        return key, self.last.get(key)

    def series(self, key: str) -> Points:
        """A metric over samples seen."""
        return [(row["samples_seen"], row[key]) for row in self.rows if _is_number(row.get(key))]

    def age_s(self) -> float:
        """Seconds since anything was written of it."""
        times = [unix_time(event["time"]) for event in self.events[-1:]]
        file = self.path / "metrics.jsonl"
        times += [file.stat().st_mtime] if file.exists() else []
        return time.time() - max(times, default=time.time())


def read_record(path: Path) -> Record:
    """The record of a run. Raises ConfigError for a path that is none."""
    if not (path / "config.yaml").exists():
        raise ConfigError(
            f"{path} is no run: a run directory holds config.yaml; `clipscale runs ls DIR` lists the runs"
        )
    return Record(path)


def find_records(directory: Path) -> list[Record]:
    """The runs below a directory, at any depth, by the time of the last thing that was written of each.

    Raises ConfigError if there is none.
    """
    found = [Record(file.parent) for file in sorted(directory.rglob("config.yaml")) if (file.parent / "logs").is_dir()]
    if not found:
        raise ConfigError(f"{directory} holds no runs; name the directory that runs_dir=… named (runs by default)")
    return sorted(found, key=Record.age_s, reverse=True)


def differing(records: Sequence[Record], part: str = "config") -> dict[str, list[Any]]:
    """The keys of ``config`` or ``environment`` in which runs differ, with the value of each run."""
    tables: list[Mapping[str, Any]] = [getattr(record, part) for record in records]
    keys = dict.fromkeys(key for table in tables for key in table)
    values = {key: [table.get(key) for table in tables] for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row[1:])}


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict) or not node:
        return {prefix.removesuffix("."): masked(node) if isinstance(node, str) else node} if prefix else {}
    return {key: value for name, part in node.items() for key, value in _flat(part, f"{prefix}{name}.").items()}


def _read_yaml(file: Path) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.load(file))
    except Exception:  # whatever is in it: a report shows what there is
        return {}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
