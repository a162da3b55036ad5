"""The local cache of remote shards: bounded, shared by processes, never wrong."""

from __future__ import annotations

import multiprocessing
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import pytest

from clipscale.data.cache import PART, ShardCache
from clipscale.errors import DataError


def _content(name: str, size: int) -> bytes:
    return random.Random(name).randbytes(size)


def _open(cache: ShardCache, name: str, size: int, fetched: list[str] | None = None) -> bytes | None:
    def fetch(file: BinaryIO) -> None:
        if fetched is not None:
            fetched.append(name)
        file.write(_content(name, size))

    file = cache.open(name, size, fetch)
    if file is None:
        return None
    with file:
        return file.read()


def _bytes_in(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def test_a_file_is_fetched_once(tmp_path: Path) -> None:
    cache, fetched = ShardCache(tmp_path / "deep" / "cache", 1000), []
    for _ in range(3):
        assert _open(cache, "a", 100, fetched) == _content("a", 100)
    assert fetched == ["a"]


def test_the_least_recently_used_make_room(tmp_path: Path) -> None:
    cache, fetched = ShardCache(tmp_path, 300), []
    for name in ("a", "b", "c", "a", "d", "a", "b"):
        assert _open(cache, name, 100, fetched) == _content(name, 100)
        assert _bytes_in(tmp_path) <= 300
    assert fetched == ["a", "b", "c", "d", "b"]


def test_a_file_in_use_survives_being_evicted(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 100)
    held = cache.open("a", 100, lambda file: file.write(_content("a", 100)) and None)
    assert held is not None
    assert _open(cache, "b", 100) == _content("b", 100)
    assert held.read() == _content("a", 100)


def test_what_does_not_fit_is_not_kept(tmp_path: Path) -> None:
    assert _open(ShardCache(tmp_path, 100), "a", 101) is None
    (tmp_path / "file").write_text("in the way")
    assert _open(ShardCache(tmp_path / "file", 100), "a", 10) is None


def test_a_failed_fetch_leaves_nothing(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 100)

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise DataError("the server is gone")

    with pytest.raises(DataError):
        cache.open("a", 100, fail)
    assert _bytes_in(tmp_path) == 0 and _open(cache, "a", 100) == _content("a", 100)


def test_what_a_killed_process_left_makes_room(tmp_path: Path) -> None:
    (tmp_path / f"stale{PART}").write_bytes(b"x" * 90)
    assert _open(ShardCache(tmp_path, 100), "a", 50) == _content("a", 50)
    assert not (tmp_path / f"stale{PART}").exists()


def _hammer(arguments: tuple[Path, int]) -> list[str]:
    directory, seed = arguments
    chance, fetched = random.Random(seed), []
    cache = ShardCache(directory, 1000)
    for _ in range(200):
        name = f"shard{chance.randrange(12)}"
        got = _open(cache, name, 200, fetched)
        assert got is None or got == _content(name, 200)
    return fetched


def test_many_processes_and_threads(tmp_path: Path) -> None:
    with multiprocessing.get_context("forkserver").Pool(4) as pool, ThreadPoolExecutor(4) as threads:
        others = pool.map_async(_hammer, [(tmp_path, seed) for seed in range(4)])
        list(threads.map(_hammer, [(tmp_path, seed) for seed in range(4, 8)]))
        others.get(timeout=120)
        pool.close()  # not terminated: they may have inherited that SIGTERM does nothing
        pool.join()
    assert _bytes_in(tmp_path) <= 1000 and not list(tmp_path.glob(f"*{PART}"))
