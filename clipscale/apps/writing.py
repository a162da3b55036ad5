"""Files that are there whole or not at all."""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TextIO

from clipscale.errors import ConfigError, DataError


def _scratch(name: str, process: int | str) -> str:
    """How the file is called while it is being written."""
    return f".{name[-100:]}.{socket.gethostname()}.{process}.tmp"


SCRATCH = _scratch("*", "*")  # pattern of those of this machine


@contextmanager
def whole(path: Path, durable: bool = False) -> Iterator[BinaryIO]:
    """A file to write that is there whole or not at all, whoever else writes it at the same time.

    One that is ``durable`` is on the disk before it has its name, so that a loss of power cannot leave it empty. What
    is a pipe or a device is written as it is. Raises DataError where it cannot be written.
    """
    target = Path(os.path.realpath(path))  # a link stays one
    scratch = target.parent / _scratch(target.name, os.getpid())
    try:
        if _is_special(path):
            with path.open("wb") as out:
                yield out
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as out:
            yield out
            if durable:
                out.flush()
                os.fsync(out.fileno())
        scratch.replace(target)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)


@contextmanager
def whole_text(path: Path) -> Iterator[TextIO]:
    """The same for text. Names that are no UTF-8 keep their bytes."""
    with whole(path) as raw, io.TextIOWrapper(raw, "utf-8", "surrogateescape", newline="") as out:
        yield out


def check_writable(path: Path, option: str) -> None:
    """Raise ConfigError where :func:`whole` could not write the file that an option names: before a model is asked, not
    hours later."""
    if _is_special(path):
        return
    target = os.path.realpath(path)
    there = next(place for place in Path(target).parents if os.path.exists(place))
    if os.path.isdir(target):
        raise ConfigError(f"{path} cannot be written: it is a directory; choose another {option}")
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{path} cannot be written: {there} is no directory that may be written into; choose another {option}"
        )


def _is_special(path: Path) -> bool:
    """Whether it is a pipe or a device."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def remove_left(scratch_files: Iterable[Path]) -> None:
    """Remove those files whose process, of this machine, has ended before they were whole."""
    for scratch in scratch_files:
        process = scratch.suffixes[-2].removeprefix(".")
        if process.isdigit() and not _runs(int(process)):
            scratch.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
