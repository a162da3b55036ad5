"""Tiles of the plain losses as Triton kernels: logits never leave the chip, and no decision waits for the host.

They do what ``softmax.py`` and ``sigmoid.py`` do with torch's operations, a super-tile (a :data:`Tile`) at a launch,
in blocks that a program each works on. Sums are deterministic: a program writes those of its block, and torch adds the
blocks' up. Float64 takes over where fp32 does not suffice, as there, but by a flag on the device: its kernels are
launched in any case, with few programs, and return at once unless the flag is set.

Products of halves are added in fp32 on tensor cores; fp32 features are multiplied as fp32, never as TF32. Nothing but
this file imports triton, which there is not on every machine.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from clipscale.losses.tiles import Grid, Similarity, Tile

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1 when this was imported: kernels run on a CPU
CAPABILITY = (8, 0)  # bfloat16 and asynchronous copies
EXACT_PROGRAMS = 1024  # enough for any GPU, and little to launch in vain
_UNSPECIALIZED = ["first", "row_start", "row_stop", "column_start", "column_stop"]  # no compilation for each edge
TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def run_on(device: torch.device) -> bool:
    """Whether the kernels can run there; ROCm, whose devices are called CUDA's too, has less memory for blocks."""
    if device.type == "cuda" and torch.version.hip is None:
        return torch.cuda.get_device_capability(device) >= CAPABILITY
    return INTERPRETED


@triton.jit
def _place(program, rows, columns, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr = 8):
    """Block of rows and block of columns that a program works on: GROUP rows of blocks are gone through together, so
    that their features stay in the L2 cache."""
    high, wide = tl.cdiv(rows, BM), tl.cdiv(columns, BN)
    group = program // (GROUP * wide)
    height = tl.minimum(high - group * GROUP, GROUP)
    within = program % (GROUP * wide)
    return group * GROUP + within % height, within // height


