"""Weights & Biases, in a thread of its own. Whatever happens to it, training goes on, and does not wait."""

from __future__ import annotations

import logging
import netrc
import os
import queue
import secrets
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from clipscale.config.rundir import read_rows
from clipscale.config.running import Tracking, TrackingMode
from clipscale.errors import masked
from clipscale.telemetry.alerts import Alert, Alerts, of_error
from clipscale.telemetry.code import changes, commit

if TYPE_CHECKING:
    from clipscale.telemetry.pictures import Picture

INIT_TIMEOUT_S = 15
FINISH_TIMEOUT_S = 15
UPLOAD_TIMEOUT_S = 3600.0  # of a checkpoint that it was asked to send
PATIENCE_S = 22.0  # for all that is left to do when the run ends; leaving the process may take W&B a while more
LOOK_EVERY_S = 5.0
MOST_WAITING = 10_000  # rows that wait for a tracker that has not begun
log = logging.getLogger("clipscale")
Task = Callable[["_Session"], None]


def read_run_id(run: Path) -> str:
    """The id by which W&B knows a run; empty if it has none yet."""
    file = run / "wandb_id.txt"
    return file.read_text() if file.exists() else ""


def write_run_id(run: Path, run_id: str) -> None:
    """Let a run go on by the id that it has on another machine."""
    (run / "wandb_id.txt").write_text(run_id)


class WandbSink:
    """A view of the run's metrics in W&B: numbers and configuration, and what else the configuration allows.

    ``auto`` is online when there is a key and offline otherwise; an online start that fails goes offline. The run's id
    is kept in the run directory, so that a resumed run goes on in the same place. All of it happens in a thread, for
    which :meth:`close` alone waits, ``PATIENCE_S`` at most (longer if checkpoints are to be sent).
    """

    def __init__(self, run: Path, config: Tracking, settings: Mapping[str, Any], say: Callable[[str], None]) -> None:
        # Its reports of its own errors go to a third party, and without a network each end of a process waits for them.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        if not read_run_id(run):
            write_run_id(run, secrets.token_hex(4))
        self._inbox: queue.Queue[Task | None] = queue.Queue(MOST_WAITING)
        self._session = _Session(run, config, settings, say)
        self._say, self._sends_checkpoints = say, config.checkpoints
        self.begun = threading.Event()
        """Set once W&B has begun, or was given up."""
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, row: Mapping[str, float]) -> None:
        """Send a row; never waits, and a failure ends the tracking, not the run."""
        self._put(lambda session: session.log(row))

    def show(self, pictures: Mapping[str, list[Picture]], samples_seen: int) -> None:
        """Send pictures by name; the caller has seen to it that they may be."""
        self._put(lambda session: session.show(pictures, samples_seen))

    def close(self, error: BaseException | None = None, checkpoint: str | None = None) -> None:
        """Finish: with the error that ended the run, if one did, and the place of its newest checkpoint."""
        self._put(lambda session: session.finish(error, checkpoint))
        self._put(None)
        self._thread.join(PATIENCE_S + (UPLOAD_TIMEOUT_S if self._sends_checkpoints else 0.0))
        if self._thread.is_alive():
            self._say(f"W&B does not answer, and is left alone; {self._session.how_to_sync()}")

    def _put(self, task: Task | None) -> None:
        try:
            self._inbox.put_nowait(task)
        except queue.Full:
            log.warning("W&B takes nothing; a row was dropped, metrics.jsonl has it")

    def _work(self) -> None:
        self._session.begin()
        self.begun.set()
        while True:
            try:
                task = self._inbox.get(timeout=LOOK_EVERY_S)
            except queue.Empty:
                self._session.do(_Session.watch)
                continue
            if task is None:
                return
            self._session.do(task)


