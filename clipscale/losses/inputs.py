"""What the losses have in common before their tiles: checked inputs, and what happens to them after."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, get_args

import torch

from clipscale.distributed.collectives import Gathering, Group
from clipscale.losses.globalbatch import GlobalBatch, PairIds, agree, hidden_pairs
from clipscale.losses.stats import loss_stats
from clipscale.losses.task import Task
from clipscale.losses.tiles import Similarity, TileShape

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
    stats: bool

    def outcome(self, outputs: tuple[torch.Tensor, torch.Tensor], bias: torch.Tensor | None = None) -> Any:
        """The loss, or with statistics ``(loss, LossStats)``, from what a loss function's ``apply`` returned."""
        loss, everyone = outputs
        if not self.stats:
            return loss
        dtype = torch.promote_types(self.image.dtype, torch.float32)
        return loss, loss_stats(self.task, Similarity(self.image, everyone, self.scale, dtype, bias), self.pair_ids)


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
    options: str = "",
    problem: str | None = None,
) -> Inputs:
    """Check the inputs of a loss, here and over all ranks.

    ``options`` tells what else must be the same on all of them, and ``problem`` what else does not fit here.

    A collective. Raises ValueError for what does not fit, and for a backend that there is not.
    """
    if extra_text is not None and not len(extra_text):
        extra_text = None
    batch = GlobalBatch(len(image), 0 if extra_text is None else len(extra_text), group)
    brings = _brings(image, text, extra_text, pair_ids) + f", sent as {comm_dtype or text.dtype}{options}"
    agree(batch, brings, _problem(image, text, extra_text, pair_ids) or problem, image.device)
    columns = text if extra_text is None else torch.cat([text, extra_text.to(text.dtype)])
    dtype = torch.promote_types(image.dtype, text.dtype)
    task = Task(
        batch,
        hidden_pairs(batch, pair_ids, None if extra_text is None else extra_text.detach()),
        tile=tile,
        comm_dtype=comm_dtype,
        kernels=_kernels(backend, image.device, dtype),
        gathering=gathering,
        tracked=torch.is_grad_enabled(),
    )
    scale = as_vector(logit_scale, image)
    return Inputs(image.to(dtype).contiguous(), columns.to(dtype).contiguous(), scale, task, pair_ids, stats)


def _problem(
    image: torch.Tensor, text: torch.Tensor, extra: torch.Tensor | None, pair_ids: PairIds | None
) -> str | None:
    """What does not fit, or None."""
    if image.ndim != 2 or image.shape != text.shape or not image.shape[0]:
        return f"image and text must both be Float[n, D], got {tuple(image.shape)} and {tuple(text.shape)}"
    if extra is not None and (extra.ndim != 2 or extra.shape[1] != text.shape[1]):
        return f"extra_text must be Float[k, {text.shape[1]}], got {tuple(extra.shape)}"
    for name, features in (("image", image), ("text", text), ("extra_text", extra)):
        if features is not None and not features.is_floating_point():
            return f"{name} must hold floating-point numbers, got {features.dtype}"
    if pair_ids is not None and len(pair_ids) != 2:
        return f"pair_ids must be (image_ids, text_ids), got {len(pair_ids)} of them"
    for ids in pair_ids or ():
        if ids is not None and (ids.shape != (len(image),) or ids.dtype != torch.int64):
            return f"pair_ids must be Int64[{len(image)}], got {ids.dtype} {tuple(ids.shape)}"
    return None


def _brings(image: torch.Tensor, text: torch.Tensor, extra: torch.Tensor | None, pair_ids: PairIds | None) -> str:
    """What must be the same on all ranks."""
    kinds = [
        f"{kind} ids"
        for kind, ids in zip(("image", "text"), () if pair_ids is None else pair_ids, strict=False)
        if ids is not None
    ]
    extras = 0 if extra is None else len(extra)
    parts = [f"{len(image)} pairs", f"{extras} extra texts", f"{image.shape[-1]} dimensions", *kinds]
    return ", ".join([*parts, f"{image.dtype} images", f"{text.dtype} texts"])


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
