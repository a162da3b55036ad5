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
        gradients = _gradients_of_parts(batch, [*seen, kept])
        # First, not last: DDP reduces in the backward pass of a forward pass that was made outside of this context. Of
        # one that was made in it, the gradients would stay each rank's own, without a word.
        torch.autograd.backward(_outputs(kept), gradients[last])
        for i in range(last - 1):
            torch.autograd.backward(_outputs(forward(i)), gradients[i])
    part = forward(last - 1)
    outputs, given = _outputs(part), gradients[last - 1]
    # The temperature is no part's own: it gets its gradient once, and here, where DDP waits for every parameter's.
    for output, leaf in ((part.logit_scale, batch.logit_scale), (part.logit_bias, batch.logit_bias)):
        if output is not None and leaf is not None and leaf.requires_grad:
            outputs.append(output)
            given.append(_gradient(leaf))
    torch.autograd.backward(outputs, given)
    return loss


def _outputs(part: Features) -> list[torch.Tensor]:
    """The features of a part, which its rows alone determine; those of a locked tower want no gradient."""
    return [x for x in (part.image, part.text, part.extra_text) if x.requires_grad and len(x)]


def _gradients_of_parts(batch: Features, parts: Sequence[Features]) -> list[list[torch.Tensor]]:
    of_outputs = [
        _gradient(leaf).split([len(part[i]) for part in parts])  # type: ignore[arg-type]
        for i, leaf in enumerate((batch.image, batch.text, batch.extra_text))
        if leaf.requires_grad and len(leaf)
    ]
    return [list(of_part) for of_part in zip(*of_outputs, strict=True)]


def _leaves(parts: Sequence[Features]) -> Features:
    """The features of all parts as one batch's, without their graphs, ready to take gradients."""
    scale, bias = parts[-1].logit_scale, parts[-1].logit_bias
    return Features(
        _leaf(torch.cat([part.image for part in parts])),
        _leaf(torch.cat([part.text for part in parts])),
        _leaf(torch.cat([part.extra_text for part in parts])),
        _leaf(scale),
        None if bias is None else _leaf(bias),
    )


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)  # parts joined want one if the kept part does


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    assert leaf.grad is not None, "the loss depends on all features"
    return leaf.grad
