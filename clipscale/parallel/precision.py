"""Arithmetic of the towers. Weights, loss, temperature and averages are fp32 in every policy."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from clipscale.config.optim import PrecisionName

# What the towers are autocast to; None computes in the weights' own fp32.
PRECISIONS: dict[str, torch.dtype | None] = {
    "fp32": None,
    "amp_bf16": torch.bfloat16,
    "amp_fp16": torch.float16,
}


def towers_autocast(precision: PrecisionName, device: torch.device) -> AbstractContextManager[None]:
    """The context in which the towers run forward."""
    dtype = PRECISIONS[precision.value]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def build_scaler(precision: PrecisionName, device: torch.device) -> torch.amp.GradScaler:
    """The loss scaler that fp16 needs; disabled, it passes everything through."""
    return torch.amp.GradScaler(device.type, enabled=precision is PrecisionName.amp_fp16)
