"""Anything that holds samples, opened by where it lies: shards, CLIP_benchmark's directories, folders, tables.

A collection is read by place, in an order that is the same each time; its keys stay the same as long as its files do.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from clipscale.config.data import Storage
from clipscale.data.folders import files_below
from clipscale.data.io import REMOTE, ShardStore, parent, resolve
from clipscale.data.labels import numbered
from clipscale.data.manifest import ShardFile, damages, expand_shards, summarise
from clipscale.data.samples import Member
from clipscale.data.stream import fetch_image, read_samples
from clipscale.data.table import CAPTION_NAMES, IMAGE_NAMES, find_column, is_table, records, row_members
from clipscale.errors import DataError, MissingError, masked

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
IMAGE_KEYS = ("jpg", *IMAGE_SUFFIXES[1:])  # members that may hold the image, in order of preference
ARCHIVES = (".tar", ".tar.gz", ".tgz")
LABEL_NAMES = ("label", "class", "labels", "classes", "target")
SPLITS = ("test", "train")
COUNT = "nshards.txt"  # of CLIP_benchmark: how many shards a split has
CLASS_NAMES, TEMPLATES, KIND = "classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"
CLIP_FIELD = "clip"  # member that names the clip of which a frame is one


@dataclass(frozen=True)
class About:
    """What a collection tells of itself beside its samples.

    ``classes`` and ``templates`` (with ``{}``) are for its labels, where it has some; ``kind`` is what
    ``dataset_type.txt`` says, else empty; ``damaged`` is what is wrong with its archives, by file name; ``by_name``:
    its labels are these names, and their numbers only the alphabetical order.
    """

    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    kind: str = ""
    damaged: dict[str, str] = field(default_factory=dict)
    by_name: bool = False


class Collection(Protocol):
    """Raw samples ``0 <= i < len``. Members: the image by its suffix; ``cls`` (class index, decimal); ``txt``
    (captions, one a line); ``json`` (whatever else is known)."""

    @property
    def about(self) -> About:
        """What it tells of itself."""
        ...

    @property
    def identity(self) -> str:
        """A digest of what it is made of: names, sizes and versions of its files. Equal as long as these are."""
        ...

    def location(self, place: int) -> str:
        """The file that sample ``place`` is read from."""
        ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[Member]:
        """Samples ``start <= i < min(stop, len)``, in order. Raises DataError for what cannot be read any more."""
        ...


def open_collection(
    where: str,
    *,
    split: str = "test",
    image_column: str | None = None,
    caption_columns: Sequence[str] = (),
    label_column: str | None = None,
    one_per_image: bool = False,
    clips: bool = False,
    storage: Storage | None = None,
) -> Collection:
    """Open what lies at ``where``.

    - Shards: a brace pattern, a list with ``::``, or a directory (or remote prefix) of ``.tar`` files.
    - CLIP_benchmark's layout: ``where/{test,train}/{nshards.txt,0.tar,…}``; ``split`` chooses.
    - A folder of images at any depth, with no shards among them; where all lie in sub-folders, those are the classes,
      in alphabetical order. A same-named ``.txt`` holds captions, ``.json`` other fields. ``clips``: each folder of
      images is one clip of a video (``where/CLASS/CLIP/frame.jpg`` or ``where/CLIP/frame.jpg``), and the images are its
      frames; ``where/CLIP.txt`` holds its captions.
    - A CSV or TSV with a column of image paths, relative to it. ``caption_columns`` hold captions, ``label_column``
      class numbers, or names, whose classes are then all names in alphabetical order; columns of the usual names are
      found. ``one_per_image`` makes one sample of all rows that name the same image, with the captions of all.

    Raises DataError, in one line, for what is not there, is empty, or is none of these.
    """
    store = ShardStore(storage or Storage())
    if is_table(where) and "{" not in where and "::" not in where:
        return Table(store, where, image_column, caption_columns, label_column, one_per_image)
    if "{" in where or "::" in where or where.endswith(ARCHIVES):
        return Shards(expand_shards(where, None, where, store))
    if not where.startswith(REMOTE) and not Path(where).expanduser().is_dir():
        wrong = "is a file of another kind" if Path(where).expanduser().exists() else "does not exist"
        raise DataError(
            f"{where} {wrong}; name shards (a pattern such as 'val/{{000..009}}.tar' or their directory), a "
            "directory of CLIP_benchmark's layout, a folder of images, or a .csv or .tsv"
        )
    where = resolve(where, None).rstrip("/")
    names = store.names(where)
    if tars := [name for name in names if name.endswith(ARCHIVES)]:
        below = () if where.startswith(REMOTE) else files_below(Path(where))
        if image := next((path for path, _ in below if _is_image(path)), None):
            raise _mixed(where, tars[0], image)
        return Shards(expand_shards([f"{where}/{name}" for name in tars], None, where, store))
    if benchmark := _benchmark(store, where, split, names):
        return benchmark
    if where.startswith(REMOTE):
        raise DataError(f"{where} holds neither .tar files nor CLIP_benchmark's {split}/{COUNT}")
    return Folder(Path(where), clips)


# ---- shards ---------------------------------------------------------------------------------------------------------


class Shards:
    """The samples of some shards, in the order of the shards."""

    def __init__(self, files: Sequence[ShardFile], about: About | None = None) -> None:
        self._files = files
        summaries = summarise(files)
        self._ends = np.cumsum([summary.samples for summary in summaries])
        told = about or About()
        self.about = About(told.classes, told.templates, told.kind, damages(files, summaries))

    @cached_property
    def identity(self) -> str:
        """A digest of the shards' names, sizes and versions; not of where they lie."""
        return _digest([file.name, *file.store.version(file.location), file.rows] for file in self._files)

    def location(self, place: int) -> str:
        """The shard that holds sample ``place``."""
        return masked(self._files[int(np.searchsorted(self._ends, place, "right"))].location)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, start: int, stop: int) -> Iterator[Member]:
        """Samples ``start <= i < min(stop, len)``."""
        begins, stop = np.concatenate([[0], self._ends[:-1]]), min(stop, len(self))
        return chain.from_iterable(
            read_samples(file, max(start - begin, 0), min(stop, end) - begin)
            for file, begin, end in zip(self._files, begins.tolist(), self._ends.tolist(), strict=True)
            if begin < stop and end > start
        )


