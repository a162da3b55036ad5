"""Weights & Biases. Whatever happens to it, training goes on."""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from clipscale.config.running import Tracking, TrackingMode

INIT_TIMEOUT_S = 30
FINISH_TIMEOUT_S = 60


def read_run_id(run: Path) -> str:
    """The id by which W&B knows a run; empty if it has none yet."""
    file = run / "wandb_id.txt"
    return file.read_text() if file.exists() else ""


def write_run_id(run: Path, run_id: str) -> None:
    """Let a run go on by the id that it has on another machine."""
    (run / "wandb_id.txt").write_text(run_id)


class WandbSink:
    """A view of the run's metrics in W&B: numbers and configuration only.

    ``auto`` is online when there is a key and offline otherwise; an online start that fails goes offline. The run's id
    is kept in the run directory, so that a resumed run goes on in the same place.
    """

    def __init__(self, run: Path, config: Tracking, settings: dict[str, Any], say: Callable[[str], None]) -> None:
        self._say, self._run = say, None
        mode = config.mode
        if mode is TrackingMode.auto:
            try:
                mode = TrackingMode.online if _has_key() else TrackingMode.offline
            except Exception as error:
                say(f"W&B settings cannot be read ({_first_line(error)})")
                mode = TrackingMode.offline
        for attempt in dict.fromkeys((mode, TrackingMode.offline)):
            try:
                self._run = self._start(run, config, settings, attempt.value)
                break
            except Exception as error:
                say(f"W&B {attempt.value} failed ({_first_line(error)}); training goes on")
        if self._run is not None and self._run.settings._offline:
            say(f"W&B is offline; send this run with: wandb sync {self._run.settings.sync_dir}")

    def log(self, row: dict[str, float]) -> None:
        """Send a row; a failure ends the tracking, not the run."""
        if self._run is None:
            return
        try:
            self._run.log(row)
        except Exception as error:
            self._say(f"W&B stopped ({_first_line(error)}); training goes on, see metrics.jsonl")
            self._run = None

    def close(self) -> None:
        """Finish the W&B run."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                self._say(f"W&B could not finish ({_first_line(error)})")

    @staticmethod
    def _start(run: Path, config: Tracking, settings: dict[str, Any], mode: str) -> Any:
        import wandb

        if not read_run_id(run):
            write_run_id(run, secrets.token_hex(4))
        started = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group,
            tags=config.tags,
            name=run.name,
            id=read_run_id(run),
            resume="allow" if mode == "online" else None,
            dir=run,
            config=settings,
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(
                init_timeout=INIT_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
                finish_timeout_raises=True,
                silent=True,
                console="off",
                disable_git=True,
                x_disable_meta=True,
            ),
        )
        started.define_metric("samples_seen")
        started.define_metric("*", step_metric="samples_seen")
        return started


def _has_key() -> bool:
    import wandb

    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(wandb.Settings().base_url).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
