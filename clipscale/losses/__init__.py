"""Contrastive losses over the global batch: the true value on every rank, and gradients whose mean is the true one."""

from collections.abc import Callable

import torch

from clipscale.losses.clip import clip_loss
from clipscale.losses.siglip import siglip_loss

# name -> loss(image, text, logit_scale, logit_bias, group); a loss without a bias ignores it.
LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "clip": lambda image, text, scale, bias, group=None: clip_loss(image, text, scale, group=group),
    "siglip": lambda image, text, scale, bias, group=None: siglip_loss(image, text, scale, bias, group=group),
}

__all__ = ["LOSSES", "clip_loss", "siglip_loss"]