class _Session:
    """What the thread does: W&B's own run, if there is one."""

    def __init__(self, path: Path, config: Tracking, settings: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self._path, self._config, self._settings, self._say = path, config, settings, say
        self._run: Any = None
        self._alerts = Alerts(path)
        self._sent = self._sent_before()

    def begin(self) -> None:
        """Start W&B's run: as asked, or else offline."""
        mode = self._config.mode
        if mode is TrackingMode.auto:
            try:
                mode = TrackingMode.online if has_key() else TrackingMode.offline
            except Exception as error:
                self._say(f"W&B settings cannot be read ({_first_line(error)})")
                mode = TrackingMode.offline
        for attempt in dict.fromkeys((mode, TrackingMode.offline)):
            try:
                self._run = self._start(attempt.value)
                break
            except Exception as error:
                self._say(f"W&B {attempt.value} failed ({_first_line(error)}); training goes on")
                _forget_all()
        if self._config.code:
            self.do(_Session.send_changes)
        if self._run is not None and self._run.settings._offline:
            self._say(f"W&B is offline; send this run with: wandb sync {self._run.settings.sync_dir}")

    def do(self, task: Task) -> None:
        """Do something that may fail: then this was all."""
        if self._run is None:
            return
        try:
            task(self)
        except Exception as error:
            self._say(f"W&B stopped ({_first_line(error)}); training goes on, see metrics.jsonl")
            self._run = None

    def log(self, row: Mapping[str, float]) -> None:
        """Send a row, unless one of its kind that is as far along was sent: the x-axis never goes back."""
        kind, seen = "val" if any(key.startswith("val/") for key in row) else "train", int(row["samples_seen"])
        self._alerts.row()
        if seen > self._sent.get(kind, -1):
            self._sent[kind] = seen
            self._run.log(dict(row))
        self.watch()

    def show(self, pictures: Mapping[str, list[Picture]], samples_seen: int) -> None:
        """Send pictures."""
        import wandb

        found = {
            f"media/{name}": [wandb.Image(one.image, caption=one.caption) for one in several]
            for name, several in pictures.items()
        }
        self._run.log({"samples_seen": samples_seen, **found})

    def send_changes(self) -> None:
        """Send what was changed in the code since its commit."""
        import wandb

        if patch := masked(changes()):
            artifact = wandb.Artifact(f"code-{read_run_id(self._path)}", type="code")
            with artifact.new_file("changes.patch") as file:
                file.write(patch)
            self._run.log_artifact(artifact)

    def watch(self) -> None:
        """Tell of what has come up in the run."""
        for alert in self._alerts.new():
            self._alert(alert)

    def finish(self, error: BaseException | None, checkpoint: str | None) -> None:
        """End W&B's run."""
        self.watch()
        if error is not None:
            self._alert(of_error(error))
        if checkpoint is not None and self._config.checkpoints:
            self._send_checkpoint(checkpoint)
        try:
            self._run.finish(exit_code=int(error is not None))
        except Exception as problem:
            self._say(f"W&B could not finish ({_first_line(problem)}); {self.how_to_sync()}")

    def how_to_sync(self) -> str:
        """What to do about rows that were not sent."""
        found = sorted(self._path.glob("wandb/*run-*"))
        return f"send the rest with: wandb sync {found[-1]}" if found else "metrics.jsonl has all rows"

    def _alert(self, alert: Alert) -> None:
        if self._config.alerts:
            self._run.alert(title=alert.title, text=alert.text, level=alert.level)

    def _send_checkpoint(self, place: str) -> None:
        import wandb

        artifact = wandb.Artifact(f"checkpoint-{read_run_id(self._path)}", type="model")
        if "://" in place:
            artifact.add_reference(place, checksum=False)
        else:
            artifact.add_dir(place)
        self._run.log_artifact(artifact)

    def _sent_before(self) -> dict[str, int]:
        """How far the rows of earlier attempts went, also those that a resume has set aside, by kind."""
        sent: dict[str, int] = {}
        for name in ("metrics.jsonl", "metrics.discarded.jsonl"):
            for row in read_rows(self._path / name):
                kind, seen = "val" if any(key.startswith("val/") for key in row) else "train", row.get("samples_seen")
                if isinstance(seen, int):
                    sent[kind] = max(sent.get(kind, -1), seen)
        return sent

    def _start(self, mode: str) -> Any:
        import wandb

        config = self._config
        started = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group,
            job_type=config.job_type,
            tags=config.tags,
            name=self._path.name,
            id=read_run_id(self._path),
            resume="allow" if mode == "online" else None,
            dir=self._path,
            config={**self._settings, **({"code.commit": commit()} if config.code else {})},
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(
                init_timeout=INIT_TIMEOUT_S,
                finish_timeout=UPLOAD_TIMEOUT_S if config.checkpoints else FINISH_TIMEOUT_S,
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


def _forget_all() -> None:
    """End W&B's own process: it holds on to the id of a run that could not begin."""
    import wandb

    with suppress(Exception):
        wandb.teardown()


def server() -> str:
    """The address of W&B's server, as its settings files and the environment have it."""
    import wandb

    settings = wandb.Settings()  # which knows of neither by itself
    settings.update_from_system_settings()
    settings.update_from_env_vars(dict(os.environ))
    return settings.base_url


def has_key() -> bool:
    """Whether there is a key for it, in the environment or in netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(server()).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
