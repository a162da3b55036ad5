"""What a step minimises: the configured loss on a batch's features, with what the batch brings for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from clipscale.checkpoint import load
from clipscale.config import Config
from clipscale.config.optim import LossName, MaskDuplicates
from clipscale.data.loader import Batch
from clipscale.data.tokenizer import Tokenizer
from clipscale.errors import ConfigError
from clipscale.losses import LOSSES, LossStats, PairIds, Teacher, distill_loss, duplicate_fraction
from clipscale.models import CLIP, Features
from clipscale.parallel import towers_autocast

STORED_SCALE = 100.0  # of teachers whose embeddings are stored, unless they bring another: what CLIP ends with
DTYPES = {"fp32": None, "bf16": torch.bfloat16}  # None: as the towers leave them


@dataclass(frozen=True)
class Objective:
    """The loss that a configuration asks for.

    ``models`` are the teachers that are asked for every batch; others have left their embeddings with the samples.
    """

    config: Config
    models: tuple[CLIP, ...] = ()

    def __call__(
        self, features: Features, batch: Batch, parts: Sequence[Batch], stats: bool
    ) -> tuple[torch.Tensor, LossStats | None]:
        """The loss of the global batch, Float[], and its statistics if they are wanted.

        ``features`` are those of ``batch``, this rank's share of it, and ``parts`` its microbatches.
        """
        config, dtype = self.config.loss, DTYPES[self.config.loss.dtype.value]
        image, text, extra = (x.to(dtype or x.dtype) for x in (features.image, features.text, features.extra_text))
        options: dict[str, Any] = {"stats": stats, "pair_ids": self._pair_ids(batch, image.device)}
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
        return loss, found._replace(duplicate_fraction=duplicate_fraction(batch.caption_ids.to(image.device)))

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
                found.append(_ask(next(models), parts, device, self.config))
            else:
                image, text = (x.to(device, non_blocking=True) for x in next(stored))
                found.append(Teacher(image, text, one.get("logit_scale", STORED_SCALE)))
        return found


def _ask(model: CLIP, parts: Sequence[Batch], device: torch.device, config: Config) -> Teacher:
    side = model.config.vision.image_size
    images, texts = [], []
    with towers_autocast(config.precision.name, device):
        for part in parts:
            pixels = part.images.to(device, non_blocking=True)
            if pixels.shape[-1] != side:
                pixels = F.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True)
            ids = part.text_ids.to(device, non_blocking=True)
            images.append(model.encode_image(pixels, normalize=True))
            texts.append(model.encode_text(ids, part.text_lengths, normalize=True))
    return Teacher(torch.cat(images), torch.cat(texts), model.logit_scale.detach().exp())


def build_objective(config: Config, tokenizer: Tokenizer, device: torch.device) -> Objective:
    """Load the teachers that are runs or checkpoints.

    Raises ConfigError for one that reads other tokens than the student, or fewer; ClipscaleError where there is none.
    """
    return Objective(config, tuple(_load_teachers(config, tokenizer, device)))


def _load_teachers(config: Config, tokenizer: Tokenizer, device: torch.device) -> Iterator[CLIP]:
    for path in config.loss.teachers:
        if not isinstance(path, str):
            continue
        model, _, its = load(path, str(device))
        if (its.name, its.vocab_size) != (tokenizer.name, tokenizer.vocab_size):
            raise ConfigError(
                f"loss.teachers: {path} reads the tokens of {its.name}, the student those of {tokenizer.name}; store "
                "its embeddings with the samples instead (loss.teachers=[{image: MEMBER, text: MEMBER}])"
            )
        if model.config.context_length < tokenizer.context_length:
            raise ConfigError(
                f"loss.teachers: {path} reads {model.config.context_length} tokens of a caption, the student "
                f"{tokenizer.context_length}; use tokenizer.context_length={model.config.context_length}"
            )
        yield model.requires_grad_(False).eval()
