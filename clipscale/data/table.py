"""Tables of image paths and captions (CSV, TSV) as shards that need no packing; every row is a sample."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from clipscale.data.samples import Member
from clipscale.errors import DataError

TABLES = (".csv", ".tsv")
IMAGE_NAMES = ("filepath", "image", "image_path", "file_name", "filename", "path", "img")
CAPTION_NAMES = ("caption", "captions", "title", "text", "description")
CHUNK = 32  # rows that stay together in the order, so that a sorted table is shuffled well

csv.field_size_limit(1 << 30)


def is_table(location: str) -> bool:
    """Whether a location names a table."""
    return location.lower().endswith(TABLES)


def records(lines: Iterable[str], where: str) -> Iterator[list[str]]:
    """The header of a CSV, then its records, each with as many fields; a record may span lines, empty ones are none.

    The delimiter is the one of tab, comma, semicolon and bar that parts the first line into most fields. Raises
    DataError, naming ``where`` and the line, for what is no such table: a guess would lose rows.
    """
    rest, reader, width = iter(lines), csv.reader([]), 0
    try:
        first = next(rest, "")
        counts = {mark: len(next(csv.reader([first], delimiter=mark), [])) for mark in "\t,;|"}
        mark = max(counts, key=counts.__getitem__)
        reader = csv.reader(chain([first], rest), delimiter=mark, strict=True)
        for fields in reader:
            width = width or len(fields)
            if fields and len(fields) != width:
                raise DataError(
                    f"{where} line {reader.line_num:,}: {len(fields)} fields where the header has {width}; put quotes "
                    f"around a field that holds {mark!r}"
                )
            if fields:
                yield fields
    except csv.Error as error:
        raise DataError(
            f"{where} line {reader.line_num:,}: {error}; a quote inside of quotes must be doubled, lines end with \\n"
        ) from None
    except UnicodeDecodeError:
        raise DataError(
            f"{where} is not UTF-8 after line {reader.line_num:,}; convert it, e.g. iconv -f latin1 -t utf-8"
        ) from None


def find_column(columns: Sequence[str], usual: Sequence[str]) -> str | None:
    """The first of the usual names that is among the columns, whatever its case."""
    by_name = {column.strip().lower(): column for column in reversed(columns)}
    return next((by_name[name] for name in usual if name in by_name), None)


def scan_table(raw: BinaryIO, where: str) -> NDArray[np.int64]:
    """Where the rows of a table begin, int64 [rows + 1] in bytes; the header stands before the first one.

    Raises DataError when it has no column of images, or is no table.
    """
    place = 0

    def lines() -> Iterator[str]:
        nonlocal place
        for line in io.BytesIO(raw.read()):
            text = line.decode("utf-8" if place else "utf-8-sig")
            place += len(line)
            yield text

    found = records(lines(), where)
    columns = next(found, [])
    if find_column(columns, IMAGE_NAMES) is None:
        raise DataError(
            f"{where} has no column of image paths, its columns are {', '.join(columns) or 'none'}: call one "
            f"{IMAGE_NAMES[0]}, or pack it with clipscale data pack --image-column"
        )
    return np.array([place, *(place for _ in found)], dtype=np.int64)


def read_rows(
    raw: BinaryIO, header: int, begin: int, end: int, fetch: Callable[[str], bytes | None]
) -> Iterator[Member]:
    """The rows between two places as samples without keys: ``jpg`` (the image), ``txt`` and ``json`` (all columns).

    ``header`` is where the first row begins; ``fetch`` gives the bytes at an image's path, None where there is nothing.
    """
    head = raw.read(header)
    raw.seek(begin)
    text = (head + raw.read(end - begin)).decode("utf-8-sig")
    found = records(io.StringIO(text, newline=""), "the table")
    columns = next(found)
    image, caption = find_column(columns, IMAGE_NAMES), find_column(columns, CAPTION_NAMES)
    assert image is not None, "a table without images has no rows"
    for row in found:
        yield Member("", *row_members(dict(zip(columns, row, strict=True)), image, caption, fetch))


def row_members(
    fields: Mapping[str, str], image: str, caption: str | None, fetch: Callable[[str], bytes | None]
) -> tuple[dict[str, bytes], str]:
    """The members of a row, as :func:`read_rows` gives them, and what is wrong with it, if anything is."""
    path = fields[image].strip()
    data = fetch(path) if path else None
    members: dict[str, bytes] = {}
    if data is not None:
        # Its column says that it is the image, whatever its name ends with; its format shows when it is decoded.
        members = {path.rpartition(".")[2].lower(): data, "jpg": data}
    members["json"] = json.dumps(fields).encode()
    if caption is not None:
        members["txt"] = fields[caption].encode()
    return members, "" if data is not None else "missing_image"
