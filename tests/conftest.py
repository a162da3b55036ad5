"""Fixtures that all tests share: one worker pool per world size, and the real shards where they are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")

from tests.pool import Pool

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long campaigns run when they are asked for: CLIPSCALE_SLOW=1 pytest -m slow."""
    if os.environ.get("CLIPSCALE_SLOW") != "1":
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: set CLIPSCALE_SLOW=1"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real image-text shards."""
    if not SHARED_DATA.is_dir():
        pytest.skip("shared data absent")
    return SHARED_DATA


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Indexes and built-in data of the tests, away from the user's own."""
    directory = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(directory)
    yield directory


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with fresh weights, as a directory that every command takes."""
    from tests.tiny import write_tiny  # imports torch

    return write_tiny(tmp_path_factory.mktemp("tiny") / "model")


def _pool(world: int) -> Iterator[Pool]:
    pool = Pool(world)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pool2(caches: Path) -> Iterator[Pool]:
    """Two gloo ranks."""
    yield from _pool(2)


@pytest.fixture(scope="session")
def pool4(caches: Path) -> Iterator[Pool]:
    """Four gloo ranks."""
    yield from _pool(4)


@pytest.fixture(scope="session")
def pools(pool2: Pool, pool4: Pool) -> dict[int, Pool]:
    """Pools by world size."""
    return {2: pool2, 4: pool4}
