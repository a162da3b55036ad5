"""The symmetric softmax loss over tiles, with any soft targets: the engine of the clip and distillation losses.

Rows are this rank's n images, columns the M texts of all ranks, S their logits. Each row and each column of a pair has
the cross entropy of a target q against the softmax p of its logits, where the target puts most on the pair itself.
With the pair's logit taken out of every sum, ::

    -sum_j q_j log p_j  =  log(1 + sum_{j≠i} exp(S_j - S_i))  +  sum_{j≠i} q_j (S_i - S_j)

loses no digit when the pair stands far above the others, where the usual ``logsumexp(S) - S_i`` cancels; and
``p_i - q_i``, the gradient of S_i, is had from the same sums.

One exponential per logit serves rows and columns: ``E = exp(S - shift)`` with one number for the shift, 0 for scales up
to about 75, and else what keeps the sums of unit vectors' from overflowing. Where a row or column lies too far below
to be resolved, or the features are no unit vectors, this rank goes through its tiles once more in float64, which has
the range. Sums are kept in float64 in any case: they are only n + M numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import islice
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from clipscale.distributed.collectives import Gathering
from clipscale.losses.globalbatch import GlobalBatch, Hidden
from clipscale.losses.tiles import Grid, Maxima, Similarity, Tile, TileShape

RANGE = 88.7  # log of the largest fp32
RESOLVED = 61.0  # below the shift: what is lost underneath, exp(-87) each, is less than fp32's rounding of such a total
SLACK = 1.02  # on the norms of rounded unit vectors


@dataclass(frozen=True)
class Task:
    """What is to be computed: everything but the tensors that have gradients.

    ``teachers`` are similarities whose softmax is the target, to the part ``weight``, and ``untaught`` Bool[M] the
    columns of which they know nothing; ``smoothing`` spreads so much of the target evenly. ``gathering`` is that of the
    columns, if it has begun.
    """

    batch: GlobalBatch
    hidden: Hidden | None
    untaught: torch.Tensor | None = None
    teachers: tuple[Similarity, ...] = ()
    weight: float = 0.0
    smoothing: float = 0.0
    tile: TileShape = "auto"
    cache_bytes: int = 0
    comm_dtype: torch.dtype | None = None
    maxima: bool = False
    kernels: ModuleType | None = None
    gathering: Gathering | None = None

    @property
    def fused(self) -> ModuleType | None:
        """The kernels, where they suffice: they know the student's similarities only, and keep no exponentials."""
        return None if self.teachers or self.smoothing or self.maxima else self.kernels

    def gather(self, columns: torch.Tensor) -> torch.Tensor:
        """Columns of all ranks, [M, D], from those of this one; not differentiable."""
        sent = columns.to(self.comm_dtype or columns.dtype)
        if self.gathering is None:
            return self.batch.gather(sent)
        everyone = self.gathering.wait()
        if (everyone.shape, everyone.dtype) != ((self.batch.columns, sent.shape[1]), sent.dtype):
            raise ValueError(
                f"gathering brings {everyone.dtype} {tuple(everyone.shape)}, the texts of all ranks are {sent.dtype} "
                f"{(self.batch.columns, sent.shape[1])}"
            )
        return everyone


@dataclass(frozen=True)
class _Softmax:
    """The student's similarities and the teachers' in one arithmetic, and what is taken off the logits of each.

    ``exact`` Bool[] is the kernels', and says that those are float64 after all.
    """

    task: Task
    similarities: list[Similarity]
    shifts: list[torch.Tensor]
    exact: torch.Tensor | None = None

    @classmethod
    def of(cls, task: Task, student: Similarity, dtype: torch.dtype) -> _Softmax:
        similarities = [replace(one, dtype=dtype) for one in (student, *task.teachers)]
        return cls(task, similarities, [_shift(one, task.batch.columns) for one in similarities])

    def __len__(self) -> int:
        return len(self.similarities)

    def grid(self) -> Grid:
        student = self.similarities[0]
        dtype = student.products if self.task.fused else student.dtype
        return Grid(self.task.batch, self.task.hidden, self.task.tile, student.x.new_empty(0, dtype=dtype))

    def exponentials(
        self, number: int, grid: Grid, tile: Tile, mask: torch.Tensor | None, out: torch.Tensor
    ) -> torch.Tensor:
        """exp(S - shift) of a similarity, 0 for the pairs and where it is hidden."""
        if number and self.task.untaught is not None:
            strange = self.task.untaught[tile[1]].expand_as(out)
            mask = strange if mask is None else mask | strange
        return grid.hide(self.exp(number, self.similarities[number].logits(tile, out)), tile, mask)

    def exp(self, number: int, logits: torch.Tensor) -> torch.Tensor:
        """exp(S - shift), in place."""
        shift = self.shifts[number]
        if logits.is_cuda or shift.item():
            logits.sub_(shift)
        return logits.exp_()


