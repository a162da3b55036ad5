"""Exact neighbours: every vector is compared, block by block, in fp32."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

# Elements of a block: 2 MB of fp32 stay in a core's cache while they are converted and multiplied. With blocks of 16
# times that, one query took twice as long on vectors of float16, and more where others used the memory.
BLOCK = 1 << 19


def nearest(
    chunks: Iterable[NDArray[Any]], queries: torch.Tensor, k: int, allowed: NDArray[np.bool_] | None = None
) -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """The rows with the k highest dot products, for each query: ``(scores, rows)``, best first, the earlier row of two
    that score the same.

    Args:
        chunks: Float[n, D] each, of any float type; their rows are numbered on.
        queries: Float32[Q, D].
        k: how many; fewer come back where there are not as many. A score that is no number is never among them.
        allowed: Bool[N], rows that may be found; all by default.
    """
    none = (torch.empty(0), torch.empty(0, dtype=torch.int64))
    found = [none] * len(queries)
    # What a row must exceed: later rows lose a tie.
    floor = torch.full((len(queries), 1), -torch.inf)
    start = 0
    for block in _blocks(chunks):
        scores = queries @ block.T
        if allowed is not None:
            scores[:, torch.from_numpy(~allowed[start : start + len(block)])] = -torch.inf
        better = scores > floor
        for query in better.any(dim=1).nonzero()[:, 0].tolist():
            places = better[query].nonzero()[:, 0]
            before = found[query]
            merged = torch.cat([before[0], scores[query, places]]), torch.cat([before[1], places + start])
            best, order = merged[0].sort(descending=True, stable=True)
            found[query] = best[:k], merged[1][order[:k]]
            if len(best) >= k:
                floor[query] = best[k - 1]
        start += len(block)
    return [(scores.numpy(), rows.numpy()) for scores, rows in found]


def _blocks(chunks: Iterable[NDArray[Any]]) -> Iterable[torch.Tensor]:
    """The vectors in blocks that fit the cache, Float32[n, D]; a block lives until the next one is asked for."""
    room: torch.Tensor | None = None
    for chunk in chunks:
        rows = max(1, BLOCK // chunk.shape[1])
        if room is None or room.shape != (rows, chunk.shape[1]):
            room = torch.empty(rows, chunk.shape[1])
        for start in range(0, len(chunk), rows):
            part = torch.from_numpy(chunk[start : start + rows])
            block = room[: len(part)]
            block.copy_(part)
            yield block
