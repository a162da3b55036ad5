"""What a step minimises: the configured loss on a batch's features, with what the batch brings for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from clipscale.config import Config
from clipscale.config.optim import LossName, MaskDuplicates
from clipscale.data.loader import Batch
from clipscale.distributed.collectives import Gathering, Group, world_size
from clipscale.losses import (
    LOSSES,
    ClassifierStats,
    LossStats,
    PairIds,
    Teacher,
    cross_entropy_loss,
    distill_loss,
    duplicate_fraction,
)
from clipscale.models import CLIP, Features
from clipscale.trainer.teachers import PinnedTeacher, ask_teacher, load_teacher

Stats = LossStats | ClassifierStats

STORED_SCALE = 100.0  # of teachers whose embeddings are stored, unless they bring another: what CLIP ends with
DTYPES = {"fp32": None, "bf16": torch.bfloat16}  # None: as the towers leave them


@dataclass(frozen=True)
class Objective:
    """The loss that a configuration asks for.

    ``models`` are the teachers that are asked for every batch; others have left their embeddings with the samples.
    ``ahead`` is the group in which texts are sent ahead; None, if they are not.
    """

    config: Config
    models: tuple[CLIP, ...] = ()
    ahead: Group = None

    def send_ahead(self, batch: Batch) -> SendAhead | None:
        """What sends the texts of a batch, this rank's share, as soon as the model has them."""
        return None if self.ahead is None else SendAhead(self.ahead, DTYPES[self.config.loss.dtype.value], batch)

    def __call__(
        self,
        features: Features,
        batch: Batch,
        parts: Sequence[Batch],
        stats: bool,
        gathering: Gathering | None = None,
    ) -> tuple[torch.Tensor, Stats | None]:
        """The loss of the global batch, Float[], and its statistics if they are wanted.

        ``features`` are those of ``batch``, this rank's share of it, ``parts`` its microbatches, and ``gathering`` that
        of its texts, if they were sent ahead.
        """
        if self.config.loss.name is LossName.cross_entropy:
            return self._classify(features.image, batch, stats)
        config, dtype = self.config.loss, DTYPES[self.config.loss.dtype.value]
        image, text, extra = (x.to(dtype or x.dtype) for x in (features.image, features.text, features.extra_text))
        options: dict[str, Any] = {"stats": stats, "pair_ids": self._pair_ids(batch, image.device)}
        options["gathering"] = gathering
        options["extra_text"] = extra if len(extra) else None
        if config.name is LossName.clip:
            options |= {"label_smoothing": config.label_smoothing, "cache_mb": config.cache_mb}
        scale, bias = features.logit_scale, features.logit_bias
        if config.teachers:
            teachers = self._teach(batch, parts, image.device)
            outcome = distill_loss(image, text, scale, teachers, weight=config.teacher_weight, **options)
        else:
            outcome = LOSSES[config.name.value](image, text, scale, bias, **options)
        if not stats:
            return outcome, None
        loss, found = outcome
        ids = [ids for ids in (batch.caption_ids, batch.image_ids) if ids is not None]
        shares = torch.stack([duplicate_fraction(one.to(image.device)) for one in ids])
        return loss, found._replace(duplicate_fraction=shares.max())  # also where they are not masked

    def _classify(self, logits: torch.Tensor, batch: Batch, stats: bool) -> tuple[torch.Tensor, Stats | None]:
        labels = batch.text_ids.to(logits.device, non_blocking=True)
        outcome = cross_entropy_loss(logits, labels, label_smoothing=self.config.loss.label_smoothing, stats=stats)
        return outcome if stats else (outcome, None)

    def _pair_ids(self, batch: Batch, device: torch.device) -> PairIds | None:
        mask = self.config.loss.mask_duplicates
        images = batch.image_ids if mask in (MaskDuplicates.image, MaskDuplicates.both) else None
        texts = batch.caption_ids if mask in (MaskDuplicates.text, MaskDuplicates.both) else None
        if images is None and texts is None:
            return None
        images, texts = (None if ids is None else ids.to(device, non_blocking=True) for ids in (images, texts))
        return images, texts

    @torch.no_grad()
    def _teach(self, batch: Batch, parts: Sequence[Batch], device: torch.device) -> list[Teacher]:
        """What the teachers make of a batch."""
        models, stored = iter(self.models), iter(batch.teachers)
        found = []
        for one in self.config.loss.teachers:
            if isinstance(one, str):
                found.append(ask_teacher(next(models), parts, device, self.config.precision.name))
            else:
                image, text = (x.to(device, non_blocking=True) for x in next(stored))
                found.append(Teacher(image, text, one.get("logit_scale", STORED_SCALE)))
        return found


@dataclass
class SendAhead:
    """Gathers the columns of the loss while the images are still in their tower: :meth:`begin` is a model's
    ``after_text``, and ``gathering`` what it has begun."""

    group: Group
    dtype: torch.dtype | None
    batch: Batch
    gathering: Gathering | None = None

    @torch.no_grad()
    def begin(self, text: torch.Tensor, extra_text: torch.Tensor) -> None:
        """Send Float[B, D], and Float[P, D] of the hard negatives that there are."""
        columns = torch.cat([text, extra_rows(extra_text, self.batch)])
        self.gathering = Gathering(columns.to(self.dtype or columns.dtype), self.group)


def extra_rows(extra_text: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Features of the hard negatives that there are, Float[P, D], in a row for each that a sample may have, as the loss
    takes them: those that it lacks are rows of zeros."""
    if batch.negative_lengths is None:
        return extra_text
    places = batch.negative_lengths.nonzero()[:, 0].to(extra_text.device, non_blocking=True)
    room = extra_text.new_zeros(len(batch.negative_lengths), extra_text.shape[1])
    return room.index_copy(0, places, extra_text)


def build_objective(config: Config, teachers: Sequence[PinnedTeacher], device: torch.device) -> Objective:
    """Load the teachers that are runs or checkpoints. A collective."""
    return Objective(config, tuple(load_teacher(teacher, device) for teacher in teachers), _group_ahead(config))


def _group_ahead(config: Config) -> Group:
    """The group in which texts are sent ahead; None where they are not. A collective."""
    if not config.loss.overlap_gather or world_size() == 1:
        return None
    # Not torch's own time-out: a rank that never sends must be told from a slow one as in every other collective.
    group: Any = dist.new_group(timeout=timedelta(seconds=config.distributed.timeout_s))
    return group
