"""Which code a run runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

PATIENCE_S = 5.0
MOST = 200_000  # characters of changes


def commit() -> str | None:
    """Of the repository that clipscale lies in, or else the current directory; None for neither. Never raises."""
    return next(filter(None, (_git(place, "rev-parse", "HEAD") for place in _places())), None)


def changes() -> str:
    """What was changed in that repository since its commit, as a patch; empty without one. Never raises."""
    place = next((place for place in _places() if _git(place, "rev-parse", "HEAD")), None)
    return _git(place, "diff", "HEAD")[:MOST] if place is not None else ""


def _places() -> tuple[Path, Path]:
    return Path(__file__).parent, Path.cwd()


def _git(place: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(place), *words], capture_output=True, timeout=PATIENCE_S)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else ""
