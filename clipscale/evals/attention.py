"""The attention of a forward pass, with its gradients: what fused attention never writes down."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class RecordedAttention(TorchFunctionMode):
    """Inside this context, attention is computed in plain sight, and its weights are kept in ``weights``.

    Each is Float[B, heads, Q, K], in the order in which they were computed, and part of the graph, so that autograd
    gives the gradient of a score for them. Whatever calls torch's ``scaled_dot_product_attention`` is seen: timm's
    towers and their pools, our text tower, those of transformers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[torch.Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
        logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
            logits = logits.masked_fill(hidden, -math.inf)
        if attn_mask is not None:
            is_bool = attn_mask.dtype == torch.bool
            logits = logits.masked_fill(~attn_mask, -math.inf) if is_bool else logits + attn_mask
        weights = logits.softmax(-1)
        if weights.requires_grad:
            self.weights.append(weights)
        return F.dropout(weights, dropout_p) @ value
