"""The pairwise sigmoid loss over tiles: no sum joins the pairs, so the gradients are formed in the forward pass."""

from __future__ import annotations

import math
from typing import Any

import torch

from clipscale.losses.task import Task, refuse_second_order
from clipscale.losses.tiles import Grid, Similarity, Tile

# Up to here 1 - sigmoid has all its digits, and minus its logarithm, at half the price of a softplus, is exact.
GENTLE = 1.0


class SigmoidLoss(torch.autograd.Function):
    """``loss, everyone = SigmoidLoss.apply(image, columns, scale, bias, task)``.

    As :class:`~clipscale.losses.softmax.SoftmaxLoss`, with ``bias`` Float[1]; the task's teachers, smoothing and cache
    have no meaning here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image: torch.Tensor,
        columns: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        task: Task,
    ) -> tuple[torch.Tensor, ...]:
        batch = task.batch
        needs_x, needs_y, needs_scale, *_ = (task.tracked and needed for needed in ctx.needs_input_grad)
        dtype = torch.promote_types(image.dtype, torch.float32)
        y = task.gather(columns)
        student = Similarity(image, y, scale, dtype, bias)
        own = student.positives(batch.own)
        loss = torch.logaddexp(-own, torch.zeros_like(own)).sum()
        pairs = -torch.sigmoid(-own)
        bias_gradient = pairs.sum()
        dx = torch.zeros_like(image, dtype=dtype) if needs_x or (needs_scale and not needs_y) else None
        dy = torch.zeros_like(y, dtype=dtype) if needs_y else None
        like = image.new_empty(0, dtype=student.products if task.fused else dtype)
        grid = Grid(batch, task.hidden, task.tile, like)
        for tile in grid:
            value, weights, total = _tile(task, student, grid, tile)
            loss += value
            bias_gradient += total
            student.pull(weights, tile, dx, dy)
        loss = batch.sum([loss])[0] / batch.pairs
        if task.tracked and any(ctx.needs_input_grad):
            _remember(ctx, task, student, pairs, bias_gradient, dx, dy)
        ctx.mark_non_differentiable(y)
        ctx.set_materialize_grads(False)  # or the backward pass would be handed zeros for it
        ctx.columns_dtype = columns.dtype
        return loss.to(dtype), y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        refuse_second_order()
        if gradient is None:
            return None, None, None, None, None
        dx, dy, scale, bias = ctx.saved_tensors
        image_gradient = None if dx is None else (dx * gradient).to(ctx.image_dtype)
        text_gradient = None
        if dy is not None:
            mine = ctx.task.batch.scatter(dy, ctx.task.comm_dtype)
            text_gradient = (mine * gradient).to(ctx.columns_dtype)
        return (
            image_gradient if ctx.needs_input_grad[0] else None,
            text_gradient,
            None if scale is None else (scale * gradient).to(ctx.scale_dtype),
            (bias * gradient).to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None,
            None,
        )


def _tile(task: Task, student: Similarity, grid: Grid, tile: Tile) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a tile's logits, the sum of log(1 + exp(l)), sigmoid(l), and the sum of that."""
    out = grid.room(tile, 0)
    if task.fused:
        value, total = task.fused.sigmoid(student, grid, tile, out)
        return value, out, total
    logits = grid.hide(student.logits(tile, out), tile, grid.mask(tile), -math.inf)
    value, weights = _softplus(logits, grid.room(tile, 1))
    return value, weights, _total(weights)


def _softplus(logits: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of log(1 + exp(l)), Float64[], and sigmoid(l), in ``out`` or in place of the logits."""
    if not logits.is_cuda and logits.amax() <= GENTLE:
        weights = logits.sigmoid_()
        return -_total(torch.neg(weights, out=out).log1p_()), weights
    torch.abs(logits, out=out).neg_().exp_().log1p_()
    value = _total(out) + _total(torch.clamp(logits, min=0, out=out))
    return value, logits.sigmoid_()


def _total(values: torch.Tensor) -> torch.Tensor:
    # Rows first: adding up all of a tile in float64 costs half as much as multiplying its features.
    return values.sum(1).double().sum()


def _remember(
    ctx: Any,
    task: Task,
    student: Similarity,
    pairs: torch.Tensor,
    bias_gradient: torch.Tensor,
    dx: torch.Tensor | None,
    dy: torch.Tensor | None,
) -> None:
    assert student.bias is not None
    share = task.batch.world / task.batch.pairs
    student.pull_positives(pairs, task.batch.own, dx, dy)
    scale_gradient = student.pull_scale(dx, dy) * share if ctx.needs_input_grad[2] else None
    for gradient in (dx, dy):
        if gradient is not None:
            gradient.mul_((student.scale.double() * share).to(gradient.dtype))
    ctx.task = task
    ctx.image_dtype, ctx.scale_dtype, ctx.bias_dtype = student.x.dtype, student.scale.dtype, student.bias.dtype
    ctx.save_for_backward(
        dx,
        dy,
        None if scale_gradient is None else scale_gradient.view_as(student.scale),
        (bias_gradient * share).view_as(student.bias),
    )
