"""Where images and captions come from: folders, CSV, JSONL, Parquet and COCO, all as rows of named columns."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from clipscale.data.folders import files_below
from clipscale.data.table import CAPTION_NAMES, IMAGE_NAMES, find_column, records
from clipscale.errors import ConfigError, DataError

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
PROBLEM = "__problem__"  # column that says why a row cannot be used


class Rows:
    """Rows in memory as JSON, end to end: ten million take a few GB, where dictionaries would take tens."""

    def __init__(self) -> None:
        self.columns: dict[str, None] = {}  # in the order in which they first appear
        self._text = bytearray()
        self._ends = array("q", [0])

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; raises DataError for a value that JSON does not have."""
        for name in row:
            if name not in self.columns:
                self.columns[name] = None
        self._text += json.dumps(row, ensure_ascii=False, default=_plain).encode("utf-8", "replace")
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def text(self, number: int) -> bytes:
        """A row as JSON."""
        return bytes(self._text[self._ends[number] : self._ends[number + 1]])

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return json.loads(self.text(number))

    def digest(self) -> str:
        """What tells these rows from others."""
        return hashlib.sha256(self._text).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        raise DataError("a column holds bytes; images are packed from files, so give a table with a column of paths")
    return float(value) if isinstance(value, Decimal) else str(value)


class Source(NamedTuple):
    """Rows, the directory of their image paths, what they were read from, and the columns of images and captions."""

    rows: Rows
    images: Path
    path: Path
    image_column: str
    caption_column: str


def read_source(
    source: Path,
    images: Path | None,
    image_column: str | None,
    caption_column: str | None,
    with_captions: bool = True,
) -> Source:
    """Read all rows of a source, and find its columns.

    Args:
        source: a table; a folder that holds one table; or a folder of images.
        images: directory of the image paths; None is the table's own.
        image_column: column of image paths; None finds one of the usual names.
        caption_column: column of captions; likewise.
        with_captions: whether a column of captions is needed.

    Raises DataError for what cannot be read, ConfigError for columns that are not there.
    """
    path = find_table(source)
    rows, found_image, found_caption = Rows(), None, None
    try:
        if path.is_dir():
            found_image = "filepath"
            found_caption = _folder(path, rows)
        elif path.suffix.lower() == ".json":
            found_image, found_caption = _json(path, rows)
        else:
            for row in _READERS[path.suffix.lower()](path):
                rows.append(row)
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise DataError(
            f"{path} is not UTF-8 after row {len(rows):,}; convert it, e.g. iconv -f latin1 -t utf-8"
        ) from None
    except DataError as error:
        raise error if str(path) in str(error) else DataError(f"{path} row {len(rows) + 1:,}: {error}") from None
    if not len(rows):
        raise DataError(f"{path} has no rows")
    columns = [name for name in rows.columns if name != PROBLEM]
    image = _column(path, columns, image_column or found_image, IMAGE_NAMES, "image")
    wanted = caption_column or found_caption
    caption = _column(path, columns, wanted, CAPTION_NAMES, "caption") if with_captions else ""
    base = images or (path if path.is_dir() else path.parent)
    if not base.is_dir():
        raise ConfigError(f"--images {base}: no such directory")
    return Source(rows, base, path, image, caption)


def find_table(source: Path) -> Path:
    """The table that a source is or holds; a folder without one is itself. Raises DataError."""
    if not source.exists():
        raise DataError(f"{source} does not exist")
    known = (*_READERS, ".json")
    if source.is_dir():
        tables = sorted(path for path in source.iterdir() if path.suffix.lower() in _READERS and path.is_file())
        if len(tables) > 1:
            raise DataError(
                f"{source} holds {len(tables)} tables ({', '.join(path.name for path in tables[:4])}); name one of them"
            )
        return tables[0] if tables else source
    if source.suffix.lower() not in known:
        raise DataError(f"{source} is no table: known are {', '.join(known)}, or give a folder")
    return source