@triton.jit
def _logits(
    x, y, scale, rows, columns, row_stop, column_stop,
    D: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """scale * x @ y.T of a block, products formed in DOT; beyond the edge those of the last row or column."""
    wide: tl.constexpr = tl.float64 if tl.float64 == DOT else tl.float32
    x_rows = x + tl.minimum(rows, row_stop - 1).to(tl.int64)[:, None] * D
    y_rows = y + tl.minimum(columns, column_stop - 1).to(tl.int64)[None, :] * D
    products = tl.zeros((BM, BN), dtype=wide)
    for start in range(0, D, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(x_rows + k[None, :], mask=k[None, :] < D, other=0.0)
        # Texts may have come in another type; they count in that of the images, as everywhere.
        b = tl.load(y_rows + k[:, None], mask=k[:, None] < D, other=0.0)
        products = tl.dot(a.to(DOT), b.to(DOT), products, input_precision="ieee", out_dtype=wide)
    return products * tl.load(scale).to(wide)


@triton.jit
def _counted(rows, columns, row_stop, column_stop, first, hidden):
    """Whether a pair is within the tile, not the row's own, and not hidden."""
    row_ids, column_ids, more_row_ids, more_column_ids, paired, absent = hidden
    row, column = tl.minimum(rows, row_stop - 1), tl.minimum(columns, column_stop - 1)
    counted = (rows < row_stop)[:, None] & (columns < column_stop)[None, :]
    counted &= columns[None, :] != rows[:, None] + first
    if row_ids is not None:
        same = tl.load(row_ids + row)[:, None] == tl.load(column_ids + column)[None, :]
        if more_row_ids is not None:
            same |= tl.load(more_row_ids + row)[:, None] == tl.load(more_column_ids + column)[None, :]
        if paired is not None:
            same &= (tl.load(paired + column) != 0)[None, :]
        counted &= same == 0
    if absent is not None:
        counted &= (tl.load(absent + column) == 0)[None, :]
    return counted


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _sums(
    x, y, scale, hidden, first, row_start, row_stop, column_start, column_stop, shift, row_parts, column_parts,
    D: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Sums of exp(S - shift) over a block's columns and over its rows."""
    height, width = row_stop - row_start, column_stop - column_start
    row_block, column_block = _place(tl.program_id(0), height, width, BM, BN)
    i, j = row_block * BM + tl.arange(0, BM), column_block * BN + tl.arange(0, BN)
    rows, columns = row_start + i, column_start + j
    values = tl.exp(_logits(x, y, scale, rows, columns, row_stop, column_stop, D, DOT, BM, BN, BK) - tl.load(shift))
    values = tl.where(_counted(rows, columns, row_stop, column_stop, first, hidden), values, 0.0)
    tl.store(row_parts + column_block * height + i, tl.sum(values, 1), mask=i < height)
    tl.store(column_parts + row_block * width + j, tl.sum(values, 0), mask=j < width)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _exact_sums(
    x, y, scale, hidden, first, row_start, row_stop, column_start, column_stop, flag, shift, row_sums, column_sums,
    D: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Sums of exp(S - shift): a program has all of its rows, or of its columns, so that there are no parts to add."""
    if tl.load(flag) == 0:
        return
    taken = tl.load(shift).to(tl.float64)
    program, high = tl.program_id(0), tl.cdiv(row_stop, BM)
    if program < high:
        rows, sums = program * BM + tl.arange(0, BM), tl.zeros((BM,), dtype=tl.float64)
        for start in range(0, column_stop, BN):
            columns = start + tl.arange(0, BN)
            values = tl.exp(_logits(x, y, scale, rows, columns, row_stop, column_stop, D, DOT, BM, BN, BK) - taken)
            sums += tl.sum(tl.where(_counted(rows, columns, row_stop, column_stop, first, hidden), values, 0.0), 1)
        tl.store(row_sums + rows, sums, mask=rows < row_stop)
    else:
        columns, sums = (program - high) * BN + tl.arange(0, BN), tl.zeros((BN,), dtype=tl.float64)
        for start in range(0, row_stop, BM):
            rows = start + tl.arange(0, BM)
            values = tl.exp(_logits(x, y, scale, rows, columns, row_stop, column_stop, D, DOT, BM, BN, BK) - taken)
            sums += tl.sum(tl.where(_counted(rows, columns, row_stop, column_stop, first, hidden), values, 0.0), 0)
        tl.store(column_sums + columns, sums, mask=columns < column_stop)


@triton.jit
def _weigh(
    block, x, y, scale, hidden, first, row_start, row_stop, column_start, column_stop, shift, u, v, out, pitch,
    D: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """exp(S - shift) * (u_row + v_column) of a block."""
    height, width = row_stop - row_start, column_stop - column_start
    row_block, column_block = _place(block, height, width, BM, BN)
    i, j = row_block * BM + tl.arange(0, BM), column_block * BN + tl.arange(0, BN)
    rows, columns = row_start + i, column_start + j
    logits = _logits(x, y, scale, rows, columns, row_stop, column_stop, D, DOT, BM, BN, BK)
    u_row = tl.load(u + rows, mask=i < height, other=0.0).to(logits.dtype)
    v_column = tl.load(v + columns, mask=j < width, other=0.0).to(logits.dtype)
    values = tl.exp(logits - tl.load(shift).to(logits.dtype)) * (u_row[:, None] + v_column[None, :])
    values = tl.where(_counted(rows, columns, row_stop, column_stop, first, hidden), values, 0.0)
    places = out + i.to(tl.int64)[:, None] * pitch + j[None, :]
    tl.store(places, values.to(out.dtype.element_ty), mask=(i < height)[:, None] & (j < pitch)[None, :])


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _weights(
    x, y, scale, hidden, first, row_start, row_stop, column_start, column_stop, shift, u, v, out, pitch,
    D: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    _weigh(
        block, x, y, scale, hidden, first, row_start, row_stop, column_start, column_stop, shift, u, v, out, pitch,
        D, DOT, BM, BN, BK,
    )  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _exact_weights(
    x, y, scale, hidden, first, row_start, row_stop, column_start, column_stop, flag, shift, u, v, out, pitch,
    D: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    if tl.load(flag) == 0:
        return
    blocks = tl.cdiv(row_stop - row_start, BM) * tl.cdiv(column_stop - column_start, BN)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        _weigh(
            block, x, y, scale, hidden, first, row_start, row_stop, column_start, column_stop, shift, u, v, out, pitch,
            D, DOT, BM, BN, BK,
        )  # fmt: skip


@triton.jit
def _log1p(u):
    """log(1 + u) for u between 0 and 1, all digits of it: 2 artanh(z), whose series ends below fp32's rounding."""
    z = u / (2 + u)
    square = z * z
    series = 1 / 11 + square * (1 / 13)
    series = 1 / 7 + square * (1 / 9 + square * series)
    series = 1 / 3 + square * (1 / 5 + square * series)
    return 2 * z * (1 + square * series)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _sigmoid(
    x, y, scale, hidden, first, row_start, row_stop, column_start, column_stop, bias, values, totals, out, pitch,
    D: tl.constexpr, DOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """sigmoid(S), and the sums over a block of it and of log(1 + exp(S))."""
    height, width = row_stop - row_start, column_stop - column_start
    row_block, column_block = _place(tl.program_id(0), height, width, BM, BN)
    i, j = row_block * BM + tl.arange(0, BM), column_block * BN + tl.arange(0, BN)
    rows, columns = row_start + i, column_start + j
    logits = _logits(x, y, scale, rows, columns, row_stop, column_stop, D, DOT, BM, BN, BK)
    logits += tl.load(bias).to(logits.dtype)
    small = tl.exp(-tl.abs(logits))
    counted = _counted(rows, columns, row_stop, column_stop, first, hidden)
    weights = tl.where(counted, tl.where(logits < 0, small, 1.0) / (1 + small), 0.0)
    softplus = tl.where(counted, tl.maximum(logits, 0.0) + _log1p(small), 0.0)
    tl.store(values + tl.program_id(0), tl.sum(tl.sum(softplus, 1), 0))
    tl.store(totals + tl.program_id(0), tl.sum(tl.sum(weights, 1), 0))
    places = out + i.to(tl.int64)[:, None] * pitch + j[None, :]
    tl.store(places, weights.to(out.dtype.element_ty), mask=(i < height)[:, None] & (j < pitch)[None, :])


class Blocks(NamedTuple):
    """A program's block of rows and columns, the dimensions that it multiplies at a time, and how it is compiled."""

    rows: int
    columns: int
    dimensions: int
    warps: int
    stages: int


def blocks(products: torch.dtype, dimensions: int) -> Blocks:
    """Blocks for features Float[_, D] that are multiplied as ``products``.

    They fit the registers, and the shared memory (99 KB on the smallest), of GPUs from the A100 on.
    """
    if products is torch.float64:
        chosen = Blocks(64, 64, 16, 4, 2)
    elif products is torch.float32:
        chosen = Blocks(128, 128, 32, 8, 2)
    else:
        chosen = Blocks(128, 128, 64, 8, 3)
    return chosen._replace(dimensions=min(chosen.dimensions, max(16, triton.next_power_of_2(dimensions))))


def constants(products: torch.dtype, blocks: Blocks, dimensions: int) -> dict[str, Any]:
    """What a kernel is compiled for beside the types of its arguments."""
    return dict(D=dimensions, DOT=TYPES[products], BM=blocks.rows, BN=blocks.columns, BK=blocks.dimensions)


class _Launch:
    """Kernels on the tiles of a similarity, in its own arithmetic or, if ``exact``, in float64."""

    def __init__(self, one: Similarity, grid: Grid, exact: bool = False) -> None:
        self._one, self._grid = one, grid
        products, dimensions = torch.float64 if exact else one.products, one.x.shape[1]
        self._blocks = blocks(products, dimensions)
        self._options = constants(products, self._blocks, dimensions)
        self._options |= dict(num_warps=self._blocks.warps, num_stages=self._blocks.stages)

    def __call__(self, kernel: Any, programs: int, tile: Tile, *arguments: Any) -> None:
        one, (rows, columns) = self._one, tile
        given = (one.x, one.y, one.scale, _hidden(self._grid), self._grid.batch.first)
        with torch.cuda.device_of(one.x):
            kernel[(programs,)](*given, rows.start, rows.stop, columns.start, columns.stop, *arguments, **self._options)

    def high(self, tile: Tile) -> int:
        """Blocks of a tile's rows."""
        return triton.cdiv(tile[0].stop - tile[0].start, self._blocks.rows)

    def wide(self, tile: Tile) -> int:
        """Blocks of a tile's columns."""
        return triton.cdiv(tile[1].stop - tile[1].start, self._blocks.columns)


def _hidden(grid: Grid) -> tuple[torch.Tensor | None, ...]:
    hidden = grid.hidden
    if hidden is None:
        return (None,) * 6
    ids: list[torch.Tensor | None] = [x for pair in zip(hidden.rows, hidden.columns, strict=True) for x in pair]
    return (*ids, *[None] * (4 - len(ids)), hidden.paired, hidden.absent)


def add_sums(one: Similarity, shift: torch.Tensor, grid: Grid, rows: torch.Tensor, columns: torch.Tensor) -> None:
    """Add the sums of exp(S - shift), formed in fp32, over all but the pairs and what is hidden to ``rows`` Float64[n]
    and ``columns`` Float64[M]; ``shift`` is Float32[] on the device."""
    launch = _Launch(one, grid)
    for tile in grid:
        high, wide = launch.high(tile), launch.wide(tile)
        row_parts = one.x.new_empty(wide, tile[0].stop - tile[0].start, dtype=torch.float32)
        column_parts = one.x.new_empty(high, tile[1].stop - tile[1].start, dtype=torch.float32)
        launch(_sums, high * wide, tile, shift, row_parts, column_parts)
        rows[tile[0]] += row_parts.sum(0, dtype=torch.float64)
        columns[tile[1]] += column_parts.sum(0, dtype=torch.float64)


def exact_sums(
    one: Similarity, shift: torch.Tensor, flag: torch.Tensor, grid: Grid, rows: torch.Tensor, columns: torch.Tensor
) -> None:
    """If ``flag`` Bool[] is set, put what :func:`add_sums` adds, formed in float64, in ``rows`` and ``columns``."""
    everything = slice(0, len(rows)), slice(0, len(columns))
    launch = _Launch(one, grid, exact=True)
    programs = launch.high(everything) + launch.wide(everything)
    launch(_exact_sums, programs, everything, flag, shift, rows, columns)


def weights(
    one: Similarity,
    shift: torch.Tensor,
    flag: torch.Tensor,
    grid: Grid,
    tile: Tile,
    rows: torch.Tensor,
    columns: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """``exp(S - shift) * (rows_i + columns_j)`` of a tile in ``out``, 0 for the pairs and what is hidden.

    ``rows`` Float64[n] and ``columns`` Float64[M]. Formed in fp32, and in float64 if ``flag`` Bool[] is set.
    """
    for exact in (False, True):
        launch = _Launch(one, grid, exact)
        programs = launch.high(tile) * launch.wide(tile)
        arguments = shift, rows, columns, out, out.stride(0)
        if exact:
            launch(_exact_weights, min(programs, EXACT_PROGRAMS), tile, flag, *arguments)
        else:
            launch(_weights, programs, tile, *arguments)
    return out


def sigmoid(one: Similarity, grid: Grid, tile: Tile, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sigmoid(S) of a tile in ``out``, 0 for the pairs and what is hidden; the sums of log(1 + exp(S)) and of
    sigmoid(S), Float64[] each."""
    launch = _Launch(one, grid)
    programs = launch.high(tile) * launch.wide(tile)
    parts = one.x.new_empty(2, programs, dtype=torch.float32)
    launch(_sigmoid, programs, tile, one.bias, parts[0], parts[1], out, out.stride(0))
    value, total = parts.sum(1, dtype=torch.float64)
    return value, total
