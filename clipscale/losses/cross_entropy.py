"""Cross entropy over fixed classes: what a classifier is fine-tuned with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from clipscale.distributed.collectives import Group, average


class ClassifierStats(NamedTuple):
    """Over the global batch, equal on every rank, on the device: ``top1`` Float[], the share of images whose own class
    has the highest logit."""

    top1: torch.Tensor


def cross_entropy_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    group: Group = None,
    label_smoothing: float = 0.0,
    stats: bool = False,
) -> Any:
    """Mean cross entropy over the global batch of N = W·n images.

    Args:
        logits: Float[n, C], this rank's; every rank brings the same n.
        labels: Int[n], classes from 0 to C - 1.
        group: process group of the global batch; None is the default group, or this process alone.
        label_smoothing: part of the target that is spread evenly over all classes.
        stats: return ``(loss, ClassifierStats)``.

    Returns:
        Float[], the loss of the whole batch, the same on every rank. The mean over ranks of its gradients, which is
        what DDP and FSDP2 form, is the gradient of that loss.
    """
    labels = labels.long()
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        mine = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    loss = mine + (average(mine, group) - mine.detach())
    if not stats:
        return loss
    return loss, ClassifierStats(average((logits.argmax(1) == labels).double().mean(), group))
