"""What the losses have in common before their tiles: checked inputs, and what happens to them after."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, get_args

import torch

from clipscale.distributed.collectives import Gathering, Group
from clipscale.losses.globalbatch import PairIds, global_batch, hidden_pairs
from clipscale.losses.stats import loss_stats
from clipscale.losses.task import Task
from clipscale.losses.tiles import TileShape

Scalar = torch.Tensor | float
Backend = Literal["auto", "torch", "triton"]


@dataclass(frozen=True)
class Inputs:
    """``image`` Float[n, D], ``columns`` Float[n + k, D] this rank's texts and extra texts, ``scale`` Float[1]."""

    image: torch.Tensor
    columns: torch.Tensor
    scale: torch.Tensor
    task: Task
    pair_ids: PairIds | None

    def outcome(self, outputs: tuple[torch.Tensor, ...], bias: torch.Tensor | None = None) -> Any:
        """The loss, or with statistics ``(loss, LossStats)``, from what a loss function's ``apply`` returned."""
        loss, positives, *beside = outputs
        if not beside:
            return loss
        batch, text = self.task.batch, self.columns[: self.task.batch.n]
        columns = beside[0], beside[1]
        return loss, loss_stats(batch, self.image, text, self.scale, bias, positives, columns, self.pair_ids)


def prepare(
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale: Scalar,
    *,
    group: Group,
    pair_ids: PairIds | None,
    extra_text: torch.Tensor | None,
    tile: TileShape,
    comm_dtype: torch.dtype | None,
    gathering: Gathering | None,
    backend: Backend,
    stats: bool,
) -> Inputs:
    """Check the inputs of a loss, here and over all ranks. A collective.

    Raises ValueError for what does not fit, and for a backend that there is not.
    """
    if extra_text is not None and not len(extra_text):
        extra_text = None
    batch = global_batch(image, text, extra_text, pair_ids, group)
    columns = text if extra_text is None else torch.cat([text, extra_text.to(text.dtype)])
    dtype = torch.promote_types(image.dtype, text.dtype)
    hidden = hidden_pairs(batch, pair_ids, None if extra_text is None else extra_text.detach())
    kernels = _kernels(backend, image.device, dtype)
    task = Task(batch, hidden, tile=tile, comm_dtype=comm_dtype, maxima=stats, kernels=kernels, gathering=gathering)
    return Inputs(
        image.to(dtype).contiguous(), columns.to(dtype).contiguous(), as_vector(logit_scale, image), task, pair_ids
    )


def _kernels(backend: Backend, device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The module of Triton's kernels where they are to do what they can: with "auto" on a GPU, if triton is there."""
    if backend not in get_args(Backend):
        raise ValueError(f'backend={backend!r} must be "auto", "torch" or "triton"')
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return None
    try:
        from clipscale.losses import kernels
    except ImportError:
        if backend == "triton":
            raise ValueError('backend="triton" needs triton, which is not installed: backend="torch"') from None
        return None
    there = kernels.run_on(device)
    if backend == "triton" and not there:
        raise ValueError(f'backend="triton" needs a CUDA device of capability 8.0, not {device}: backend="torch"')
    return kernels if there and dtype in kernels.DTYPES else None


def as_vector(value: Scalar, like: torch.Tensor) -> torch.Tensor:
    """A number or a tensor that holds one as Float[1] beside ``like``. Raises ValueError for more than one."""
    if not isinstance(value, torch.Tensor):
        return torch.full((1,), value, dtype=torch.float64, device=like.device)  # copying a number would wait
    if value.numel() != 1:
        raise ValueError(f"logit_scale and logit_bias hold one number each, got {tuple(value.shape)}")
    return value.reshape(1)
