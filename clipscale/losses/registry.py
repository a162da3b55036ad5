"""The losses by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clipscale.losses.clip import clip_loss
from clipscale.losses.siglip import siglip_loss

# name -> loss(image, text, logit_scale, logit_bias, **options); a loss without a bias ignores it.
LOSSES: dict[str, Callable[..., Any]] = {
    "clip": lambda image, text, scale, bias, **options: clip_loss(image, text, scale, **options),
    "siglip": siglip_loss,
}