def _shift(one: Similarity, columns: int) -> torch.Tensor:
    if one.dtype is torch.float64:
        return torch.zeros((), dtype=one.dtype, device=one.x.device)
    largest = SLACK * one.scale.abs().max().to(one.dtype)
    return (largest - (RANGE - math.log(columns) - 2)).clamp(min=0)


class _Sums:
    """What one walk over the tiles adds up.

    ``rows`` Float64[q, n] and ``columns`` Float64[q, M] hold q sums over the pairs that are neither the own one nor
    hidden: of exp(S) for each similarity, then of exp(S_t) S for each teacher, then, with smoothing, of S and of 1.
    ``kept`` are exponentials that fitted the cache.
    """

    def __init__(self, softmax: _Softmax, keep: bool) -> None:
        task, student = softmax.task, softmax.similarities[0]
        self.softmax, count = softmax, 2 * len(softmax) - 1 + (2 if task.smoothing else 0)
        self.rows = student.x.new_zeros(count, task.batch.n, dtype=torch.float64)
        self.columns = student.x.new_zeros(count, task.batch.columns, dtype=torch.float64)
        self.maxima = Maxima(task.batch, student.x.new_empty(0, dtype=student.dtype)) if task.maxima else None
        self.kept: list[tuple[Tile, list[torch.Tensor]]] = []
        budget = task.cache_bytes if keep and student.dtype is not torch.float64 else 0
        grid = softmax.grid()
        if task.fused:
            task.fused.add_sums(student, softmax.shifts[0], grid, self.rows[0], self.columns[0])
            return
        for tile in grid:
            budget -= len(softmax) * grid.room(tile, 0).nbytes
            exponentials = self._take_in(grid, tile, fresh=budget >= 0)
            if budget >= 0:
                self.kept.append((tile, exponentials))

    def _take_in(self, grid: Grid, tile: Tile, fresh: bool) -> list[torch.Tensor]:
        """Add a tile, and return its exponentials for each similarity, in memory of their own if ``fresh``."""
        softmax, mask, count = self.softmax, grid.mask(tile), len(self.softmax)
        rooms = [torch.empty_like(grid.room(tile, i)) if fresh else grid.room(tile, i) for i in range(count)]
        logits = softmax.similarities[0].logits(tile, rooms[0])
        if softmax.task.smoothing:
            self._add(2 * count - 1, grid.hide(logits, tile, mask), tile)
            self._add(2 * count, grid.hide(torch.ones_like(logits), tile, mask), tile)
        for i in range(1, count):
            factor = softmax.shifts[i].double().exp()
            taught = softmax.exponentials(i, grid, tile, mask, rooms[i])
            self._add(i, taught, tile, factor)
            self._add(count - 1 + i, torch.mul(taught, logits, out=grid.room(tile, count)), tile, factor)
        if self.maxima is not None:
            self.maxima.note(grid.hide(logits, tile, mask, -math.inf), tile)
        self._add(0, grid.hide(softmax.exp(0, logits), tile, mask), tile, softmax.shifts[0].double().exp())
        return rooms

    def _add(self, quantity: int, values: torch.Tensor, tile: Tile, factor: torch.Tensor | float = 1.0) -> None:
        self.rows[quantity, tile[0]] += values.sum(1).double() * factor
        self.columns[quantity, tile[1]] += values.sum(0).double() * factor

    def made_exact(self, positives: torch.Tensor, keep: bool) -> _Sums:
        """These sums, or those of float64 where fp32's do not suffice; kernels decide that on the device."""
        softmax, student, bad = self.softmax, self.softmax.similarities[0], self.out_of_range(positives)
        fused = softmax.task.fused
        if fused is None:
            return _Sums(_Softmax.of(softmax.task, student, torch.float64), keep) if bool(bad) else self
        rows, columns = torch.zeros_like(self.rows), torch.zeros_like(self.columns)
        fused.exact_sums(student, bad, softmax.grid(), rows[0], columns[0])
        self.rows, self.columns = torch.where(bad, rows, self.rows), torch.where(bad, columns, self.columns)
        self.softmax = replace(softmax, shifts=[torch.where(bad, 0, shift) for shift in softmax.shifts], exact=bad)
        return self

    def out_of_range(self, positives: torch.Tensor) -> torch.Tensor:
        """Bool[], whether fp32 could not hold or resolve some sum; ``positives`` Float64[1 + T, n]."""
        bad = ~(self.rows.isfinite().all() & self.columns.isfinite().all())
        paired = self.softmax.task.batch.paired(self.rows.device)
        for i, shift in enumerate(self.softmax.shifts):
            least = torch.exp(shift.double() - RESOLVED)
            low = (self.rows[i] + positives[i].exp() < least).any() | ((self.columns[i] < least) & paired).any()
            bad = bad | (low & (shift > 0))
        return bad


