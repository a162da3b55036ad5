"""Numbers about a batch that the loss has at hand, computed when they are logged."""

from __future__ import annotations

from typing import NamedTuple

import torch

from clipscale.losses.globalbatch import GlobalBatch, PairIds, duplicate_fraction


class LossStats(NamedTuple):
    """Over the global batch, equal on every rank; each Float64[], still on the device.

    ``i2t_top1`` and ``t2i_top1``: share of images whose own text, and of texts whose own image, no other candidate
    of the batch surpasses; candidates are what the loss compares with. ``positive_logit`` and ``negative_logit``: mean
    logits of the pairs and of all other image-text combinations. ``duplicate_fraction``: share of pairs whose image or
    text id another pair has too, the larger of the two; NaN without ``pair_ids``.
    """

    i2t_top1: torch.Tensor
    t2i_top1: torch.Tensor
    positive_logit: torch.Tensor
    negative_logit: torch.Tensor
    duplicate_fraction: torch.Tensor


@torch.no_grad()
def loss_stats(
    batch: GlobalBatch,
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    positives: torch.Tensor,
    beside: tuple[torch.Tensor, torch.Tensor],
    pair_ids: PairIds | None,
) -> LossStats:
    """Statistics of ``positives`` Float64[n] and the largest logits ``beside`` them, Float[n] each. A collective."""
    # The two come from differently rounded sums: logits that are equal in truth count as equal.
    reached = positives + 1e-6 * scale.abs().double()
    hits = torch.stack([(other <= reached).sum() for other in beside]).double()
    sums = [hits, positives.sum(), image.sum(0, dtype=torch.float64), text.sum(0, dtype=torch.float64)]
    (image_hits, text_hits), positive, images, texts = batch.sum(sums)
    offset = 0.0 if bias is None else bias.double().sum()
    total = scale.double().sum() * (images @ texts) + batch.pairs**2 * offset
    others = max(batch.pairs * (batch.pairs - 1), 1)
    found = [duplicate_fraction(ids, batch.group) for ids in pair_ids or () if ids is not None]
    return LossStats(
        image_hits / batch.pairs,
        text_hits / batch.pairs,
        positive / batch.pairs,
        (total - positive) / others,
        torch.stack(found).max() if found else positive.new_full((), torch.nan),
    )
