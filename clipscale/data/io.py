"""Bytes of shards, from wherever they lie: whole, or an error.

A location is a path, ``http(s)://``, ``s3://``, ``gs://``, ``az://`` or ``pipe:COMMAND``; gzip is undone. Remote bytes
come in ranges of one version of the object: a connection that breaks, stalls or ends early is taken up again at the
last good byte, a bounded number of times, and is an error then. Nothing that is short passes for whole.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import posixpath
import shutil
import subprocess
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

import obstore
from obstore.exceptions import (
    BaseError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import from_url

from clipscale.config.data import Storage
from clipscale.data.cache import ShardCache
from clipscale.errors import DataError, MissingError, RefusedError

REMOTE = ("http://", "https://", "s3://", "gs://", "az://")
PIPE = "pipe:"
ELSEWHERE = (*REMOTE, PIPE)  # how a location begins that is no path
GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)  # of reading a gzipped shard that is damaged
FIRST_BURST = 1 << 14  # bytes asked for after a jump; four times as many each time while reading goes on
CHUNK = 1 << 16  # bytes in which an answer is taken in, so that little is lost when it breaks off
PROGRESS = 1 << 16  # bytes without which a try counts as failed
READ_AHEAD = 1 << 16  # bytes, of a local file

T = TypeVar("T")


def resolve(name: str, root: str | None) -> str:
    """The location of a name: as it is, or below ``root``, a directory or a remote prefix."""
    if name.startswith(ELSEWHERE):
        return name
    if root is not None and root.startswith(REMOTE):
        return f"{root.rstrip('/')}/{name}"
    return str(Path(root or ".", name).expanduser())


def parent(location: str) -> str:
    """The directory, or remote prefix, in which a location lies."""
    return location.rpartition("/")[0] or "."


class Version(NamedTuple):
    """One version of a shard: its size in bytes, None if only its end tells, and a tag that changes with it."""

    size: int | None
    tag: str


class ShardStore:
    """Opens shards. It can be sent to other processes; each makes connections of its own.

    Args:
        config: how remote storage is reached. Credentials come from the environment alone.
        burst: most bytes of a range that is read ahead.
    """

    def __init__(self, config: Storage, burst: int = 1 << 25) -> None:
        self.config, self.burst = config, burst

    def version(self, location: str) -> Version:
        """What lies there now. Raises DataError when it does not exist or cannot be reached."""
        if location.startswith(PIPE):
            return Version(None, location)
        if location.startswith(REMOTE):
            client, key = self._client(location)
            return _version(self._retrying(location, lambda: obstore.head(client, key)))
        try:
            stat = Path(location).stat()
        except OSError as error:
            raise _unreadable(location, error) from None
        return _local_version(stat)

    def open(
        self, location: str, version: Version | None = None, stop: int | None = None, keep: bool = False
    ) -> BinaryIO:
        """A seekable file of the bytes, unzipped; of a remote one, nothing past ``stop`` is read ahead.

        ``keep`` fetches all of a remote one into the local cache, if there is one. Raises DataError when it is not
        there, or is not ``version`` any more.
        """
        raw = (self._cached(location, version) if keep else None) or self.open_stored(location, version, stop)
        is_gzip = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if is_gzip else raw

    def open_stored(self, location: str, version: Version | None = None, stop: int | None = None) -> BinaryIO:
        """As :meth:`open`, but the bytes as they are stored, gzip and all."""
        if location.startswith(PIPE):
            return cast(BinaryIO, io.BufferedReader(_Pipe(location.removeprefix(PIPE)), READ_AHEAD))
        if location.startswith(REMOTE):
            return cast(BinaryIO, _Remote(self, location, version or self.version(location), stop))
        return self._open_local(location, version)

    def _cached(self, location: str, version: Version | None) -> BinaryIO | None:
        """A remote object from the local cache; None if there is none, or no place in it."""
        if self.config.cache_dir is None or not location.startswith(REMOTE):
            return None
        version = version or self.version(location)
        size = version.size or 0

        def fetch(file: BinaryIO) -> None:
            for start in range(0, size, self.burst):
                file.write(self.read(location, version, start, min(start + self.burst, size)))

        cache = ShardCache(Path(self.config.cache_dir).expanduser(), int(self.config.cache_gib * 2**30))
        return cache.open(f"{self.config.endpoint_url} {location} {size} {version.tag}", size, fetch)

    def _open_local(self, location: str, version: Version | None) -> BinaryIO:
        try:
            raw = Path(location).open("rb", buffering=READ_AHEAD)  # noqa: SIM115 - the caller closes it
        except OSError as error:
            raise _unreadable(location, error) from None
        if version is not None and version != _local_version(os.fstat(raw.fileno())):
            raw.close()
            raise DataError(f"{location} changed since its samples were counted; start again")
        return raw

    def read(self, location: str, version: Version, start: int, stop: int) -> bytes:
        """Bytes ``start <= i < stop`` of a remote object: all of them, of this version. Raises DataError."""
        client, key = self._client(location)
        got, counted = bytearray(), 0

        def go_on() -> None:
            options: Any = {"range": (start + len(got), stop)}
            if version.tag.startswith('"'):  # a weak tag cannot be asked for; it is compared all the same
                options["if_match"] = version.tag
            answer = obstore.get(client, key, options=options)
            if _version(answer.meta) != version:
                raise PreconditionError
            for chunk in answer.stream(min_chunk_size=CHUNK):
                got.extend(chunk)
            if len(got) < stop - start:
                raise _Short(f"the answer ended {stop - start - len(got)} bytes early")

        def progressed() -> bool:
            nonlocal counted
            before, counted = counted, len(got)
            return counted - before >= PROGRESS

        self._retrying(location, go_on, progressed)
        if len(got) > stop - start:
            raise DataError(f"{location}: {len(got)} bytes came, {stop - start} were asked for")
        return bytes(got)

    def write(self, location: str, data: bytes | Path) -> None:
        """Put bytes, or a file's, there in place of what is there, whole or not at all. Raises DataError."""
        if location.startswith(REMOTE):
            client, key = self._client(location)
            self._retrying(location, lambda: obstore.put(client, key, data))
            return
        path = Path(location)
        scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(data, Path):
                shutil.copyfile(data, scratch)
            else:
                with scratch.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())  # it may be what says that other files are whole
            scratch.replace(path)
        except OSError as error:
            raise DataError(f"{location} cannot be written: {error.strerror}") from None

    def names(self, location: str) -> list[str]:
        """What lies directly in a directory, or below a remote prefix, sorted; nothing if it is not there."""
        if not location.startswith(REMOTE):
            return sorted(path.name for path in Path(location).iterdir()) if Path(location).is_dir() else []
        client, key = self._client(location)
        prefix = f"{key.rstrip('/')}/"
        found = self._retrying(location, lambda: obstore.list_with_delimiter(client, prefix))
        objects = [str(entry["path"]) for entry in found["objects"]]
        return sorted(posixpath.basename(path) for path in [*objects, *map(str, found["common_prefixes"])])

    def remove(self, location: str) -> None:
        """Remove a file or an object, or all below a directory or a remote prefix; nothing if it is not there."""
        if not location.startswith(REMOTE):
            path = Path(location)
            try:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            except OSError as error:
                raise DataError(f"{location} cannot be removed: {error.strerror}") from None
            return
        client, key = self._client(location)
        below = self._retrying(location, lambda: obstore.list(client, f"{key.rstrip('/')}/").collect())
        # S3 deletes what is not there without a word; other stores complain.
        paths = [str(entry["path"]) for entry in below] or [key]
        with contextlib.suppress(MissingError):
            self._retrying(location, lambda: obstore.delete(client, paths))

    def _retrying(self, location: str, attempt: Callable[[], T], progressed: Callable[[], bool] = lambda: False) -> T:
        failures = 0
        while True:
            try:
                return attempt()
            except (NotFoundError, FileNotFoundError):
                raise MissingError(f"{location} does not exist") from None
            except (PermissionDeniedError, UnauthenticatedError):
                raise RefusedError(
                    f"{location}: access was refused; credentials come from the environment, storage.anonymous=true "
                    "goes without"
                ) from None
            except PreconditionError:
                raise DataError(f"{location} changed since its samples were counted; start again") from None
            except (BaseError, _Short) as error:
                text = str(error).strip().splitlines()[0]
                if "Content-Length" in text:
                    raise DataError(f"{location}: the server does not say how long its answers are ({text})") from None
                failures = 0 if progressed() else failures + 1
                if failures > self.config.retries:
                    raise DataError(
                        f"{location} could not be read in {failures} tries ({text}); see storage.retries and "
                        "storage.timeout_s"
                    ) from None
                time.sleep(min(0.1 * 2**failures, 10.0))

    def _client(self, location: str) -> tuple[Any, str]:
        scheme, _, rest = location.partition("://")
        place, _, key = rest.partition("/")
        settings = tuple(vars(self.config).items())
        return _connect(f"{scheme}://{place}", settings), key


