"""Gradient caching (Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup").

A contrastive loss couples all pairs of a batch, so the gradients of microbatches do not add up to its own. But it sees
the towers' features alone: they are computed without a graph, the loss gives each its gradient, and then one microbatch
after the other is taken through the towers again and backward from the gradients of its features. The sum is exactly
the gradient of the whole batch, with the activations of one microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from clipscale.models import Features


def backward_through_parts(
    forward: Callable[[int], Features],
    count: int,
    backward: Callable[[Features], torch.Tensor],
    without_sync: Callable[[], AbstractContextManager[Any]],
) -> torch.Tensor:
    """Give the parameters the gradients of a batch of which ``count`` parts, at least 2, pass the towers one by one.

    Args:
        forward: the features of part i; called twice for all parts but the last, and must give the same again.
        backward: takes the loss of the features of all parts back to them, once; its value is returned.
        without_sync: context in which gradients stay on this rank.
    """
    last = count - 1
    with without_sync():
        with torch.no_grad():
            seen = [forward(i) for i in range(last)]
        kept = forward(last)  # its graph is the one that there is room for: one forward pass less
        batch = _leaves([*seen, kept])
        loss = backward(batch)
        images = _gradient(batch.image).split([len(part.image) for part in (*seen, kept)])
        texts = _gradient(batch.text).split([len(part.text) for part in (*seen, kept)])
        # First, not last: DDP reduces in the backward pass of a forward pass that was made outside of this context. Of
        # one that was made in it, the gradients would stay each rank's own, without a word.
        torch.autograd.backward([kept.image, kept.text], [images[last], texts[last]])
        for i in range(last - 1):
            part = forward(i)
            torch.autograd.backward([part.image, part.text], [images[i], texts[i]])
    part = forward(last - 1)
    outputs, gradients = [part.image, part.text], [images[last - 1], texts[last - 1]]
    # The temperature is no part's own: it gets its gradient once, and here, where DDP waits for every parameter's.
    for output, leaf in ((part.logit_scale, batch.logit_scale), (part.logit_bias, batch.logit_bias)):
        if output is not None and leaf is not None:
            outputs.append(output)
            gradients.append(_gradient(leaf))
    torch.autograd.backward(outputs, gradients)
    return loss


def _leaves(parts: Sequence[Features]) -> Features:
    """The features of all parts as one batch's, without their graphs, ready to take gradients."""
    scale, bias = parts[-1].logit_scale, parts[-1].logit_bias
    return Features(
        _leaf(torch.cat([part.image for part in parts])),
        _leaf(torch.cat([part.text for part in parts])),
        _leaf(scale),
        None if bias is None else _leaf(bias),
    )


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_()


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    assert leaf.grad is not None, "the loss depends on all features"
    return leaf.grad
