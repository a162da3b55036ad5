"""Questions of which caption belongs to which image, in the layouts of Winoground and SugarCrepe."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipscale.data.collections import IMAGE_SUFFIXES, About, digest_of_files
from clipscale.data.samples import Member
from clipscale.errors import DataError

EXAMPLES = "examples.jsonl"  # of Winoground
LAYOUTS = (
    f"a directory with Winoground's {EXAMPLES}, or with files in SugarCrepe's layout "
    '({"0": {"filename": …, "caption": …, "negative_caption": …}, …}), or such a file'
)


@dataclass(frozen=True)
class Question:
    """Two captions for two images, each for the one at its place, or several for one, of which the first is right.

    ``images`` are places in the collection of images; ``kind`` is what is asked for.
    """

    kind: str
    images: tuple[int, ...]
    captions: tuple[str, ...]


class ImageFiles:
    """A collection of image files, without captions; a sample's key is its file name."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self.about = About()

    @property
    def identity(self) -> str:
        """A digest of the images' paths, sizes and times."""
        return digest_of_files(Path(), map(str, self._paths))

    def location(self, place: int) -> str:
        """The path of image ``place``."""
        return str(self._paths[place])

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, start: int, stop: int) -> Iterator[Member]:
        """Samples ``start <= i < min(stop, len)``."""
        for path in self._paths[start:stop]:
            try:
                yield Member(path.name, {"jpg": path.read_bytes()})
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}") from None


def read_questions(where: Path, images: Path | None = None) -> tuple[ImageFiles, list[Question]]:
    """The images and the questions at ``where``.

    - A directory with Winoground's ``examples.jsonl``: rows with ``image_0 image_1 caption_0 caption_1`` and ``tag``,
      the kind of question.
    - A file in SugarCrepe's layout, or a directory of such files, whose names are the kinds. ``negative_caption`` is a
      text, or a list of them.

    Images lie in ``images``, by default ``images`` beside the file, else beside the file itself; names may lack their
    suffix. Raises DataError for what is not there or is of another layout.
    """
    if (where / EXAMPLES).is_file():
        files, read = [where / EXAMPLES], _winoground
    elif where.is_dir():
        files, read = sorted(where.glob("*.json")), _sugarcrepe
    else:
        files, read = [where] if where.is_file() else [], _sugarcrepe
    if not files:
        raise DataError(f"{where} holds no questions; name {LAYOUTS}")
    folder = images or (files[0].parent / "images" if (files[0].parent / "images").is_dir() else files[0].parent)
    if not folder.is_dir():
        raise DataError(f"--images {folder} is no directory")
    places: dict[Path, int] = {}
    questions = []
    for file in files:
        for kind, names, captions in read(file):
            paths = [
                find_image_file(folder, name, file, "; say where its images lie: --images DIRECTORY") for name in names
            ]
            numbers = tuple(places.setdefault(path, len(places)) for path in paths)
            questions.append(Question(kind, numbers, captions))
    if not questions:
        raise DataError(f"{files[0]} holds no questions")
    return ImageFiles(list(places)), questions


Row = tuple[str, tuple[str, ...], tuple[str, ...]]  # kind, image names, captions


def _winoground(file: Path) -> Iterator[Row]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # a text may hold other line ends
    except (ValueError, OSError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row: dict[str, Any] = json.loads(line)
            images, captions = ((str(row[f"{what}_0"]), str(row[f"{what}_1"])) for what in ("image", "caption"))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}, line {number}: {_wrong(error)}; Winoground's rows hold image_0, …") from None
        yield str(row.get("tag") or "untagged"), images, captions


def _sugarcrepe(file: Path) -> Iterator[Row]:
    try:
        rows: Any = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"{file} is no JSON file: {error}") from None
    for key, row in rows.items() if isinstance(rows, dict) else enumerate(rows if isinstance(rows, list) else ()):
        try:
            name, caption, wrong = str(row["filename"]), str(row["caption"]), row["negative_caption"]
        except (KeyError, TypeError) as error:
            raise DataError(f"{file}, entry {key}: {_wrong(error)}; name {LAYOUTS}") from None
        others = tuple(map(str, wrong)) if isinstance(wrong, list) else (str(wrong),)
        if not others:
            raise DataError(f"{file}, entry {key}: negative_caption is empty")
        yield file.stem, (name,), (caption, *others)


def _wrong(error: Exception) -> str:
    return f"no {error.args[0]}" if isinstance(error, KeyError) else str(error)


def find_image_file(folder: Path, name: str, file: Path, hint: str = "") -> Path:
    """The image of a name that may lack its suffix. Raises DataError, which says that ``file`` names it."""
    for written in (name, *(f"{name}.{suffix}" for suffix in IMAGE_SUFFIXES)):
        if os.path.isfile(folder / written):
            return folder / written
    raise DataError(f"{folder / name}, which {file.name} names, does not exist{hint}")
