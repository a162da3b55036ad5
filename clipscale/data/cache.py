"""Remote shards kept on a local disk, within a bound, for all processes of a machine."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PART = ".part"  # of a file that is being fetched; its name is locked meanwhile


class ShardCache:
    """Files by name and version; the least recently used ones make room.

    Args:
        directory: where they lie; other processes may use it at the same time.
        limit: bytes that all of them together may take.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self._directory, self._limit = directory, limit

    def open(self, identity: str, size: int, fetch: Callable[[BinaryIO], None]) -> BinaryIO | None:
        """The file of ``identity``, which must name one version; ``fetch`` writes its ``size`` bytes if it is not here.

        None when it cannot be kept: it is larger than the bound, or the disk is full or cannot be written.
        """
        path = self._directory / hashlib.sha256(identity.encode()).hexdigest()[:32]
        if (file := self._use(path, size)) is not None:
            return file
        if size > self._limit:
            return None
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(PART)) as part:  # one process fetches, the others wait for it
                if (file := self._use(path, size)) is not None:
                    Path(part.name).unlink(missing_ok=True)
                    return file
                return self._fetch(part, path, size, fetch)
        except OSError:
            return None

    def _fetch(self, part: BinaryIO, path: Path, size: int, fetch: Callable[[BinaryIO], None]) -> BinaryIO | None:
        kept = False
        try:
            if self._reserve(part, size):
                fetch(part)
                part.flush()
                os.replace(part.name, path)
                kept = True
        finally:
            if not kept:
                Path(part.name).unlink(missing_ok=True)
        return self._use(path, size) if kept else None

    @staticmethod
    def _use(path: Path, size: int) -> BinaryIO | None:
        try:
            file = path.open("rb", buffering=1 << 16)
        except OSError:
            return None
        if os.fstat(file.fileno()).st_size != size:  # not by us
            file.close()
            return None
        with suppress(OSError):  # another user's
            os.utime(file.fileno())  # the least recently used goes first
        return file

    def _reserve(self, part: BinaryIO, size: int) -> bool:
        """Make room for a file, and take it: its full size counts from now on."""
        with _locked(self._directory / "lock"):
            taken = {}
            for path in self._directory.iterdir():
                if path.name != "lock" and path != Path(part.name):
                    with suppress(FileNotFoundError):  # it was finished, or given up, since
                        taken[path] = path.stat()
            room = self._limit - sum(stat.st_size for stat in taken.values())
            for path, stat in sorted(taken.items(), key=lambda item: item[1].st_mtime_ns):
                if room >= size:
                    break
                if path.suffix != PART or _abandoned(path):
                    path.unlink(missing_ok=True)  # who reads it still has it open
                    room += stat.st_size
            if room < size or shutil.disk_usage(self._directory).free < size:
                return False
            part.truncate(size)
            part.seek(0)
            return True


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """Hold a file that no other process holds; a new one if its last holder moved it away."""
    while True:
        with open(path, "r+b", opener=_create) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                same = os.stat(path).st_ino == os.fstat(file.fileno()).st_ino
            except FileNotFoundError:
                same = False
            if same:
                yield file
                return


def _create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o644)


def _abandoned(path: Path) -> bool:
    """Whether nobody fetches into a part any more."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