def _column(path: Path, columns: Sequence[str], wanted: str | None, usual: Sequence[str], kind: str) -> str:
    if wanted:
        if wanted in columns:
            return wanted
        raise ConfigError(f"{path} has no column {wanted!r}; it has {', '.join(columns)}: choose with --{kind}-column")
    if (found := find_column(columns, usual)) is not None:
        return found
    beside = ", or put a .txt of the same name beside each image" if path.is_dir() else ""
    raise ConfigError(
        f"{path}: none of the columns {', '.join(columns)} is known to hold {kind}s; name one with "
        f"--{kind}-column{beside}"
    )


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as raw:
        wide = raw.read(2) in (b"\xff\xfe", b"\xfe\xff")  # as spreadsheets write it
    with path.open(encoding="utf-16" if wide else "utf-8-sig", newline="") as file:
        found = records(file, str(path))
        header = [name.strip() for name in next(found, [])]
        if twice := {name for name in header if name and header.count(name) > 1}:
            raise DataError(f"{path}: column {twice.pop()!r} comes twice")
        for line in found:
            yield {name: value for name, value in zip(header, line, strict=True) if name}


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, parse_constant=lambda _: None)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path} line {number:,} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise DataError(f"{path} line {number:,}: not an object with named fields")
            yield row


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError(f"{path} needs pyarrow: pip install 'clipscale[data]'") from None
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(8192):
                for row in batch.to_pylist():
                    yield {name: None if value != value else value for name, value in row.items()}  # not a number
    except ValueError as error:  # what pyarrow's own errors are
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


_READERS = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}


def _json(path: Path, rows: Rows) -> tuple[str | None, str | None]:
    """Read COCO captions, or a list of objects; returns the columns that are known."""
    try:
        content = json.loads(path.read_text("utf-8-sig"), parse_constant=lambda _: None)
    except RecursionError:
        raise DataError(f"{path} is not JSON: nested too deeply") from None
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if isinstance(content, list) and all(isinstance(row, dict) for row in content):
        for row in content:
            rows.append(row)
        return None, None
    if not isinstance(content, dict) or not {"images", "annotations"} <= set(content):
        raise DataError(f"{path} is neither COCO captions (with images and annotations) nor a list of objects")
    try:
        captions: dict[Any, list[str]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        for image in content["images"]:
            rows.append({"file_name": image["file_name"], **image, "captions": captions[image["id"]]})
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is not COCO's captions file: {error} is missing in it") from None
    return "file_name", "captions"


def _folder(folder: Path, rows: Rows) -> str | None:
    """Read the images of a folder, with the ``.txt`` and ``.json`` beside them; returns the captions' column."""
    has_text = False
    for name in sorted(name for name, _ in files_below(folder) if name.lower().endswith(PICTURES)):
        row, text = _beside(folder / name)
        has_text |= text
        rows.append({"filepath": name, **row})
    if not len(rows):
        raise DataError(f"{folder} holds no images ({', '.join(PICTURES)}), no table and no shards")
    return "captions" if has_text else None


def _beside(image: Path) -> tuple[dict[str, Any], bool]:
    """The fields of an image's ``.json``, its caption first among ``captions``; and whether there is a caption."""
    row: dict[str, Any] = {}
    problem = ""
    if (path := image.with_suffix(".json")).is_file():
        try:
            row = json.loads(path.read_bytes(), parse_constant=lambda _: None)
        except (ValueError, RecursionError):
            problem = "bad_json"
        if not isinstance(row, dict):
            row, problem = {}, "bad_json"
        row.pop("filepath", None)
    has_text = (path := image.with_suffix(".txt")).is_file()
    if has_text:
        given = row.get("captions") or []
        try:
            row["captions"] = [path.read_text("utf-8-sig"), *(given if isinstance(given, list) else [given])]
        except UnicodeDecodeError:
            problem = "bad_text_encoding"
    return (row | {PROBLEM: problem} if problem else row), has_text
