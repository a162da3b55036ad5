"""The run directory: its name, its recorded configuration, and whether a command may go on with it."""

from __future__ import annotations

import calendar
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from clipscale.config.compose import load_config, save_config
from clipscale.config.fields import Resume
from clipscale.config.resume import differences, identity
from clipscale.config.schema import Config
from clipscale.config.validate import default_streams, validate
from clipscale.errors import BusyError, ConfigError, ExitCode


@dataclass
class Run:
    """A run on disk, ready to be trained by processes that read ``path/config.yaml``."""

    path: Path
    config: Config
    changes: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Event keys that differ from the recorded configuration, as ``(before, now)``."""


def open_run(
    config: Config,
    experiment: str,
    overrides: Sequence[str],
    world: int = 1,
    elsewhere: Callable[[Config], bytes | None] = lambda config: None,
    again: bool = False,
) -> Run:
    """Create the run's directory, or join it if it exists, and record the configuration; ``world`` processes begin it.

    ``elsewhere`` finds the configuration of a run that has begun on another machine. What the attempt before said of
    its end stays where the same command is started ``again``.

    Raises ConfigError when the configuration cannot be run, when a fixed key differs from what the directory records,
    or when it cannot be written.
    """
    if config.model.classes is not None:
        raise ConfigError(
            "model.classes is recorded by loss=cross_entropy, from data.zeroshot.classes=FILE.json; leave "
            "model.classes out"
        )
    validate(config, world)
    if config.name is None:
        config.name = f"{experiment}-{identity(config)}"
    run = Run(Path(config.runs_dir, config.name), config)
    recorded = run.path / "config.yaml"
    if run.path.is_dir():
        lock(run.path).close()  # a run that is being trained is left as it is
        if not again:
            (run.path / "result.json").unlink(missing_ok=True)
    if recorded.exists() and count_events(run.path, "started"):  # one that never began may be corrected freely
        _join(run, load_config(recorded))
    elif config.checkpoint.dir is not None and (text := elsewhere(config)) is not None:
        run.path.mkdir(parents=True, exist_ok=True)
        recorded.write_bytes(text)
        _join(run, load_config(recorded))
    else:
        config.data.streams = config.data.streams or default_streams(config.global_batch_size, world)
    validate(config, world)
    try:
        (run.path / "logs").mkdir(parents=True, exist_ok=True)
        save_config(config, recorded)
        (run.path / "overrides.txt").write_text("".join(f"{override}\n" for override in overrides))
    except OSError as error:
        raise ConfigError(f"{run.path} cannot be written ({error.strerror}); set runs_dir or name") from None
    for key, (before, now) in run.changes.items():
        log_event(run.path, "config_changed", key=key, before=before, now=now)
    return run


def _join(run: Run, stored: Config) -> None:
    config = run.config
    changed = differences(stored, config)
    if changed[Resume.fixed]:
        lines = "".join(f"\n  {key}: {a!r} in the run, {b!r} now" for key, (a, b) in changed[Resume.fixed].items())
        raise ConfigError(f"{run.path} is a run of another configuration; choose another name=…{lines}")
    if config.total_samples < stored.total_samples:
        raise ConfigError(
            f"total_samples={config.total_samples} is less than the {stored.total_samples} of {run.path}; "
            "choose another name=… for a shorter run"
        )
    before = stored.checkpoint.dir
    if config.checkpoint.dir != before and config.checkpoint.resume_from is None:
        here, key = (run.path, "null") if before is None else (f"{before}/{run.path.name}", before)
        raise ConfigError(
            f"checkpoint.dir={config.checkpoint.dir}, but the checkpoints of {run.path} lie in {here}; use "
            f"checkpoint.dir={key}, or go on from those: checkpoint.resume_from={here}"
        )
    config.data.streams, config.data.window = stored.data.streams, stored.data.window
    config.model.text.hf_config = stored.model.text.hf_config
    config.model.classes = stored.model.classes
    run.changes = changed[Resume.event]


def log_event(path: Path, event: str, **details: Any) -> None:
    """Append a line to the run's ``events.jsonl``."""
    row = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event, **details}
    append_rows(path / "events.jsonl", [row])