@dataclass
class _Side:
    """What the sums of the rows, or of the columns, say: all Float64, one entry per row or column.

    ``loss``; ``pull`` of a pair's own logit, p_i - q_i; ``inverse`` Float64[1 + T, L], 1 / sum of exp(S) for each
    similarity; ``even``, the smoothed target of each other pair.
    """

    loss: torch.Tensor
    pull: torch.Tensor
    inverse: torch.Tensor
    even: torch.Tensor

    @classmethod
    def of(cls, task: Task, sums: torch.Tensor, positives: torch.Tensor) -> _Side:
        count = len(positives)
        others, own = sums[:count].log(), positives  # log of the sum over the others; -inf where there are none
        gap = others[0] - own[0]
        loss = torch.logaddexp(gap, torch.zeros_like(gap))
        pull = -torch.sigmoid(gap)
        inverse = torch.exp(-torch.logaddexp(others, own))
        even = torch.zeros_like(loss)
        if task.smoothing:
            total, number = sums[2 * count - 1], sums[2 * count] + 1
            even = task.smoothing / number
            loss = loss + even * ((number - 1) * own[0] - total)
            pull = pull + even * (number - 1)
        for i in range(1, count):
            part = task.weight / (count - 1) * inverse[i]
            loss = loss + part * (own[0] * sums[i] - sums[count - 1 + i])
            pull = pull + part * sums[i]
        return cls(loss, pull, inverse, even)

    def only(self, which: torch.Tensor) -> _Side:
        """With zeros elsewhere."""
        return _Side(*(torch.where(which, x, 0.0) for x in (self.loss, self.pull, self.inverse, self.even)))


class SoftmaxLoss(torch.autograd.Function):
    """``loss, positives, *maxima = SoftmaxLoss.apply(image, columns, scale, task)``.

    ``image`` is Float[n, D], ``columns`` Float[m, D] this rank's part of the columns, ``scale`` Float[1]. ``loss`` is
    that of the global batch, Float[], and its gradients are W times this rank's part of it, so that their mean over
    ranks is the true one. The others have none: this rank's positive logits, Float64[n], and, with ``task.maxima``,
    what :meth:`Maxima.of_pairs` returns.
    """

    @staticmethod
    def forward(
        ctx: Any, image: torch.Tensor, columns: torch.Tensor, scale: torch.Tensor, task: Task
    ) -> tuple[torch.Tensor, ...]:
        batch, keep = task.batch, any(ctx.needs_input_grad)
        ctx.columns_dtype = columns.dtype
        dtype = torch.promote_types(image.dtype, torch.float32)
        student = Similarity(image, task.gather(columns), scale, dtype)
        own = torch.stack([one.positives(batch.own) for one in (student, *task.teachers)])
        done = _Sums(_Softmax.of(task, student, dtype), keep)
        if dtype is not torch.float64:
            done = done.made_exact(own, keep)
        rows = _Side.of(task, done.rows, own)
        placed = own.new_zeros(len(own), batch.columns)
        placed[:, batch.own] = own
        sums, positives, row_loss = batch.sum([done.columns, placed, rows.loss.sum()])
        sides = rows, _Side.of(task, sums, positives).only(batch.paired(image.device))
        loss = (row_loss + sides[1].loss.sum()) / (2 * batch.pairs)
        if keep:
            _remember(ctx, done, sides)
        beside = done.maxima.of_pairs() if done.maxima else ()
        ctx.mark_non_differentiable(own[0], *beside)
        return loss.to(dtype), own[0], *beside

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        softmax, factors, kept = _recall(ctx)
        student, task, batch = softmax.similarities[0], ctx.task, ctx.task.batch
        needs_x, needs_y, needs_scale, _ = ctx.needs_input_grad
        x, y, dtype = student.x, student.y, student.dtype
        dx = torch.zeros_like(x, dtype=dtype) if needs_x or not needs_y else None
        dy = torch.zeros_like(y, dtype=dtype) if needs_y else None
        grid = softmax.grid()
        for tile in grid:
            student.pull(_weights(softmax, factors, kept.get(_corner(tile)), grid, tile), tile, dx, dy)
        student.pull_positives(factors.pairs, batch.own, dx, dy)
        share = gradient.double() * batch.world / (2 * batch.pairs)
        scale_gradient = (student.pull_scale(dx, dy) * share).to(student.scale.dtype).view_as(student.scale)
        factor = (share * student.scale.double()).to(dtype)
        image_gradient = None if dx is None else dx.mul_(factor).to(x.dtype)
        text_gradient = None
        if dy is not None:
            text_gradient = batch.scatter(dy.mul_(factor), task.comm_dtype).to(ctx.columns_dtype)
        return image_gradient if needs_x else None, text_gradient, scale_gradient if needs_scale else None, None


