"""Where the checkpoints of a run lie, and which of them stay."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from clipscale.checkpoint.manifest import CHUNK, MANIFEST, DamagedError, Saved, Stored, read_manifest
from clipscale.config import Config
from clipscale.config.data import Storage
from clipscale.data.io import ShardStore, resolve
from clipscale.errors import MissingError

CHECKPOINTS = "checkpoints"  # in a run's directory, or where else they lie
PINNED = "PINNED"  # a file that keeps its checkpoint
_STEP = re.compile(r"step_\d+")


def home(config: Config) -> str:
    """The directory or remote prefix in which a run has its checkpoints, and its configuration beside them."""
    assert config.name is not None, "open_run gives the run its name"
    if config.checkpoint.dir is None:
        return str(Path(config.runs_dir, config.name))
    return resolve(config.name, config.checkpoint.dir)


def fetch(stored: Stored, into: Path) -> Path:
    """Copy a remote checkpoint into a directory of checkpoints, unless it is there; returns where it is.

    Raises DamagedError when what came is not what was written.
    """
    manifest, text, there = stored.manifest(), read_manifest(stored), into / stored.name
    known = there / MANIFEST
    if not known.exists() or known.read_bytes() != text:
        known.unlink(missing_ok=True)
        there.mkdir(parents=True, exist_ok=True)
        for name in manifest.files:
            with stored.open(name) as source, (there / name).open("wb") as target:
                shutil.copyfileobj(source, target, CHUNK)
        if problem := local(there).damage(manifest):
            raise DamagedError(f"checkpoint {stored.location} is damaged: {problem}; name an older one")
        stored.store.write(str(known), text)
    return there


def recorded_config(config: Config) -> bytes | None:
    """The configuration that lies with the checkpoints of a run, where its own directory has none; None if none does.

    Raises DataError when it cannot be asked for.
    """
    store = ShardStore(config.storage)
    try:
        with store.open_stored(f"{home(config)}/config.yaml") as file:
            return file.read()
    except MissingError:
        return None


def local(path: Path) -> Stored:
    """A checkpoint in a directory."""
    return Stored(str(path), ShardStore(Storage()))


def checkpoints_in(place: str, store: ShardStore) -> list[Stored]:
    """What a directory, or a remote prefix, holds of checkpoints, finished or not, newest first."""
    names = [name for name in store.names(place) if _STEP.fullmatch(name)]
    return [Stored(f"{place}/{name}", store) for name in sorted(names, key=lambda name: int(name[5:]), reverse=True)]


def finished_in(place: str, store: ShardStore) -> list[Stored]:
    """The finished ones, newest first; whether they are whole is not looked at."""
    return [stored for stored in checkpoints_in(place, store) if MANIFEST in store.names(stored.location)]


def is_checkpoint(where: str) -> bool:
    """Whether a location is named as one checkpoint."""
    return _STEP.fullmatch(where.rpartition("/")[2]) is not None


def finished_at(where: str, store: ShardStore) -> list[Stored]:
    """The finished ones of a run, newest first, or the one that ``where`` is itself."""
    where = where.rstrip("/")
    if not is_checkpoint(where):
        return finished_in(f"{where}/{CHECKPOINTS}", store)
    return [Stored(where, store)] if MANIFEST in store.names(where) else []


def superseded(place: str, store: ShardStore, keep_last: int, newest: Saved, behind: int = 0) -> Iterable[Stored]:
    """What may go now that ``newest`` is finished: all but the last, the best, those kept for good and pinned ones, the
    newest that is ``behind`` steps old, and the oldest younger one, which will be."""
    finished = finished_in(place, store)
    younger = [stored for stored in finished if stored.step > newest.step - behind]
    kept = {stored.name for stored in finished[:keep_last] + finished[len(younger) :][:1] + younger[-1:]}
    for old in checkpoints_in(place, store):
        is_best = old.step == newest.best_step
        if old.name not in kept and not is_best and not _is_for_good(old):
            yield old


def _is_for_good(stored: Stored) -> bool:
    names = stored.store.names(stored.location)
    if PINNED in names or MANIFEST not in names:
        return PINNED in names
    try:
        saved = stored.manifest().saved
    except DamagedError:
        return False
    return 0 < saved.kept_at == saved.samples_seen
