"""Tiles of the similarities between this rank's images and all texts; the whole n x M matrix never exists."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from clipscale.distributed.collectives import largest
from clipscale.losses.globalbatch import GlobalBatch, Hidden
from clipscale.losses.memory import CPU_TILE, CUDA_TILE

Tile = tuple[slice, slice]
TileShape = str | int | tuple[int, int]


@dataclass(frozen=True)
class Similarity:
    """``scale * x @ y.T + bias`` for ``x`` Float[n, D] and ``y`` Float[M, D], a tile at a time.

    ``dtype`` is what everything is added up in. Products are formed in it too, but those of halves on a GPU, whose
    tensor cores multiply halves and add in fp32.
    """

    x: torch.Tensor
    y: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype
    bias: torch.Tensor | None = None

    def logits(self, tile: Tile, out: torch.Tensor) -> torch.Tensor:
        """The logits of a tile, in ``out``."""
        x, y, scale = self.x[tile[0]], self.y[tile[1]], self.scale.to(self.dtype)
        if self.products is not self.dtype:
            torch.mul(torch.mm(x, y.to(x.dtype).T, out_dtype=torch.float32), scale, out=out)
        else:
            torch.mm(x.to(self.dtype) * scale, y.to(self.dtype).T, out=out)
        return out if self.bias is None else out.add_(self.bias.to(self.dtype))

    def pull(self, weights: torch.Tensor, tile: Tile, dx: torch.Tensor | None, dy: torch.Tensor | None) -> None:
        """Add to ``dx`` Float[n, D] and ``dy`` Float[M, D] what a tile of weights on the products x·y gives them."""
        if dx is not None:
            self._add_product(dx[tile[0]], weights, self.y[tile[1]])
        if dy is not None:
            self._add_product(dy[tile[1]], weights.T, self.x[tile[0]])

    @property
    def products(self) -> torch.dtype:
        """In which features are multiplied, and weights with features."""
        halves = self.x.dtype in (torch.float16, torch.bfloat16)
        return self.x.dtype if halves and self.x.is_cuda and self.dtype is torch.float32 else self.dtype

    @property
    def _rows(self) -> int:
        """Rows of features that are worked on in float64, or twice, at a time."""
        return 8 * CPU_TILE[0] if self.x.is_cuda else CPU_TILE[0]

    def _add_product(self, into: torch.Tensor, weights: torch.Tensor, features: torch.Tensor) -> None:
        if (half := self.products) is not self.dtype:
            into += torch.mm(weights.to(half), features.to(half), out_dtype=torch.float32)
        else:
            into.addmm_(weights, features.to(self.dtype))

    def positives(self, own: slice) -> torch.Tensor:
        """The logits of the pairs, Float64[n]; ``own`` are the columns of the rows."""
        y = self.y[own]
        dots = [
            (self.x[rows].double() * y[rows].double()).sum(1)
            for rows in blocks(len(self.x), self._rows)  # no double copy of all features
        ]
        logits = torch.cat(dots) * self.scale.double()
        return logits if self.bias is None else logits + self.bias.double()

    def pull_positives(
        self, weights: torch.Tensor, own: slice, dx: torch.Tensor | None, dy: torch.Tensor | None
    ) -> None:
        """As :meth:`pull`, for weights Float[n] on the products of the pairs."""
        for rows in blocks(len(self.x), self._rows):
            columns = slice(own.start + rows.start, own.start + rows.stop)
            weight = weights[rows, None].to(self.dtype)
            if dx is not None:
                dx[rows].addcmul_(weight, self.y[columns].to(self.dtype))
            if dy is not None:
                dy[columns].addcmul_(weight, self.x[rows].to(self.dtype))

    def pull_scale(self, dx: torch.Tensor | None, dy: torch.Tensor | None) -> torch.Tensor:
        """Sum of all weights times their products x·y, Float64[], from either gradient that they gave."""
        features, gradient = (self.x, dx) if dx is not None else (self.y, dy)
        assert gradient is not None
        parts = [
            (features[rows].to(self.dtype) * gradient[rows]).sum(1).double().sum()
            for rows in blocks(len(features), self._rows)
        ]
        return torch.stack(parts).sum()


def blocks(length: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size``."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


class Grid:
    """The tiles of a rank's rows and all columns, and the memory in which they are worked on."""

    def __init__(self, batch: GlobalBatch, hidden: Hidden | None, shape: TileShape, like: torch.Tensor) -> None:
        self.batch, self.hidden = batch, hidden
        rows, columns = _tile_shape(shape, like.is_cuda)
        self.rows, self.columns = min(rows, batch.n), min(columns, batch.columns)
        self._like = like
        self._scratch: dict[int, torch.Tensor] = {}

    def __iter__(self) -> Iterator[Tile]:
        for rows in blocks(self.batch.n, self.rows):
            for columns in blocks(self.batch.columns, self.columns):
                yield rows, columns

    def room(self, tile: Tile, number: int) -> torch.Tensor:
        """Memory of a tile's shape, the same for all tiles: allocating each anew costs more than filling it."""
        if number not in self._scratch:
            self._scratch[number] = self._like.new_empty(self.rows * self.columns)
        height, width = tile[0].stop - tile[0].start, tile[1].stop - tile[1].start
        return self._scratch[number][: height * width].view(height, width)

    def mask(self, tile: Tile) -> torch.Tensor | None:
        """Bool tile of hidden pairs, or None."""
        return None if self.hidden is None else self.hidden.mask(*tile)

    def hide(self, values: torch.Tensor, tile: Tile, mask: torch.Tensor | None, value: float = 0.0) -> torch.Tensor:
        """Put ``value`` where the pairs are, which no sum contains, and where ``mask`` is true."""
        rows, columns, first = *tile, self.batch.first
        start = max(rows.start, columns.start - first)
        stop = min(rows.stop, columns.stop - first)
        if start < stop:
            square = values[start - rows.start : stop - rows.start]
            square = square[:, first + start - columns.start : first + stop - columns.start]
            square.diagonal().fill_(value)
        return values if mask is None else values.masked_fill_(mask, value)


def largest_beside(one: Similarity, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logit beside a pair's own and beside hidden ones, in its row and in its column, Float[n] each, over
    all ranks. A collective, and a walk of its own."""
    batch = grid.batch
    rows, columns = (one.x.new_full((length,), -math.inf, dtype=one.dtype) for length in (batch.n, batch.columns))
    for tile in grid:
        logits = grid.hide(one.logits(tile, grid.room(tile, 0)), tile, grid.mask(tile), -math.inf)
        for found, part, dim in ((rows, tile[0], 1), (columns, tile[1], 0)):
            found[part] = torch.maximum(found[part], logits.amax(dim))
    return rows, largest(columns, batch.group)[batch.own]


def _tile_shape(shape: TileShape, cuda: bool) -> tuple[int, int]:
    if shape == "auto":
        return CUDA_TILE if cuda else CPU_TILE
    rows, columns = (shape, shape) if isinstance(shape, int) else shape if isinstance(shape, tuple) else (0, 0)
    if rows < 1 or columns < 1:
        raise ValueError(f"tile={shape!r} must be 'auto', a number of rows and columns, or (rows, columns)")
    return rows, columns
