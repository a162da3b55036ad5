"""Questions of which images go with a word, in the layout of WinoGAViL."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipscale.data.collections import About
from clipscale.data.questions import ImageFiles, find_image_file
from clipscale.errors import DataError

COLUMNS = ("cue", "candidates", "associations")
FOLDERS = ("images", "winogavil_images")
LAYOUT = f"a .csv with the columns {', '.join(COLUMNS)}"


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


def association_table(where: str) -> Path | None:
    """The table of questions that ``where`` is, or that lies in this directory; None where there is none.

    Raises DataError where there are several.
    """
    place = os.path.expanduser(where)
    listed = sorted(Path(place).glob("*.csv")) if os.path.isdir(place) else [Path(place)]
    found = [
        path for path in listed if os.path.isfile(path) and path.suffix == ".csv" and set(COLUMNS) <= _header(path)
    ]
    if len(found) > 1:
        raise DataError(f"{where} holds questions in {found[0].name} and in {found[1].name}; name one of these files")
    return found[0] if found else None


def open_associations(table: Path) -> Associations:
    """Open a ``.csv`` of the columns ``cue candidates associations``; the last two hold JSON lists of image names, the
    second of those that go with the cue.

    Images lie beside it in ``images`` or ``winogavil_images``, else in its own directory; names may lack their suffix.
    Raises DataError, in one line, for what is not there or is of another layout.
    """
    folder = next((table.parent / name for name in FOLDERS if (table.parent / name).is_dir()), table.parent)
    paths: dict[str, Path] = {}
    places: dict[Path, int] = {}
    questions = []
    for number, row in _rows(table):
        try:
            cue, names, chosen = _question(row)
        except ValueError as error:
            raise DataError(f"{table}, row {number}: {error}") from None
        for name in names:
            if name not in paths:
                paths[name] = find_image_file(folder, name, table)
        numbers = tuple(places.setdefault(paths[name], len(places)) for name in names)
        if len(set(numbers)) < len(numbers):
            raise DataError(f"{table}, row {number}: an image is named twice")
        questions.append(Association(cue, numbers, tuple(name in chosen for name in names)))
    if not questions:
        raise DataError(f"{table} holds no questions")
    return Associations(list(places), questions)


def _header(file: Path) -> set[str]:
    try:
        with file.open(encoding="utf-8-sig", errors="replace", newline="") as text:
            return set(next(csv.reader(text), []))
    except (OSError, csv.Error):
        return set()


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as text:
            yield from enumerate(csv.DictReader(text), start=1)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{table} cannot be read: {error}") from None


def _question(row: dict[str, Any]) -> tuple[str, list[str], list[str]]:
    """Cue, candidates and associations of a row. Raises ValueError with what is wrong."""
    cue = (row["cue"] or "").strip()
    names, chosen = (_names(row, column) for column in COLUMNS[1:])
    if not cue:
        raise ValueError("the cue is empty")
    if not chosen:
        raise ValueError("no association")
    if strange := sorted(set(chosen) - set(names)):
        raise ValueError(f"{strange[0]} is none of the candidates")
    return cue, names, chosen


def _names(row: dict[str, Any], column: str) -> list[str]:
    try:
        found = json.loads(row[column] or "[]")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise ValueError(f'{column} is no JSON list of names, such as ["owl", "moon"]')
    return [str(name) for name in found]
