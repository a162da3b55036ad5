"""Numbers about a batch that the loss has at hand, computed when they are logged."""

from __future__ import annotations

from typing import NamedTuple

import torch

from clipscale.losses.globalbatch import PairIds, duplicate_fraction
from clipscale.losses.task import Task
from clipscale.losses.tiles import Grid, Similarity, largest_beside


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
def loss_stats(task: Task, one: Similarity, pair_ids: PairIds | None) -> LossStats:
    """Statistics of the logits that a loss went through. A collective, and a walk over the tiles of its own."""
    batch = task.batch
    positives = one.positives(batch.own)
    beside = largest_beside(one, Grid(batch, task.hidden, task.tile, one.x.new_empty(0, dtype=one.dtype)))
    # The two come from differently rounded sums: logits that are equal in truth count as equal.
    reached = positives + 1e-6 * one.scale.abs().double()
    hits = torch.stack([(other <= reached).sum() for other in beside]).double()
    features = [x.sum(0, dtype=torch.float64) for x in (one.x, one.y[batch.own])]
    (image_hits, text_hits), positive, images, texts = batch.sum([hits, positives.sum(), *features])
    offset = 0.0 if one.bias is None else one.bias.double().sum()
    total = one.scale.double().sum() * (images @ texts) + batch.pairs**2 * offset
    others = max(batch.pairs * (batch.pairs - 1), 1)
    found = [duplicate_fraction(ids, batch.group) for ids in pair_ids or () if ids is not None]
    return LossStats(
        image_hits / batch.pairs,
        text_hits / batch.pairs,
        positive / batch.pairs,
        (total - positive) / others,
        torch.stack(found).max() if found else positive.new_full((), torch.nan),
    )