def _benchmark(store: ShardStore, where: str, split: str, names: Sequence[str]) -> Shards | None:
    """CLIP_benchmark's layout, if it is that; its loader takes what is there where the count is missing."""
    local = not where.startswith(REMOTE)
    of_splits = [s for s in SPLITS if s in names and any(n.endswith(ARCHIVES) for n in store.names(f"{where}/{s}"))]
    if local and not of_splits and not {CLASS_NAMES, TEMPLATES, KIND} & set(names):
        return None
    if local and split not in names:
        raise DataError(f"{where} has no split {split!r}; it has {', '.join(of_splits) or 'none'}")
    counted = _text(store, f"{where}/{split}/{COUNT}")
    if counted is None:
        if not local:
            return None
        raise DataError(
            f"{where}/{split} has no {COUNT}, which says how many shards there are: without it, missing ones would "
            "change the result silently; write the number into it"
        )
    if not counted.strip().isdecimal() or not int(counted):
        raise DataError(f"{where}/{split}/{COUNT} says {counted.strip()[:20]!r}, no number of shards")
    shards = [f"{where}/{split}/{number}.tar" for number in range(int(counted))]
    if local and (missing := [shard for shard in shards if not Path(shard).is_file()]):
        raise DataError(f"{missing[0]} does not exist, and {COUNT} beside it says that there are {int(counted)} shards")
    kind = (_text(store, f"{where}/{KIND}") or "").strip()
    templates = [line.replace("{c}", "{}") for line in _lines(store, f"{where}/{TEMPLATES}")]
    about = About(tuple(_lines(store, f"{where}/{CLASS_NAMES}")), tuple(templates), kind)
    return Shards(expand_shards(shards, None, f"{where}/{split}", store), about)


