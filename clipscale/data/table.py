"""Tables of image paths and captions (CSV, TSV) as shards that need no packing; every row is a sample."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from clipscale.data.samples import Member

TABLES = (".csv", ".tsv")
IMAGE_COLUMNS = ("filepath", "image", "image_path", "file_name", "filename", "path")
CAPTION_COLUMNS = ("caption", "title", "text", "description")
CHUNK = 32  # rows that stay together in the order, so that a sorted table is shuffled well

csv.field_size_limit(1 << 24)


def is_table(location: str) -> bool:
    """Whether a location names a table."""
    return location.lower().endswith(TABLES)


def scan_table(raw: BinaryIO) -> tuple[NDArray[np.int64], str]:
    """Where the rows of a table begin: ``(offsets, damage)``, the header left out; a row may span lines."""
    place = 0

    def lines() -> Iterator[str]:
        nonlocal place
        for line in io.BytesIO(raw.read()):
            place += len(line)
            yield line.decode("utf-8", "replace")

    source = lines()
    header = next(source, "")
    columns = _columns(header)
    offsets = [place]
    if _find(columns, IMAGE_COLUMNS) is None:
        return np.array(offsets, dtype=np.int64), (
            f"has no column of image paths, its columns are {', '.join(columns) or 'none'}: call one "
            f"{IMAGE_COLUMNS[0]}, or pack it with clipscale data pack --image-column"
        )
    try:
        for row in csv.reader(source, delimiter=_delimiter(header)):
            if row:
                offsets.append(place)
            else:  # an empty line belongs to no row: the next one begins after it
                offsets[-1] = place
    except csv.Error as error:
        return np.array(offsets, dtype=np.int64), f"unreadable after {len(offsets) - 1} rows: {error}"
    return np.array(offsets, dtype=np.int64), ""


def read_rows(raw: BinaryIO, begin: int, end: int, fetch: Callable[[str], bytes | None]) -> Iterator[Member]:
    """The rows between two places as samples without keys: the image's bytes, ``txt`` and ``json`` (all columns).

    ``fetch`` gives the bytes at an image's path, None where there is nothing.
    """
    header = raw.readline().decode("utf-8", "replace")
    columns = _columns(header)
    image, caption = _find(columns, IMAGE_COLUMNS), _find(columns, CAPTION_COLUMNS)
    assert image is not None, "a table without images has no rows"
    raw.seek(begin)
    text = io.StringIO(raw.read(end - begin).decode("utf-8", "replace"), newline="")
    for row in csv.reader(text, delimiter=_delimiter(header)):
        if not row:
            continue
        fields = dict(zip(columns, row, strict=False))
        path = fields.get(image, "").strip()
        data = fetch(path) if path else None
        members = {"json": json.dumps(fields).encode()}
        if caption is not None and caption in fields:
            members["txt"] = fields[caption].encode()
        if data is not None:
            members[path.rpartition(".")[2].lower()] = data
        yield Member("", members, "" if data is not None else "missing_image")


def _columns(header: str) -> list[str]:
    return next(csv.reader([header.removeprefix("\ufeff")], delimiter=_delimiter(header)), [])


def _find(columns: Sequence[str], usual: Sequence[str]) -> str | None:
    return next((column for name in usual for column in columns if column.strip().lower() == name), None)


def _delimiter(header: str) -> str:
    return "\t" if "\t" in header else ";" if header.count(";") > header.count(",") else ","
