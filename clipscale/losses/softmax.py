"""The symmetric softmax loss over tiles, with any soft targets: the engine of the clip and distillation losses.

Rows are this rank's n images, columns the M texts of all ranks, S their logits. Each row and each column of a pair has
the cross entropy of a target q against the softmax p of its logits, where the target puts most on the pair itself.
With the pair's logit taken out of every sum, ::

    -sum_j q_j log p_j  =  log(1 + sum_{j≠i} exp(S_j - S_i))  +  sum_{j≠i} q_j (S_i - S_j)

loses no digit when the pair stands far above the others, where the usual ``logsumexp(S) - S_i`` cancels; and
``p_i - q_i``, the gradient of S_i, is had from the same sums.

One exponential per logit serves rows and columns: ``E = exp(S - shift)`` with one number for the shift, 0 for scales up
to about 75, and else what keeps the sums of unit vectors' from overflowing. Where some row or column of the global
batch lies too far below to be resolved, or features that are no unit vectors exceed the range, all ranks go through
their tiles once more in float64, with the shift that the largest logit asks for. That holds sums up to exp(1340) apart;
beyond, the loss is NaN, never a wrong number. Sums are kept in float64 in any case: they are only n + M numbers.

On a GPU, kernels can take the place of both, with two differences, because whether fp32 suffices is known to the device
alone: each rank decides for itself, from its own sums; and where float64 takes over, the shift stays, and gradients are
still added up in fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from types import ModuleType
from typing import Any, NamedTuple

import torch

from clipscale.distributed.collectives import largest
from clipscale.losses.task import Task, refuse_second_order
from clipscale.losses.tiles import Grid, Similarity, Tile


class _Range(NamedTuple):
    """Of an arithmetic, as logarithms above the shift: how high a sum may be planned to be, between which bounds it is
    exact. What is lost below the least normal number is less than the rounding of a sum at the lower bound, and the
    inverse of one at the upper bound is a normal number still."""

    planned: float
    lower: float
    upper: float


RANGES = {torch.float32: _Range(86.7, -61.0, 87.2), torch.float64: _Range(690.0, -650.0, 707.0)}
SLACK = 1.02  # on the norms of rounded unit vectors


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
        bounds = [SLACK * one.scale.abs().max().double() for one in similarities]
        room = RANGES[dtype].planned - math.log(task.batch.columns)
        return cls(task, similarities, [(most - room).clamp(min=0).to(dtype) for most in bounds])

    def widened(self, positives: torch.Tensor) -> _Softmax:
        """In float64, shifted by the largest logits of all ranks; ``positives`` Float64[1 + T, n]. A collective."""
        wide = _Softmax.of(self.task, self.similarities[0], torch.float64)
        grid, most = wide.grid(), positives.amax(1)
        for tile in grid:
            for i, one in enumerate(wide.similarities):
                logits = one.logits(tile, grid.room(tile, i))
                if i and self.task.untaught is not None:
                    logits.masked_fill_(self.task.untaught[tile[1]], -math.inf)
                most[i] = torch.maximum(most[i], logits.amax())
        room = RANGES[torch.float64].planned - math.log(self.task.batch.columns)
        return replace(wide, shifts=list((largest(most, self.task.batch.group) - room).unbind()))

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


class _Sums:
    """What one walk over the tiles adds up.

    ``rows`` Float64[q, n] and ``columns`` Float64[q, M] hold q sums over the pairs that are neither the own one nor
    hidden: of E for each similarity, then of E_t S for each teacher, then, with smoothing, of S and of 1.
    ``kept`` are exponentials that fitted the cache.
    """

    def __init__(self, softmax: _Softmax, keep: bool) -> None:
        task, student = softmax.task, softmax.similarities[0]
        self.softmax, count = softmax, 2 * len(softmax) - 1 + (2 if task.smoothing else 0)
        self.rows = student.x.new_zeros(count, task.batch.n, dtype=torch.float64)
        self.columns = student.x.new_zeros(count, task.batch.columns, dtype=torch.float64)
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
            taught = softmax.exponentials(i, grid, tile, mask, rooms[i])
            self._add(i, taught, tile)
            self._add(count - 1 + i, torch.mul(taught, logits, out=grid.room(tile, count)), tile)
        self._add(0, grid.hide(softmax.exp(0, logits), tile, mask), tile)
        return rooms

    def _add(self, quantity: int, values: torch.Tensor, tile: Tile) -> None:
        self.rows[quantity, tile[0]] += values.sum(1)
        self.columns[quantity, tile[1]] += values.sum(0)

    def mend(self, positives: torch.Tensor, kernels: ModuleType) -> None:
        """Let kernels form the sums in float64 where this rank's do not suffice; decided on the device.

        ``positives`` Float64[1, n]. The sums of a column over all ranks may suffice where those here do not, which
        cannot be known without waiting for them.
        """
        softmax, student = self.softmax, self.softmax.similarities[0]
        _, lower, upper = RANGES[torch.float32]
        batch = softmax.task.batch
        few = (self.columns[0] < math.exp(lower)) & batch.paired(self.columns.device)
        if batch.n == 1:
            few[batch.own] = False  # the one row there is is the column's own
        bad = few.any() | ~(self.columns[0] <= math.exp(upper)).all()
        bad = bad | _Side.of(softmax, self.rows, positives).out_of_range(torch.float32).any()
        rows, columns = torch.zeros_like(self.rows), torch.zeros_like(self.columns)
        kernels.exact_sums(student, softmax.shifts[0], bad, softmax.grid(), rows[0], columns[0])
        self.rows, self.columns = torch.where(bad, rows, self.rows), torch.where(bad, columns, self.columns)
        self.softmax = replace(softmax, exact=bad)


@dataclass
class _Side:
    """What the sums of the rows, or of the columns, say: all Float64, one entry per row or column.

    ``loss``; ``pull`` of a pair's own logit, p_i - q_i; ``inverse`` Float64[1 + T, L], 1 / sum of exp(S - shift), the
    own pair's too, for each similarity; ``even``, the smoothed target of each other pair.
    """

    loss: torch.Tensor
    pull: torch.Tensor
    inverse: torch.Tensor
    even: torch.Tensor

    @classmethod
    def of(cls, softmax: _Softmax, sums: torch.Tensor, positives: torch.Tensor) -> _Side:
        task, count, student = softmax.task, len(positives), positives[0]
        others = sums[:count].log()  # -inf where there are none
        own = positives - torch.stack(softmax.shifts).double()[:, None]
        gap = others[0] - own[0]
        loss = torch.logaddexp(gap, torch.zeros_like(gap))
        pull = -torch.sigmoid(gap)
        inverse = torch.exp(-torch.logaddexp(others, own))
        even = torch.zeros_like(loss)
        if task.smoothing:
            total, number = sums[2 * count - 1], sums[2 * count] + 1
            even = (1 - task.weight) * task.smoothing / number
            loss = loss + even * ((number - 1) * student - total)
            pull = pull + even * (number - 1)
        for i in range(1, count):
            part = task.weight / (count - 1) * inverse[i]
            loss = loss + part * (student * sums[i] - sums[count - 1 + i])
            pull = pull + part * sums[i]
        return cls(loss, pull, inverse, even)

    def out_of_range(self, dtype: torch.dtype) -> torch.Tensor:
        """Bool[L], where ``dtype`` could not hold or resolve some sum."""
        _, lower, upper = RANGES[dtype]
        fine = (self.inverse >= math.exp(-upper)) & (self.inverse <= math.exp(-lower)) & self.loss.isfinite()
        return ~fine.all(0)

    def only(self, which: torch.Tensor) -> _Side:
        """With zeros elsewhere."""
        return _Side(*(torch.where(which, x, 0.0) for x in (self.loss, self.pull, self.inverse, self.even)))


class SoftmaxLoss(torch.autograd.Function):
    """``loss, everyone = SoftmaxLoss.apply(image, columns, scale, task)``.

    ``image`` is Float[n, D], ``columns`` Float[m, D] this rank's part of the columns, ``scale`` Float[1]. ``loss`` is
    that of the global batch, Float[], and its gradients are W times this rank's part of it, so that their mean over
    ranks is the true one. ``everyone`` has none: the columns of all ranks, Float[M, D].
    """

    @staticmethod
    def forward(
        ctx: Any, image: torch.Tensor, columns: torch.Tensor, scale: torch.Tensor, task: Task
    ) -> tuple[torch.Tensor, ...]:
        keep = task.tracked and any(ctx.needs_input_grad)
        ctx.columns_dtype = columns.dtype
        dtype = torch.promote_types(image.dtype, torch.float32)
        student = Similarity(image, task.gather(columns), scale, dtype)
        own = torch.stack([one.positives(task.batch.own) for one in (student, *task.teachers)])
        softmax = _Softmax.of(task, student, dtype)
        done, sides, loss, failed = _solve(softmax, own, keep)
        if task.fused:
            loss = loss.masked_fill(failed, math.nan)
        elif bool(failed):  # the same on all ranks
            done, sides, loss, failed = _solve(softmax.widened(own), own, keep)
            loss = loss.masked_fill(failed, math.nan)
        if keep:
            _remember(ctx, done, sides)
        ctx.mark_non_differentiable(student.y)
        ctx.set_materialize_grads(False)  # or the backward pass would be handed zeros for it
        return loss.to(dtype), student.y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        refuse_second_order()
        if gradient is None:
            return None, None, None, None
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


def _solve(
    softmax: _Softmax, own: torch.Tensor, keep: bool
) -> tuple[_Sums, tuple[_Side, _Side], torch.Tensor, torch.Tensor]:
    """One walk, its rows and columns, the loss Float64[], and Bool[] whether the arithmetic's range did not do."""
    batch, dtype, fused = softmax.task.batch, softmax.similarities[0].dtype, softmax.task.fused
    done = _Sums(softmax, keep)
    if fused:
        done.mend(own, fused)
        dtype = torch.float64  # where fp32 did not do
    rows = _Side.of(softmax, done.rows, own)
    placed = own.new_zeros(len(own), batch.columns)
    placed[:, batch.own] = own
    failures = rows.out_of_range(dtype).double().sum()
    sums, positives, row_loss, failures = batch.sum([done.columns, placed, rows.loss.sum(), failures])
    columns, paired = _Side.of(softmax, sums, positives), batch.paired(own.device)
    failed = (failures > 0) | (columns.out_of_range(dtype) & paired).any()
    columns = columns.only(paired)
    return done, (rows, columns), (row_loss + columns.loss.sum()) / (2 * batch.pairs), failed


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
    out, other = grid.room(tile, len(exponentials)), partial(grid.room, tile, len(exponentials) + 1)
    torch.add(factors.rows[0, rows, None], factors.columns[0, columns], out=out).mul_(exponentials[0])
    for i, taught in enumerate(exponentials[1:], 1):
        out += torch.add(factors.rows[i, rows, None], factors.columns[i, columns], out=other()).mul_(taught)
    if task.smoothing:
        out -= torch.add(factors.even_rows[rows, None], factors.even_columns[columns], out=other())
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
