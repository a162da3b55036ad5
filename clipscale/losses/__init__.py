"""Contrastive losses over the global batch: the true value on every rank, and gradients whose mean is the true one."""

from collections.abc import Callable
from typing import Any

from clipscale.losses.clip import clip_loss
from clipscale.losses.distill import Teacher, distill_loss
from clipscale.losses.globalbatch import PairIds, duplicate_fraction
from clipscale.losses.siglip import siglip_loss
from clipscale.losses.stats import LossStats

# name -> loss(image, text, logit_scale, logit_bias, **options); a loss without a bias ignores it.
LOSSES: dict[str, Callable[..., Any]] = {
    "clip": lambda image, text, scale, bias, **options: clip_loss(image, text, scale, **options),
    "siglip": siglip_loss,
}

__all__ = [
    "LOSSES",
    "LossStats",
    "PairIds",
    "Teacher",
    "clip_loss",
    "distill_loss",
    "duplicate_fraction",
    "siglip_loss",
]
