"""The manifest of a checkpoint: where the run stood, and the size and checksum of every file.

It is written last, by one rank, and is the only sign that a checkpoint is finished. What it says is checked before it
is used: it may come from anywhere, and a name in it leads to a file.
"""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import PurePath
from typing import Any, BinaryIO

from clipscale.data.io import REMOTE, ShardStore, resolve
from clipscale.errors import ClipscaleError, DataError, MissingError

MANIFEST = "manifest.json"
MAX_BYTES = 1 << 28  # of a manifest; a thousand ranks and a thousand streams take a quarter of a megabyte
CHUNK = 1 << 22  # bytes hashed at a time


class DamagedError(ClipscaleError):
    """A checkpoint that is not as it was written."""


@dataclass
class Saved:
    """What a checkpoint holds beside tensors: where the run stands."""

    samples_seen: int = 0
    step: int = 0
    time_s: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)
    """Of these seconds, those in which no step was made, by what was done instead."""
    positions: list[int] = field(default_factory=list)
    """Where each canonical stream stands after the last finished step."""
    fingerprint: str = ""
    """Of the sample order that the positions belong to."""
    bad_samples: int = 0
    bad_reasons: dict[str, int] = field(default_factory=dict)
    truncated_captions: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)
    best_step: int = 0
    """The step whose evaluation was the best so far by `checkpoint.best_metric`; 0 if none was made."""
    best_value: float = 0.0
    objective: float = 0.0
    """The best evaluation so far by `eval.objective`."""
    objective_at: int = 0
    """Samples seen at it; 0 if none was made."""
    not_improved: int = 0
    """Evaluations in a row since then that were not better."""
    looked_at: int = 0
    """Samples seen at the last evaluation that these two count."""
    kept_at: int = 0
    """Samples seen at the last checkpoint that is kept for good, which may be this one."""
    wandb_id: str = ""
    skipped: list[list[list[int]]] = field(default_factory=list)
    """Stretches of the order that are passed over, ``[starts, stops]`` with a position of each canonical stream."""
    jumps: list[list[int]] = field(default_factory=list)
    """Stretches to come, ``[step, *stops]`` each, the next one first: it begins where that step ends."""
    skipped_steps: int = 0
    rollbacks: int = 0
    bad_steps: list[int] = field(default_factory=list)
    """Those of the last steps that were bad."""
    recent_losses: list[float] = field(default_factory=list)
    """Of the last steps that were not skipped, if spikes are looked for."""
    teachers: list[str] = field(default_factory=list)
    """Checkpoints of the runs that teach, and the fingerprints of each."""


@dataclass(frozen=True)
class FileSum:
    """What is known of a file: its size, and CRC-32, the fastest checksum of Python's own library."""

    bytes: int
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """All that a checkpoint says of itself."""

    saved: Saved
    files: dict[str, FileSum]

    def to_json(self) -> str:
        """The text of the file, with a checksum of its own."""
        content = asdict(self)
        return json.dumps(content | {"crc32": _sum_of(content)}, indent=1) + "\n"


@dataclass(frozen=True)
class Stored:
    """A checkpoint that has a manifest: its location, a directory or a remote prefix, and what opens it."""

    location: str
    store: ShardStore

    @property
    def name(self) -> str:
        """As ``step_00000100``."""
        return PurePath(self.location).name

    @property
    def step(self) -> int:
        """The step after which it was saved."""
        return int(self.name.removeprefix("step_"))

    def open(self, file: str) -> BinaryIO:
        """A file of it. Raises DataError when it is not there."""
        return self.store.open_stored(resolve(file, self.location))

    def manifest(self) -> Manifest:
        """What it says of itself. Raises DamagedError when it is none, or holds what no manifest may hold."""
        return parse_manifest(self.location, read_manifest(self))

    def damage(self, manifest: Manifest, among: slice = slice(None)) -> str:
        """What is wrong with the first damaged file ``among`` those of the manifest; empty if nothing is.

        Raises DataError for a store that does not answer.
        """
        for name, known in list(manifest.files.items())[among]:
            if problem := self._wrong_with(name, known):
                return f"{name} {problem}"
        return ""

    def _wrong_with(self, name: str, known: FileSum) -> str:
        try:
            size = self.store.version(resolve(name, self.location)).size
            if size != known.bytes:
                return f"has {size:,} bytes instead of {known.bytes:,}"
            with self.open(name) as file:
                return "" if checksum(file).crc32 == known.crc32 else "does not have its checksum"
        except DataError as error:
            if not self.tells(error):
                raise
            return f"cannot be read ({error})"
        except OSError as error:  # of a disk
            return f"cannot be read ({error.strerror})"

    def tells(self, error: DataError) -> bool:
        """Whether an error is of what lies here, and not of the way to it."""
        return isinstance(error, MissingError) or not self.location.startswith(REMOTE)


def read_manifest(stored: Stored) -> bytes:
    """The bytes of a manifest. Raises DamagedError when they cannot be read, or are too many to be one."""
    try:
        with stored.open(MANIFEST) as file:
            text = file.read(MAX_BYTES + 1)
    except DataError as error:
        if not stored.tells(error):
            raise
        raise DamagedError(str(error)) from None
    except OSError as error:  # of a disk
        raise DamagedError(f"{stored.location}/{MANIFEST} cannot be read ({error.strerror})") from None
    if len(text) > MAX_BYTES:
        raise DamagedError(f"{stored.location}/{MANIFEST} is too large to be a manifest")
    return text


def parse_manifest(location: str, text: bytes) -> Manifest:
    """A manifest from its bytes. Raises DamagedError for anything that :meth:`Manifest.to_json` did not write."""
    where = f"{location}/{MANIFEST}"
    try:
        content = json.loads(text)
        own = content.pop("crc32")
        saved, listed = content["saved"], content["files"]
        files = {str(name): FileSum(**known) for name, known in listed.items()}
        found = Manifest(_typed(saved), files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedError(f"{where} is not a manifest") from None
    for name, known in files.items():
        if not _is_plain(name):
            raise DamagedError(f"{where} names {name!r}, which is no file of this checkpoint")
        if any(type(value) is not int or value < 0 for value in (known.bytes, known.crc32)):
            raise DamagedError(f"{where} has no size and checksum of {name}")
    if own != _sum_of(content):
        raise DamagedError(f"{where} does not have its own checksum")
    return found


def checksum(file: BinaryIO) -> FileSum:
    """Size and checksum of what an open file holds from here on."""
    size = crc = 0
    while chunk := file.read(CHUNK):
        size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return FileSum(size, crc)


def _sum_of(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _is_plain(name: str) -> bool:
    """Whether it can only be a file in the checkpoint's own directory."""
    return re.fullmatch(r"[\w.][\w.-]*", name) is not None and set(name) != {"."}


def _typed(content: dict[str, Any]) -> Saved:
    saved = Saved(**content)
    for each in fields(Saved):
        if not isinstance(
            getattr(saved, each.name), float | int if each.type == "float" else type(_default(each.name))
        ):
            raise TypeError(each.name)
    return saved


def _default(name: str) -> Any:
    return getattr(Saved(), name)