class _Factors(NamedTuple):
    """What the gradient needs beside the exponentials: for each similarity, by row and by column, what its exponentials
    are multiplied with; the even part of the target; and the weights of the pairs' own products."""

    rows: torch.Tensor
    columns: torch.Tensor
    even_rows: torch.Tensor
    even_columns: torch.Tensor
    pairs: torch.Tensor


def _factors(done: _Sums, rows: _Side, columns: _Side) -> _Factors:
    task = done.softmax.task
    dtype = torch.float64 if task.fused else done.softmax.similarities[0].dtype  # kernels choose, as the sums are
    parts = torch.full_like(rows.inverse[:, :1], -task.weight / max(len(task.teachers), 1))
    parts[0] = 1
    parts *= torch.stack([shift.double().exp() for shift in done.softmax.shifts])[:, None]
    return _Factors(
        (rows.inverse * parts).to(dtype),
        (columns.inverse * parts).to(dtype),
        rows.even.to(dtype),
        columns.even.to(dtype),
        rows.pull + columns.pull[task.batch.own],
    )


def _weights(
    softmax: _Softmax, factors: _Factors, exponentials: list[torch.Tensor] | None, grid: Grid, tile: Tile
) -> torch.Tensor:
    """p - q of a tile, by its rows and by its columns together, but for the pairs' own."""
    task, (rows, columns) = softmax.task, tile
    if task.fused:
        by_row, by_column = factors.rows[0], factors.columns[0]
        given = softmax.similarities[0], softmax.shifts[0], softmax.exact
        return task.fused.weights(*given, grid, tile, by_row, by_column, grid.room(tile, 0))
    mask = grid.mask(tile)
    exponentials = exponentials or [
        softmax.exponentials(i, grid, tile, mask, grid.room(tile, i)) for i in range(len(softmax))
    ]
    out, other = (grid.room(tile, len(exponentials) + i) for i in range(2))
    torch.add(factors.rows[0, rows, None], factors.columns[0, columns], out=out).mul_(exponentials[0])
    for i, taught in enumerate(exponentials[1:], 1):
        out += torch.add(factors.rows[i, rows, None], factors.columns[i, columns], out=other).mul_(taught)
    if task.smoothing:
        out -= torch.add(factors.even_rows[rows, None], factors.even_columns[columns], out=other)
        grid.hide(out, tile, mask)
    return out


def _remember(ctx: Any, done: _Sums, sides: tuple[_Side, _Side]) -> None:
    """Keep what the backward pass needs: all of it by save_for_backward, where it is counted and freed in time."""
    ctx.task, ctx.tiles = done.softmax.task, [tile for tile, _ in done.kept]
    ctx.shifts, ctx.exact = done.softmax.shifts, done.softmax.exact
    ctx.dtype = done.softmax.similarities[0].dtype
    inputs = [tensor for one in done.softmax.similarities for tensor in (one.x, one.y, one.scale)]
    kept = [values for _, tile in done.kept for values in tile]
    ctx.save_for_backward(*_factors(done, *sides), *inputs, *kept)


def _recall(ctx: Any) -> tuple[_Softmax, _Factors, dict[tuple[int, int], list[torch.Tensor]]]:
    count, saved = 1 + len(ctx.task.teachers), iter(ctx.saved_tensors)
    factors = _Factors(*islice(saved, len(_Factors._fields)))
    similarities = [Similarity(next(saved), next(saved), next(saved), ctx.dtype) for _ in range(count)]
    kept = {_corner(tile): list(islice(saved, count)) for tile in ctx.tiles}
    return _Softmax(ctx.task, similarities, ctx.shifts, ctx.exact), factors, kept


def _corner(tile: Tile) -> tuple[int, int]:
    return tile[0].start, tile[1].start  # slices cannot be hashed