def _lines(store: ShardStore, location: str) -> list[str]:
    return [line.strip() for line in (_text(store, location) or "").splitlines() if line.strip()]


def _text(store: ShardStore, location: str) -> str | None:
    """A small text; None where there is none."""
    try:
        with store.open(location) as file:
            return file.read().decode()
    except MissingError:
        return None
    except UnicodeDecodeError:
        raise DataError(f"{location} is not UTF-8") from None


# ---- folders --------------------------------------------------------------------------------------------------------


class Folder:
    """The images below a folder, by their paths; a sample's key is its path in the folder."""

    def __init__(self, root: Path, clips: bool = False) -> None:
        self.root = root
        found = dict(files_below(root))
        self._paths = sorted(filter(_is_image, found))
        self._missing = {path for path in self._paths if not found[path]}
        archive = min((path for path in found if path.endswith(ARCHIVES)), default=None)
        if archive and self._paths:
            raise _mixed(str(root), archive, self._paths[0])
        if archive:
            raise DataError(f"{root} holds shards in folders, {archive} among them; name the folder that they lie in")
        if not self._paths:
            raise DataError(f"{root} holds no images ({', '.join(IMAGE_SUFFIXES)}) and no .tar files")
        self._clips = clips
        depth = 3 if clips else 2
        if clips and (flat := next((path for path in self._paths if "/" not in path), None)):
            raise DataError(f"{root}/{flat} is in no clip: clips are folders of frames, CLASS/CLIP/frame.jpg")
        labelled = all(path.count("/") >= depth - 1 for path in self._paths)
        names = tuple(sorted({path.partition("/")[0] for path in self._paths})) if labelled else ()
        self._labels = {name: number for number, name in enumerate(names)}
        # Folders cannot hold every name, and people write them with underscores.
        self.about = About(tuple(name.replace("_", " ") for name in names), by_name=bool(names))

    @cached_property
    def identity(self) -> str:
        """A digest of the paths, sizes and times of the images that are there."""
        return digest_of_files(self.root, [path for path in self._paths if path not in self._missing])

    def location(self, place: int) -> str:
        """The path of image ``place``."""
        return str(self.root / self._paths[place])

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, start: int, stop: int) -> Iterator[Member]:
        """Samples ``start <= i < min(stop, len)``."""
        return map(self._member, self._paths[start:stop])

    def _member(self, path: str) -> Member:
        place, members, problem = self.root / path, {}, "missing_image"
        try:
            if path not in self._missing:
                data, problem = place.read_bytes(), ""
                members = {path.rpartition(".")[2].lower(): data, "jpg": data}
        except PermissionError:
            problem = "unreadable_image"
        except OSError as error:
            raise DataError(f"{place} cannot be read: {error.strerror}; it was there when this began") from None
        for suffix in ("txt", "json"):
            clip = place.parent  # what is said of a video lies beside its folder
            beside = clip.with_name(f"{clip.name}.{suffix}") if self._clips else place.with_suffix(f".{suffix}")
            if beside.is_file():
                members[suffix] = beside.read_bytes()
        if self._labels:
            members["cls"] = str(self._labels[path.partition("/")[0]]).encode()
        if self._clips:
            members[CLIP_FIELD] = parent(path).encode()
        return Member(path, members, problem)


def _is_image(path: str) -> bool:
    return Path(path).suffix[1:].lower() in IMAGE_SUFFIXES


def _mixed(where: str, archive: str, image: str) -> DataError:
    return DataError(
        f"{where} holds shards ({archive}) and images ({image}), of which only one can be meant: name the shards by a "
        "pattern, or move one of the two elsewhere"
    )


# ---- tables ---------------------------------------------------------------------------------------------------------


