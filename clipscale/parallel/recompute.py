"""Activation checkpointing: what a block's backward pass computes again instead of keeping it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from clipscale.parallel.batchnorm import has_batchnorm, recomputing

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]

# Attention under its names: on CPUs, of cuDNN, memory-efficient, FlashAttention, and that of captions of any lengths.
_ATTENTION = (
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_fused_attention_overrideable",
    "torch_attn._varlen_attn",
)
# Products with a weight, and the place of the first of their two factors.
_PRODUCTS = {"aten.mm": 0, "aten.addmm": 1}
_CONVOLUTION, _GROUPS = "aten.convolution", 8


def checkpoint_blocks(towers: Sequence[Sequence[nn.Module]], asked: str | int) -> None:
    """Let blocks compute again what ``parallel.activation_checkpointing`` says, the same on every tower.

    ``asked`` is "none", "full", "selective", or a number of blocks, the first of each tower (or all that it has).
    """
    if asked == "none":
        return
    for blocks in towers:
        for block in blocks if isinstance(asked, str) else blocks[:asked]:
            contexts = _contexts(block, selective=asked == "selective")
            options = {} if contexts is None else {"context_fn": contexts}
            # Not torch's checkpoint_wrapper: that renames every parameter below it.
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)


def keeps(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Which results a selective block keeps: those that are dear to compute, and that a backward pass needs.

    They are attention's, and those of products that widen: queries, keys and values of a transformer's block, and the
    first layer of its MLP. What narrows or keeps the width (the second layer, attention's projection) feeds a sum, of
    which no backward pass asks; kept, it would take memory, and it is a third of a block's products at most. Of
    convolutional blocks all are kept that have no groups, because each is what a norm wants again.
    """
    name = str(operation).rpartition(".")[0]
    if name in _ATTENTION:
        keep = True
    elif name in _PRODUCTS:
        inputs, outputs = args[_PRODUCTS[name] + 1].shape
        keep = inputs < outputs
    else:
        keep = name == _CONVOLUTION and args[_GROUPS] == 1
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts(block: nn.Module, selective: bool) -> Any:
    """What makes the contexts of a block's forward pass and of its repetition; None where there are none."""
    norms = has_batchnorm(block)
    if not selective:
        return partial(recomputing, block) if norms else None
    chosen = partial(create_selective_checkpoint_contexts, keeps)
    # The norms' first: what they set aside is nothing that the forward pass did, and is not looked for among that.
    return partial(_both, partial(recomputing, block), chosen) if norms else chosen


def _both(*made: Any) -> Contexts:
    forward, again = zip(*(make() for make in made), strict=True)
    return _entered(forward), _entered(again)


@contextmanager
def _entered(contexts: Sequence[AbstractContextManager[Any]]) -> Any:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
