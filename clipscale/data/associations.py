"""Questions of which images go with a word, in the layout of WinoGAViL."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipscale.data.collections import About
from clipscale.data.questions import ImageFiles, find_image
from clipscale.errors import DataError

COLUMNS = ("cue", "candidates", "associations")
FOLDERS = ("images", "winogavil_images")


@dataclass(frozen=True)
class Association:
    """A word, the places of the images to choose from, and which of these go with it."""

    cue: str
    candidates: tuple[int, ...]
    right: tuple[bool, ...]


class Associations(ImageFiles):
    """The images of such questions, and the questions."""

    def __init__(self, paths: Sequence[Path], questions: Sequence[Association]) -> None:
        super().__init__(paths)
        self.about = About(kind="associations")
        self.questions = questions


def association_table(where: Path) -> Path | None:
    """The table of questions in a directory; None where there is none."""
    return next((file for file in sorted(where.glob("*.csv")) if set(COLUMNS) <= set(_header(file))), None)


def open_associations(where: Path) -> Associations:
    """Open a directory with a ``.csv`` of the columns ``cue candidates associations``; the last two hold JSON lists of
    image names, the second of those that go with the cue.

    Images lie in ``images`` or ``winogavil_images``, else beside the table; names may lack their suffix. Raises
    DataError, in one line, for what is not there or is of another layout.
    """
    table = association_table(where)
    if table is None:
        raise DataError(f"{where} holds no .csv with the columns {', '.join(COLUMNS)}, which WinoGAViL's has")
    folder = next((where / name for name in FOLDERS if (where / name).is_dir()), where)
    places: dict[Path, int] = {}
    questions = []
    for number, cue, names, chosen in _rows(table):
        row = f"{table}, row {number}"
        if not cue.strip() or len(set(names)) < len(names):
            raise DataError(f"{row}: {'an image is named twice' if cue.strip() else 'the cue is empty'}")
        if not chosen or (strange := sorted(set(chosen) - set(names))):
            raise DataError(f"{row}: {f'{strange[0]} is none of the candidates' if chosen else 'no association'}")
        paths = [find_image(folder, name, table) for name in names]
        numbers = tuple(places.setdefault(path, len(places)) for path in paths)
        questions.append(Association(cue.strip(), numbers, tuple(name in chosen for name in names)))
    if not questions:
        raise DataError(f"{table} holds no questions")
    return Associations(list(places), questions)


def _header(file: Path) -> list[str]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            return next(csv.reader(text), [])
    except (OSError, ValueError, csv.Error):
        return []


def _rows(table: Path) -> Iterator[tuple[int, str, list[str], list[str]]]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as text:
            for number, row in enumerate(csv.DictReader(text), start=1):
                names, chosen = (json.loads(row[name] or "[]") for name in COLUMNS[1:])
                if not isinstance(names, list) or not isinstance(chosen, list):
                    raise ValueError(f"row {number}: candidates and associations are lists")
                yield number, row["cue"] or "", [str(name) for name in names], [str(name) for name in chosen]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{table} cannot be read: {error}") from None
