"""The ranks end with the tests of this directory: what follows has the cores and the memory to itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.pool import Pool


@pytest.fixture(scope="package", autouse=True)
def ranks_end(pools: dict[int, Pool]) -> Iterator[None]:
    """A test elsewhere that asks for ranks starts them anew."""
    yield
    for pool in pools.values():
        pool.close()
