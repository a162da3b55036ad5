"""Where the checkpoints of a run lie."""

from __future__ import annotations

import re
from pathlib import Path

from clipscale.checkpoint.manifest import MANIFEST, Stored
from clipscale.config.data import Storage
from clipscale.data.io import ShardStore


def local(path: Path) -> Stored:
    """A checkpoint in a directory."""
    return Stored(str(path), ShardStore(Storage()))


def checkpoints_in(place: str, store: ShardStore) -> list[Stored]:
    """What a directory, or a remote prefix, holds of checkpoints, finished or not, newest first."""
    names = [name for name in store.names(place) if re.fullmatch(r"step_\d+", name)]
    return [Stored(f"{place}/{name}", store) for name in sorted(names, key=lambda name: int(name[5:]), reverse=True)]


def finished_in(place: str, store: ShardStore) -> list[Stored]:
    """The finished ones, newest first; whether they are whole is not looked at."""
    return [stored for stored in checkpoints_in(place, store) if MANIFEST in store.names(stored.location)]
