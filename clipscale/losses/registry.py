"""The losses by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clipscale.losses.clip import clip_loss
from clipscale.losses.cross_entropy import cross_entropy_loss
from clipscale.losses.siglip import siglip_loss

# name -> loss(image, text, logit_scale, logit_bias, **options); a loss without a bias ignores it. That of a classifier
# takes logits and labels for image and text, and has no scale.
LOSSES: dict[str, Callable[..., Any]] = {
    "clip": lambda image, text, scale, bias, **options: clip_loss(image, text, scale, **options),
    "siglip": siglip_loss,
    "cross_entropy": lambda logits, labels, scale, bias, **options: cross_entropy_loss(logits, labels, **options),
}
