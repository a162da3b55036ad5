"""CLIP's symmetric softmax loss (CLIP paper, figure 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from clipscale.distributed.collectives import Group, average, gather, rank
from clipscale.losses.checks import check_features


def clip_loss(
    image: torch.Tensor, text: torch.Tensor, logit_scale: torch.Tensor | float, *, group: Group = None
) -> torch.Tensor:
    """Mean of the image-to-text and text-to-image cross entropies over the global batch.

    Args:
        image, text: Float[n, D], this rank's n pairs, L2-normalised. Every rank brings the same n.
        logit_scale: the multiplier on cosine similarities, already exponentiated; a scalar or Float[1].
        group: process group of the global batch; None is the default group, or this process alone.

    Returns:
        Float[], the loss of the whole batch, the same on every rank. Its gradients are such that their mean over
        ranks, which is what DDP and FSDP2 form, is the gradient of that loss.

    Raises:
        ValueError: shapes that are not Float[n, D] twice.
    """
    check_features(image, text)
    with torch.autocast(image.device.type, enabled=False):
        dtype = torch.promote_types(image.dtype, torch.float32)  # fp32 logits whatever the towers compute in
        image, text = image.to(dtype), text.to(dtype)
        all_images, all_texts = gather(image, group), gather(text, group)
        scale = logit_scale.to(dtype) if isinstance(logit_scale, torch.Tensor) else logit_scale
        first = rank(group) * image.shape[0]
        target = torch.arange(first, first + image.shape[0], device=image.device)
        local = (
            F.cross_entropy(scale * image @ all_texts.T, target) + F.cross_entropy(scale * text @ all_images.T, target)
        ) / 2
        return local + (average(local, group) - local.detach())