class Table:
    """The rows of a CSV or TSV; a sample's key is the table's name and the number of its (first) row."""

    def __init__(
        self,
        store: ShardStore,
        where: str,
        image_column: str | None = None,
        caption_columns: Sequence[str] = (),
        label_column: str | None = None,
        one_per_image: bool = False,
    ) -> None:
        self._store, self._folder, self._name = store, parent(resolve(where, None)), where.rpartition("/")[2]
        with store.open(resolve(where, None)) as raw:
            lines = enumerate(io.BytesIO(raw.read()))
            found = records((line.decode("utf-8" if number else "utf-8-sig") for number, line in lines), where)
            self.columns = next(found, [])
            rows = [dict(zip(self.columns, row, strict=True)) for row in found]
        if not rows:
            raise DataError(f"{where} holds no row")
        self._image = self._named(where, image_column, IMAGE_NAMES, "image paths")
        caption = find_column(self.columns, CAPTION_NAMES)
        self._captions = list(caption_columns) or ([caption] if caption else [])
        label = label_column or find_column(self.columns, LABEL_NAMES)
        for column in (*self._captions, *([label] if label else [])):
            self._named(where, column, (), "")
        self._label = label
        classes, self._numbers = numbered([row[label].strip() for row in rows] if label else [])
        self._rows = _by_image(rows, self._image) if one_per_image else [(i, [row]) for i, row in enumerate(rows)]
        self.about = About(classes, by_name=bool(classes))

    def _named(self, where: str, column: str | None, usual: Sequence[str], what: str) -> str:
        found = find_column(self.columns, usual) if column is None else column
        if found is None or found not in self.columns:
            wanted = f"no column {column!r}" if column else f"no column of {what}"
            raise DataError(f"{where} has {wanted}; its columns are {', '.join(self.columns)}")
        return found

    @cached_property
    def identity(self) -> str:
        """A digest of the table's rows."""
        return _digest(self._rows)

    def location(self, place: int) -> str:
        """The path of the image of sample ``place``."""
        return resolve(self._rows[place][1][0][self._image].strip(), self._folder)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, stop: int) -> Iterator[Member]:
        """Samples ``start <= i < min(stop, len)``."""
        for number, rows in self._rows[start:stop]:
            members, problem = row_members(rows[0], self._image, None, self._fetch)
            captions = [row[column].strip() for row in rows for column in self._captions]
            members["txt"] = "\n".join(" ".join(caption.split()) for caption in captions if caption).encode()
            if self._label is not None and (label := rows[0][self._label].strip()) in self._numbers:
                members["cls"] = str(self._numbers[label]).encode()
            yield Member(f"{self._name}/{number}", members, problem)

    def _fetch(self, path: str) -> bytes | None:
        return fetch_image(self._store, path, self._folder)


def _by_image(rows: Sequence[dict[str, str]], column: str) -> list[tuple[int, list[dict[str, Any]]]]:
    found: dict[str, tuple[int, list[dict[str, Any]]]] = {}
    for number, row in enumerate(rows):
        found.setdefault(row[column].strip(), (number, []))[1].append(row)
    return list(found.values())


def digest_of_files(root: Path, paths: Iterable[str]) -> str:
    """Of the paths below ``root``, sizes and times of files."""
    stats = ((path, (root / path).stat()) for path in paths)
    return _digest([path, stat.st_size, stat.st_mtime_ns] for path, stat in stats)


def _digest(told: Iterable[object]) -> str:
    found = hashlib.sha256()
    for one in told:
        found.update(json.dumps(one, default=str).encode() + b"\n")
    return found.hexdigest()[:16]


def listed_captions(sample: Member) -> list[str]:
    """The captions of a collection's sample, one a line of its ``txt``."""
    return [
        line.strip() for line in sample.members.get("txt", b"").decode(errors="replace").splitlines() if line.strip()
    ]


def fields_of(sample: Member) -> dict[str, Any]:
    """What is known of a collection's sample in its ``json``; empty where there is none, or none that can be read."""
    try:
        found = json.loads(sample.members.get("json", b"{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