def append_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append JSON lines by a single write, so that a kill does not leave half of one."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with file.open("ab", buffering=0) as raw:
        raw.write(text.encode())


def append_of_rank(path: Path, folder: str, rank: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append JSON lines to ``RUN/folder/rank*.jsonl``, of which each rank has its own."""
    (path / folder).mkdir(exist_ok=True)
    append_rows(path / folder / f"rank{rank}.jsonl", rows)


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines, if there is one; a line that is none, or was cut by a kill, is left out."""
    if file.exists():
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                with suppress(ValueError):
                    if isinstance(row := json.loads(line), dict):
                        yield row


def read_events(path: Path) -> list[dict[str, Any]]:
    """The rows of the run's ``events.jsonl`` that have a time and a name, oldest first."""
    found = []
    for row in read_rows(path / "events.jsonl"):
        with suppress(ValueError, KeyError, TypeError):
            unix_time(row["time"])
            found.append(row | {"event": str(row["event"])})
    return found


def unix_time(text: str) -> float:
    """Seconds since 1970 of a time as ``events.jsonl`` has it. Raises ValueError or TypeError for what is none."""
    return float(calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")))


def count_events(path: Path, event: str) -> int:
    """How often an event is in the run's ``events.jsonl``."""
    return sum(row["event"] == event for row in read_events(path))


def lock(path: Path) -> IO[str]:
    """Hold the run against a second process; the lock goes with the returned file. Raises BusyError if held."""
    try:
        file = (path / ".lock").open("a+")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); set runs_dir or name") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        raise BusyError(f"{path} is being trained by process {file.read().strip()}; wait, or choose name=…") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def is_busy(path: Path) -> bool:
    """Whether a process holds the run's lock now."""
    try:
        with (path / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go as the file is closed
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def write_result(path: Path, status: str, exit_code: int, *, first: bool = False, **details: Any) -> bool:
    """Write ``result.json``; with ``first`` only if there is none. Returns whether it was written."""
    content = json.dumps({"status": status, "exit_code": exit_code, **details}, indent=2) + "\n"
    target = path / "result.json"
    scratch = path / f".result.{os.getpid()}.tmp"
    scratch.write_text(content)
    try:
        if first:
            os.link(scratch, target)  # fails if another rank was there before
        else:
            scratch.replace(target)
    except FileExistsError:
        return False
    finally:
        scratch.unlink(missing_ok=True)
    return True


def report(path: Path | None, text: str, code: ExitCode = ExitCode.FAILED) -> ExitCode:
    """Tell why a run failed, on stderr and in ``result.json``, unless another rank has done so: the first to fail
    speaks for all, and its exit code, which is returned, is that of all."""
    try:
        if path is not None and (before := read_result(path)) and before["status"] != "failed":
            (path / "result.json").unlink(missing_ok=True)  # of an attempt before this one
        speaks = path is None or not path.is_dir() or write_result(path, "failed", code, first=True, error=text)
    except OSError:  # a full disk, and perhaps the very error
        speaks = True
    if speaks or path is None:
        print(f"error: {text}", file=sys.stderr, flush=True)
        return code
    return ExitCode((read_result(path) or {"exit_code": code})["exit_code"])


def ended_on_purpose(path: Path) -> ExitCode | None:
    """The exit code of a run whose error would come again; None of all others."""
    result = read_result(path)
    if result is None or result["status"] != "failed" or result["exit_code"] == ExitCode.FAILED:
        return None
    return ExitCode(result["exit_code"])


def read_result(path: Path) -> dict[str, Any] | None:
    """What ``result.json`` says, or None."""
    try:
        return json.loads((path / "result.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
