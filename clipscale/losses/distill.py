"""Distillation: the student's similarities follow those of teachers (MobileCLIP, section 3.2; TinyCLIP's affinity)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from clipscale.distributed.collectives import Gathering, Group
from clipscale.losses.globalbatch import GlobalBatch, PairIds
from clipscale.losses.inputs import Backend, Scalar, as_vector, prepare
from clipscale.losses.softmax import SoftmaxLoss
from clipscale.losses.tiles import Similarity, TileShape


class Teacher(NamedTuple):
    """What a teacher makes of the same pairs: ``image`` and ``text`` Float[n, D_t], L2-normalised, and the multiplier
    on their similarities. None of it gets a gradient."""

    image: torch.Tensor
    text: torch.Tensor
    logit_scale: Scalar


@torch.compiler.disable  # type: ignore[untyped-decorator]
def distill_loss(
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale: Scalar,
    teachers: Sequence[Teacher],
    *,
    weight: float = 1.0,
    group: Group = None,
    pair_ids: PairIds | None = None,
    label_smoothing: float = 0.0,
    extra_text: torch.Tensor | None = None,
    tile: TileShape = "auto",
    cache_mb: float = 0,
    comm_dtype: torch.dtype | None = None,
    gathering: Gathering | None = None,
    backend: Backend = "auto",
    stats: bool = False,
) -> Any:
    """As :func:`clipscale.losses.clip_loss`, with the teachers' softmax in the place of ``weight`` of the labels.

    The target of every row and column is ``weight`` times the mean over teachers of the softmax of their similarities,
    and for the rest the label, smoothed or not. That is ``(1 - weight) * clip + weight * cross entropy to the
    teachers``, where the teachers' logits, too, exist a tile at a time only.

    Args:
        teachers: at least one; each may have a dimension of its own.
        weight: between 0 and 1.

    Raises:
        ValueError: shapes that do not fit each other, or differ between ranks; an option out of its range; no teacher;
            kernels where none can run.
    """
    if not teachers:
        raise ValueError("distill_loss needs a teacher; without one it is clip_loss")
    with torch.autocast(image.device.type, enabled=False):
        given = prepare(
            image,
            text,
            logit_scale,
            group=group,
            pair_ids=pair_ids,
            extra_text=extra_text,
            tile=tile,
            comm_dtype=comm_dtype,
            gathering=gathering,
            backend=backend,
            stats=stats,
            options=f", smoothing {label_smoothing}, weight {weight}, teachers of "
            + ", ".join(f"{teacher.text.shape[-1]} dimensions in {teacher.text.dtype}" for teacher in teachers),
            problem=next(filter(None, (_problem(teacher, len(image)) for teacher in teachers)), None),
        )
        batch = given.task.batch
        task = replace(
            given.task,
            teachers=tuple(_gather(teacher, batch) for teacher in teachers),
            untaught=~batch.paired(image.device) if batch.extra else None,
            weight=weight,
            smoothing=label_smoothing,
            cache_bytes=cache_mb * 2**20,
        )
        return given.outcome(SoftmaxLoss.apply(given.image, given.columns, given.scale, task))


def _problem(teacher: Teacher, pairs: int) -> str | None:
    image, text = teacher.image, teacher.text
    if image.ndim != 2 or image.shape != text.shape or len(image) != pairs:
        return f"a teacher's image and text must be Float[{pairs}, D_t], got {tuple(image.shape)}, {tuple(text.shape)}"
    if not (image.is_floating_point() and text.is_floating_point()):
        return f"a teacher's features must be floating-point numbers, got {image.dtype} and {text.dtype}"
    return None


def _gather(teacher: Teacher, batch: GlobalBatch) -> Similarity:
    image, text = teacher.image.detach(), teacher.text.detach()
    columns = torch.cat([text, text.new_zeros(batch.extra, text.shape[1])])
    scale = as_vector(teacher.logit_scale, image).detach()
    return Similarity(image, batch.gather(columns), scale, image.dtype)
