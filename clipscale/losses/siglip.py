"""The pairwise sigmoid loss (SigLIP, Zhai et al. 2023, algorithm 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from clipscale.distributed.collectives import Group, average, gather, rank
from clipscale.losses.checks import check_features


def siglip_loss(
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale: torch.Tensor | float,
    logit_bias: torch.Tensor | float,
    *,
    group: Group = None,
) -> torch.Tensor:
    """Sum over all N x N pairs of the global batch of ``-log sigmoid(±(s x·y + b))``, divided by N.

    Args and Returns as in :func:`clipscale.losses.clip_loss`; ``logit_bias`` is b, a scalar or Float[1].

    Raises:
        ValueError: shapes that are not Float[n, D] twice.
    """
    check_features(image, text)
    with torch.autocast(image.device.type, enabled=False):
        dtype = torch.promote_types(image.dtype, torch.float32)
        image, all_texts = image.to(dtype), gather(text.to(dtype), group)
        scale, bias = (x.to(dtype) if isinstance(x, torch.Tensor) else x for x in (logit_scale, logit_bias))
        logits = scale * image @ all_texts.T + bias
        # Every pair is a negative but one per row, which turns its sign.
        signs = torch.full_like(logits, -1.0)
        rows = torch.arange(image.shape[0], device=image.device)
        signs[rows, rows + rank(group) * image.shape[0]] = 1.0
        local = -F.logsigmoid(signs * logits).sum() / image.shape[0]
        return local + (average(local, group) - local.detach())
