"""What lies below a folder, with nothing left out silently."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from clipscale.errors import DataError

HIDDEN = (".", "__MACOSX", "lost+found")  # what names begin with that are nobody's images


def files_below(root: Path) -> Iterator[tuple[str, bool]]:
    """Paths of all below ``root`` that is no folder, and whether it is a file that is there: a link may lead nowhere.

    Hidden names are passed over. Links to folders are followed, but for those that lead back to where they lie. Raises
    DataError for a folder that cannot be read.
    """
    yield from _walk(str(root), "", frozenset())


def _walk(folder: str, inside: str, above: frozenset[str]) -> Iterator[tuple[str, bool]]:
    if (real := os.path.realpath(folder)) in above:
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise DataError(
            f"{folder} cannot be read: {error.strerror}; what lies in it would be left out: let it be read, or move it"
        ) from None
    for entry in entries:
        if entry.name.startswith(HIDDEN):
            continue
        linked = entry.is_symlink()  # os.path has no error for a link that leads nowhere, or to itself
        if os.path.isdir(entry.path) if linked else entry.is_dir():
            yield from _walk(entry.path, f"{inside}{entry.name}/", above | {real})
        else:
            yield inside + entry.name, os.path.isfile(entry.path) if linked else entry.is_file()