class _Short(Exception):
    pass


def _unreadable(location: str, error: OSError) -> DataError:
    kind = MissingError if isinstance(error, FileNotFoundError) else DataError
    return kind(f"{location} cannot be read: {error.strerror}")


def _local_version(stat: os.stat_result) -> Version:
    return Version(stat.st_size, str(stat.st_mtime_ns))


def _version(meta: Any) -> Version:
    return Version(meta["size"], meta["e_tag"] or str(meta["last_modified"]))


@cache
def _connect(url: str, settings: tuple[tuple[str, Any], ...]) -> Any:
    """A client of this process; obstore's must not be used in a fork."""
    given = dict(settings)
    timeout = timedelta(seconds=given["timeout_s"])
    client: dict[str, Any] = {"timeout": timeout, "connect_timeout": timeout, "allow_http": given["allow_http"]}
    options: dict[str, Any] = {}
    if url.startswith("http://"):
        client["allow_http"] = True
    if url.startswith("s3://"):
        named = {"endpoint": given["endpoint_url"], "region": given["region"]}
        options |= {key: value for key, value in named.items() if value is not None}
    if given["ca_bundle"] is not None:
        try:
            client["root_certificate"] = Path(given["ca_bundle"]).expanduser().read_bytes()
        except OSError as error:
            raise DataError(f"storage.ca_bundle={given['ca_bundle']} cannot be read: {error.strerror}") from None
    if given["anonymous"] and not url.startswith("http"):
        options["skip_signature"] = True
    # Retrying is ours: it has to know the last good byte.
    connect: Any = from_url  # typed for literal options alone
    return connect(url, client_options=client, retry_config={"max_retries": 0}, **options)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(4, thread_name_prefix="read-ahead")


