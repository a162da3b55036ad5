"""Teachers that are models: which checkpoint of a run teaches, and what it makes of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from clipscale.checkpoint import find_checkpoint, fingerprint, load, load_tokenizer
from clipscale.checkpoint.places import local
from clipscale.config import Config
from clipscale.config.optim import PrecisionName
from clipscale.data.loader import Batch
from clipscale.data.tokenizer import Tokenizer
from clipscale.errors import ClipscaleError, ConfigError
from clipscale.losses import Teacher
from clipscale.models import CLIP
from clipscale.parallel import towers_autocast, unsharded


@dataclass(frozen=True)
class PinnedTeacher:
    """A checkpoint and its fingerprint: a run that trains on teaches its students what it knew when they began."""

    checkpoint: Path
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.checkpoint} {self.fingerprint}"


def pin_teachers(config: Config, tokenizer: Tokenizer, recorded: Sequence[str]) -> list[PinnedTeacher]:
    """The checkpoints behind the teachers that are runs; those ``recorded`` in a run's checkpoint, if it has one.

    Raises ConfigError for a teacher that is not there, is another one than recorded, reads other tokens than the
    student, or fewer.
    """
    found = []
    for number, path in enumerate(path for path in config.loss.teachers if isinstance(path, str)):
        checkpoint, known, itself = Path(path), "", Path(config.runs_dir, config.name or "").resolve()
        if itself in (checkpoint.resolve(), *checkpoint.resolve().parents):
            raise ConfigError(f"loss.teachers: {path} is this run itself; name another one, or choose another name=…")
        if recorded:
            place, known = recorded[number].rsplit(" ", 1)
            checkpoint = Path(place)
        try:
            checkpoint, its = find_checkpoint(checkpoint)
        except ClipscaleError as error:
            raise ConfigError(f"loss.teachers: {error}") from None
        teacher = PinnedTeacher(checkpoint, fingerprint(local(checkpoint)))
        if known not in ("", teacher.fingerprint):
            raise ConfigError(
                f"loss.teachers: {checkpoint} is not the checkpoint that this run has learnt from; restore that, or "
                "choose another name=…"
            )
        _check(path, checkpoint, its, tokenizer)
        found.append(teacher)
    return found


def _check(path: str, checkpoint: Path, its: Config, tokenizer: Tokenizer) -> None:
    taught_by = load_tokenizer(checkpoint, its)
    if (taught_by.name, taught_by.vocab_size) != (tokenizer.name, tokenizer.vocab_size):
        raise ConfigError(
            f"loss.teachers: {path} reads the tokens of {taught_by.name}, the student those of {tokenizer.name}; store "
            "its embeddings with the samples instead (loss.teachers=[{image: MEMBER, text: MEMBER}])"
        )
    if its.model.context_length < tokenizer.context_length:
        raise ConfigError(
            f"loss.teachers: {path} reads {its.model.context_length} tokens of a caption, the student "
            f"{tokenizer.context_length}; use tokenizer.context_length={its.model.context_length}"
        )


def load_teacher(teacher: PinnedTeacher, device: torch.device) -> CLIP:
    """The model, which is never trained."""
    return load(teacher.checkpoint, str(device))[0].requires_grad_(False)


def ask_teacher(model: CLIP, parts: Sequence[Batch], device: torch.device, precision: PrecisionName) -> Teacher:
    """What it makes of a batch, a microbatch at a time: of the student's images, in its own size, and captions."""
    images, texts = [], []
    with towers_autocast(unsharded(precision), device):
        for part in parts:
            pixels = resize_pixels(part.images.to(device, non_blocking=True), model.config.vision.image_size)
            ids = part.text_ids.to(device, non_blocking=True)
            images.append(model.encode_image(pixels, normalize=True))
            # Lengths stay here: asking the device for them would wait for it.
            texts.append(model.encode_text(ids, part.text_lengths, normalize=True))
    return Teacher(torch.cat(images), torch.cat(texts), model.logit_scale.detach().exp())


def resize_pixels(images: torch.Tensor, side: int) -> torch.Tensor:
    """UInt8[B, 3, S, S] as UInt8[B, 3, side, side]."""
    if images.shape[-1] == side:
        return images
    # In fp32: GPUs do not resize bytes, and CPUs do it with other rounding.
    resized = F.interpolate(images.float(), size=(side, side), mode="bicubic", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)
