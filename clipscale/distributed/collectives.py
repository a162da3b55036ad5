"""Collectives that autograd understands.

Our own, on ``all_gather_into_tensor`` and ``reduce_scatter_tensor``: torch's differentiable ones are deprecated in one
supported version and absent in another.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

Group = dist.ProcessGroup | None
# Stands for a group of this process only, which needs no communicator.
ALONE: Any = object()


def world_size(group: Group = None) -> int:
    """Ranks of a group; None is the default group, or this process alone without one."""
    if group is ALONE or not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)


def rank(group: Group = None) -> int:
    """This process's place in a group; 0 without an initialised process group."""
    if group is ALONE or not (dist.is_available() and dist.is_initialized()):
        return 0
    return dist.get_rank(group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        everyone = local.new_empty(world_size(group) * local.shape[0], *local.shape[1:])
        dist.all_gather_into_tensor(everyone, local.contiguous(), group=group)
        return everyone

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        mine = gradient.new_empty(gradient.shape[0] // world_size(ctx.group), *gradient.shape[1:])
        dist.reduce_scatter_tensor(mine, gradient.contiguous(), op=dist.ReduceOp.SUM, group=ctx.group)
        return mine, None


def gather(local: torch.Tensor, group: Group = None) -> torch.Tensor:
    """Concatenate Float[n, ...] of all ranks to Float[W·n, ...], in rank order.

    Backward: each rank gets the sum over ranks of the gradients of its own part. Every rank must bring the same shape.
    """
    return local if world_size(group) == 1 else _Gather.apply(local, group)


class Gathering:
    """:func:`gather` under way: begun here, ended by :meth:`wait`; not differentiable.

    In a group of its own it waits for no other collective and holds none up, as one in a shared group would. All ranks
    must begin it at the same place among their collectives.
    """

    def __init__(self, local: torch.Tensor, group: Group = None) -> None:
        sent = local.detach().contiguous()
        everyone = sent.new_empty(world_size(group) * local.shape[0], *local.shape[1:])
        self._work = dist.all_gather_into_tensor(everyone, sent, group=group, async_op=True)
        self._held: tuple[torch.Tensor, torch.Tensor] | None = (sent, everyone)  # they must live until it has ended

    def wait(self) -> torch.Tensor:
        """Float[W·n, ...], handed over once. On a GPU the current stream waits, not this thread."""
        assert self._work is not None and self._held is not None
        self._work.wait()
        (_, everyone), self._held = self._held, None
        return everyone


def average(value: torch.Tensor, group: Group = None) -> torch.Tensor:
    """The mean over ranks of a detached tensor; not differentiable."""
    value = value.detach().clone()
    if world_size(group) > 1:
        dist.all_reduce(value, group=group)
        value /= world_size(group)
    return value


def total(value: torch.Tensor, group: Group = None) -> torch.Tensor:
    """The sum over ranks of a detached tensor; not differentiable."""
    value = value.detach().clone()
    if world_size(group) > 1:
        dist.all_reduce(value, group=group)
    return value


def largest(value: torch.Tensor, group: Group = None) -> torch.Tensor:
    """The elementwise maximum over ranks of a detached tensor; not differentiable."""
    value = value.detach().clone()
    if world_size(group) > 1:
        dist.all_reduce(value, dist.ReduceOp.MAX, group=group)
    return value


def gather_rows(local: torch.Tensor, group: Group = None) -> torch.Tensor:
    """Concatenate Float[n_r, ...] whose number of rows differs between ranks; not differentiable."""
    if world_size(group) == 1:
        return local
    counts = gather(torch.tensor([local.shape[0]], device=local.device), group).tolist()
    padded = local.new_zeros(max(counts), *local.shape[1:])
    padded[: local.shape[0]] = local
    everyone = gather(padded, group).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(everyone, counts, strict=True)])


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor put together, a collective; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a whole tensor, equal on all ranks, into one that may be sharded; a collective then."""
    value = value.to(target.device, target.dtype)
    if isinstance(target, DTensor):
        value = distribute_tensor(value, target.device_mesh, target.placements)
    target.copy_(value)
