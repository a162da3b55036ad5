"""One shard of packed samples: image files and rows in, a tar out; what cannot be packed is told with its reason."""

from __future__ import annotations

import hashlib
import io
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from clipscale.apps.data.shards import write_shard
from clipscale.apps.data.tables import PROBLEM
from clipscale.data.samples import BadSample, decode_image, has_transparency, is_deep, open_image, undecodable, upright

SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # formats that are kept, and what training reads by default


@dataclass(frozen=True)
class Settings:
    """How samples are packed.

    Args:
        images: directory of the image paths.
        image_column: column of image paths.
        caption_column: column of captions, each a text or a list of texts.
        template: caption made of columns instead.
        group_by: column whose values are never in two splits.
        size: largest shorter side in pixels; 0 is any.
        quality: JPEG quality of what is shrunk.
        window: values of deep greyscale images that become black and white; None takes each image's own range.
        max_pixels: larger images are refused.
    """

    images: str
    image_column: str
    caption_column: str
    template: str | None
    group_by: str | None
    size: int
    quality: int
    window: tuple[float, float] | None
    max_pixels: int


class Sample(NamedTuple):
    """A sample to be packed: its number, the number of its first row, and its rows as JSON."""

    number: int
    row: int
    rows: list[bytes]


class Shard(NamedTuple):
    """A shard to be packed."""

    path: Path
    samples: list[Sample]


def pack_shard(settings: Settings, shard: Shard) -> dict[str, Any]:
    """Write a shard; returns counts, what was skipped, and hashes of the groups and image files in it."""
    skipped: list[tuple[int, str, str]] = []
    groups: set[int] = set()
    files: set[int] = set()
    captions = 0

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        nonlocal captions
        for sample in shard.samples:
            rows = [json.loads(row) for row in sample.rows]
            try:
                data = read_image(settings, rows[0])
                texts = find_texts(settings, rows)
                suffix, image = encode(data, settings)
            except BadSample as reason:
                skipped.append((sample.row + 1, str(rows[0].get(settings.image_column) or ""), str(reason)))
                continue
            captions += len(texts)
            files.add(fingerprint(data))
            groups.update(fingerprint(value.encode()) for value in group_values(settings, rows))
            fields = merge(rows, settings.caption_column) | {"captions": texts}
            members = {suffix: image, "txt": texts[0].encode(), "json": json.dumps(fields, ensure_ascii=False).encode()}
            yield f"{sample.number:09d}", members

    count = write_shard(shard.path, samples())
    return {
        "samples": count, "captions": captions, "bytes": shard.path.stat().st_size, "skipped": skipped,
        "groups": sorted(groups), "files": sorted(files),
    }  # fmt: skip


def hash_files(settings: Settings, rows: Sequence[bytes]) -> list[int | None]:
    """Fingerprints of the image files of some rows; None of those that cannot be read."""
    found: list[int | None] = []
    for row in rows:
        try:
            found.append(fingerprint(read_image(settings, json.loads(row))))
        except BadSample:
            found.append(None)
    return found


def fingerprint(data: bytes) -> int:
    """A 64-bit hash."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


def image_path(settings: Settings, row: Mapping[str, Any]) -> Path:
    """Where the image of a row lies. Raises BadSample when the row does not say."""
    name = row.get(settings.image_column)
    if not isinstance(name, str) or not name.strip():
        raise BadSample("no_image_path")
    return Path(settings.images, name.strip())


def read_image(settings: Settings, row: Mapping[str, Any]) -> bytes:
    """The image file of a row. Raises BadSample."""
    path = image_path(settings, row)
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise BadSample("missing_image") from None
    except OSError:
        raise BadSample("unreadable_image") from None


def find_texts(settings: Settings, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The captions of a sample, each once. Raises BadSample when there is none."""
    if problem := rows[0].get(PROBLEM):
        raise BadSample(problem)
    found: list[str] = []
    for row in rows:
        if settings.template is not None:
            found.append(fill(settings.template, row))
        else:
            value = row.get(settings.caption_column)
            found += [_text(each) for each in (value if isinstance(value, list) else [value])]
    texts = list(dict.fromkeys(text for text in found if text))
    if not texts:
        raise BadSample("empty_caption")
    return texts


def fill(template: str, row: Mapping[str, Any]) -> str:
    """A caption of a row's fields; what is empty leaves no gap, and all empty no caption."""
    parts = [(literal, name, _text(row.get(name)) if name else "") for literal, name, _, _ in FORMATTER.parse(template)]
    if not any(value for _, _, value in parts):
        return ""
    return " ".join("".join(literal + value for literal, _, value in parts).split())


FORMATTER = string.Formatter()


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def group_values(settings: Settings, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The groups that a sample's rows name, as text; an empty one where a row names none."""
    return [_text(row.get(settings.group_by)) for row in rows] if settings.group_by else []


def merge(rows: Sequence[Mapping[str, Any]], caption_column: str) -> dict[str, Any]:
    """All other columns of a sample: the value, or a list of one per row where rows differ."""
    names = dict.fromkeys(name for row in rows for name in row if name not in (caption_column, PROBLEM))
    merged: dict[str, Any] = {}
    for name in names:
        values = [row.get(name) for row in rows]
        merged[name] = values[0] if all(value == values[0] for value in values) else values
    return merged


def encode(data: bytes, settings: Settings) -> tuple[str, bytes]:
    """``(suffix, bytes)`` of an image as it is packed: untouched where nothing has to change. Raises BadSample.

    What is shrunk becomes a JPEG, or a PNG if it has transparency or a palette; deep greyscale and formats other than
    JPEG, PNG and WebP become a PNG.
    """
    if settings.size == 0 and data.startswith(b"\xff\xd8"):
        decode_image(data, settings.max_pixels)  # as training will; quicker than PIL
        return "jpg", data
    image = open_image(data, settings.max_pixels)
    form, deep = image.format or "", is_deep(image)
    shrinks = 0 < settings.size < min(image.size)
    if form in SUFFIXES and not deep and not shrinks:
        return SUFFIXES[form], data
    with undecodable():
        drawn = image.mode in ("1", "P")
        image = upright(image, settings.window)
        if has_transparency(image):
            image = image.convert("RGBA")
        elif image.mode not in ("L", "RGB"):
            image = image.convert("RGB")
        if shrinks:
            image = image.resize(_shrunk(image.size, settings.size), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        # Nothing that the file said of itself goes along: it was turned, and its date and place are nobody's business.
        image.info.clear()
        if shrinks and not drawn and image.mode != "RGBA":
            image.save(buffer, "JPEG", quality=settings.quality)
            return "jpg", buffer.getvalue()
        image.save(buffer, "PNG")
        return "png", buffer.getvalue()


def _shrunk(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    ratio = shorter / min(size)
    return max(1, round(size[0] * ratio)), max(1, round(size[1] * ratio))
