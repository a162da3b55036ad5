"""BatchNorm over the global batch, so that a ResNet trained on many ranks has the gradient of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from clipscale.config.optim import PrecisionName
from clipscale.distributed.collectives import total, world_size


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose backward is an all-reduce: the statistics of each rank feed the outputs of all."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return total(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return total(gradient)


def _global_statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    dims = [0, *range(2, x.ndim)]
    count = x.numel() // x.shape[1] * world_size()
    x = x.float()
    mean = _SumOverRanks.apply(x.sum(dims)) / count
    # Around the mean, in a second reduction: the difference of two large sums would lose the small variances.
    shape = (1, -1, *([1] * (x.ndim - 2)))
    variance = _SumOverRanks.apply((x - mean.view(shape)).square().sum(dims)) / count
    return mean, variance, count


def _forward(norm: _BatchNorm, x: torch.Tensor) -> torch.Tensor:
    if not norm.training:
        weight, bias = (one if one is None else one.float() for one in (norm.weight, norm.bias))
        return F.batch_norm(x, norm.running_mean, norm.running_var, weight, bias, False, 0.0, norm.eps)
    mean, variance, count = _global_statistics(x)
    if norm.track_running_stats:
        with torch.no_grad():
            assert norm.running_mean is not None and norm.running_var is not None
            assert norm.num_batches_tracked is not None and norm.momentum is not None
            norm.num_batches_tracked += 1
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(variance * (count / max(count - 1, 1)), norm.momentum)
    shape = (1, -1, *([1] * (x.ndim - 2)))
    out = (x.float() - mean.view(shape)) * torch.rsqrt(variance.view(shape) + norm.eps)
    if norm.weight is not None:
        out = out * norm.weight.view(shape) + norm.bias.view(shape)
    return out.to(x.dtype)


def use_global_batch_statistics(model: nn.Module, precision: PrecisionName = PrecisionName.fp32) -> None:
    """Make every BatchNorm of ``model`` take its training statistics over all ranks, and normalise in fp32.

    torch's own SyncBatchNorm does the same on CUDA only, and its BatchNorm refuses gains of ``bf16`` beside averages of
    fp32. Call it after the process group exists.
    """
    if world_size() > 1 or precision is PrecisionName.bf16:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                _patch(module)


def has_batchnorm(module: nn.Module) -> bool:
    """Whether a BatchNorm lies in ``module``."""
    return any(isinstance(child, _BatchNorm) for child in module.modules())


def takes_statistics(module: nn.Module) -> bool:
    """Whether a BatchNorm lies in ``module`` that normalises by the batch: one that is not locked, in training."""
    return any(isinstance(child, _BatchNorm) and child.training for child in module.modules())


def recomputing(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for the forward pass of a checkpointed module and for its repetition in the backward pass.

    A repeated forward pass would count the same batch twice in the running statistics.
    """
    return nullcontext(), _frozen_statistics(module)


@contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    norms = [child for child in module.modules() if isinstance(child, _BatchNorm) and child.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        assert norm.num_batches_tracked is not None
        norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, counted) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counted


def _patch(norm: _BatchNorm) -> None:
    # timm's BatchNormAct2d normalises, then drops and activates: only the first of the three is ours.
    drop, act = getattr(norm, "drop", None), getattr(norm, "act", None)

    def forward(x: torch.Tensor) -> torch.Tensor:
        x = _forward(norm, x)
        if drop is not None:
            x = drop(x)
        return act(x) if act is not None else x

    norm.forward = forward  # type: ignore[assignment,method-assign]