class _Seekable(io.RawIOBase):
    """A file that can be read from any place."""

    _position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position


class _Remote(_Seekable):
    """A remote object as a seekable file. Ranges grow while reading goes on; the next is fetched while one is used."""

    def __init__(self, store: ShardStore, location: str, version: Version, stop: int | None) -> None:
        assert version.size is not None
        self._store, self._location, self._version, self._size = store, location, version, version.size
        self._stop = min(stop or self._size, self._size)
        self._start = 0
        self._data = b""
        self._burst = FIRST_BURST
        self._ahead: tuple[int, Future[bytes]] | None = None

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        stop = self._size if size < 0 else min(self._position + size, self._size)
        parts = []
        while self._position < stop:
            if not self._start <= self._position < self._start + len(self._data):
                self._load(stop)
            part = self._data[self._position - self._start : stop - self._start]
            self._position += len(part)
            parts.append(part)
        return b"".join(parts)

    def _load(self, wanted: int) -> None:
        goes_on = bool(self._data) and self._position == self._start + len(self._data)
        self._burst = min(self._burst * 4, self._store.burst) if goes_on else FIRST_BURST
        data = None
        if self._ahead is not None:
            place, future = self._ahead
            self._ahead = None
            data = future.result() if place == self._position else None
        if data is None:
            end = max(min(self._position + self._burst, self._stop), min(wanted, self._position + self._store.burst))
            data = self._store.read(self._location, self._version, self._position, end)
        self._start, self._data = self._position, data
        after = self._start + len(data)
        if goes_on and after < self._stop:
            end = min(after + self._burst, self._stop)
            future = _pool().submit(self._store.read, self._location, self._version, after, end)
            self._ahead = (after, future)


class _Pipe(_Seekable):
    """What a command prints, as a file: a jump forward reads on, one backward starts the command again."""

    def __init__(self, command: str) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            while self.read(READ_AHEAD):
                pass
            offset += self._position
        elif whence == io.SEEK_CUR:
            offset += self._position
        if offset < self._position:
            self._stop()
        while self._position < offset and self.read(min(READ_AHEAD, offset - self._position)):
            pass
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        if self._process is None:
            self._process = subprocess.Popen(self._command, shell=True, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        self._position += len(data)
        if not data and size and (code := self._process.wait()):
            raise DataError(f"pipe:{self._command} ended with code {code} after {self._position:,} bytes")
        return data

    def close(self) -> None:
        self._stop()
        super().close()

    def _stop(self) -> None:
        if self._process is not None:
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process.kill()
            self._process.wait()
        self._process, self._position = None, 0
