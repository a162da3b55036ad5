"""Vectors of images on disk: parts of a fixed list, memory-mapped, with a line of JSON for every row.

A directory of vectors holds ``vectors.json``, written last, and for every part ``parts/NNNNNN.images.npy`` [n, D],
``parts/NNNNNN.texts.npy`` [n, D] where captions were embedded too, and ``parts/NNNNNN.rows.jsonl``, n lines. Rows stand
in the order of the source; what could not be used is no row, and is listed in ``unusable.csv``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from clipscale.errors import DataError

FORMAT = 1
SUMMARY, PARTS, UNUSABLE = "vectors.json", "parts", "unusable.csv"
IMAGES, TEXTS, ROWS = "images.npy", "texts.npy", "rows.jsonl"
MAPPED = 4096  # files that are kept mapped at a time


class Row(NamedTuple):
    """What is known of a row beside its vectors: the place in the source, the key there, the file, the caption."""

    place: int
    key: str
    path: str
    caption: str


class Part(NamedTuple):
    """One part: its name, its rows, and the size in bytes of each of its files, by suffix."""

    name: str
    rows: int
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class Made:
    """What vectors were made of: the model as it was named and a digest of its weights; the source as it was named and
    the ``KEY=VALUE`` it was read with; reasons and numbers of what could not be used."""

    model: str
    weights: str
    source: str
    overrides: list[str]
    dim: int
    dtype: str
    texts: bool
    unusable: dict[str, int]


class Vectors:
    """The rows of a directory. Raises DataError for one that holds none, is unfinished or is damaged."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            told: dict[str, Any] = json.loads((directory / SUMMARY).read_text())
        except FileNotFoundError:
            raise DataError(_absent(directory)) from None
        except (OSError, ValueError) as error:
            raise DataError(f"{directory / SUMMARY} cannot be read: {error}") from None
        try:
            if told.pop("format") != FORMAT:
                raise DataError(f"{directory} holds vectors of another format: make them anew with clipscale embed")
            self.parts = [Part(*part) for part in told.pop("parts")]
            self.made = Made(**told)
        except (KeyError, TypeError):
            raise DataError(f"{directory / SUMMARY} is damaged; the command that wrote it mends it") from None
        self._mapped, self._line_ends = lru_cache(MAPPED)(_map), lru_cache(MAPPED)(_find_line_ends)
        self._starts = np.cumsum([0, *(part.rows for part in self.parts)])
        for part in self.parts:
            for suffix, size in part.sizes.items():
                path = self._path(part, suffix)
                if not path.is_file() or path.stat().st_size != size:
                    raise DataError(f"{path} is not there, or not whole; the command that wrote it mends it")

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def has_texts(self) -> bool:
        """Whether captions were embedded too."""
        return self.made.texts

    def chunks(self, kind: str = IMAGES) -> Iterator[NDArray[Any]]:
        """The vectors part by part, Float[n, D] mapped from disk, normalised, in order."""
        for part in self.parts:
            if part.rows:
                yield self._mapped(self._path(part, kind))

    def vector(self, number: int, kind: str = IMAGES) -> NDArray[np.float32]:
        """One row's vector, Float32[D]."""
        part, at = self._find(number)
        return self._mapped(self._path(part, kind))[at].astype(np.float32)

    def row(self, number: int) -> Row:
        """What is known of a row. Raises IndexError for a number that is none."""
        part, at = self._find(number)
        path = self._path(part, ROWS)
        ends = self._line_ends(path)
        with path.open("rb") as lines:
            start = int(ends[at - 1]) + 1 if at else 0
            lines.seek(start)
            return Row(*json.loads(lines.read(int(ends[at]) - start)))

    def rows(self) -> Iterator[Row]:
        """All rows in order."""
        for part in self.parts:
            with self._path(part, ROWS).open("rb") as lines:
                yield from (Row(*json.loads(line)) for line in lines)

    def _find(self, number: int) -> tuple[Part, int]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        place = int(np.searchsorted(self._starts, number, "right")) - 1
        return self.parts[place], number - int(self._starts[place])

    def _path(self, part: Part, suffix: str) -> Path:
        return self.directory / PARTS / f"{part.name}.{suffix}"


def summary(made: Made, parts: list[Part]) -> bytes:
    """The content of ``vectors.json``."""
    return json.dumps({"format": FORMAT, **asdict(made), "parts": parts}, indent=1).encode()


def line(row: Row) -> bytes:
    """A row as a line of ``rows.jsonl``; what has no UTF-8 is escaped."""
    return json.dumps(row).encode() + b"\n"


def _absent(directory: Path) -> str:
    if (directory / PARTS).is_dir():
        return f"{directory} is unfinished: the command that began it goes on where it stopped"
    return f"{directory} holds no vectors; make them with clipscale search build MODEL SOURCE --out {directory}"


def _map(path: Path) -> NDArray[Any]:
    try:
        return np.load(path, mmap_mode="c")  # as good as "r", and torch, which knows no read-only tensors, takes it
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _find_line_ends(path: Path) -> NDArray[np.int64]:
    return np.flatnonzero(np.fromfile(path, np.uint8) == ord("\n"))
