"""Arithmetic of the towers. Weights, loss, temperature and averages are fp32 in every policy."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from clipscale.config.optim import PrecisionName

# What the towers are autocast to; None computes in the weights' own dtype.
PRECISIONS: dict[str, torch.dtype | None] = {
    "fp32": None,
    "amp_bf16": torch.bfloat16,
    "amp_fp16": torch.float16,
    "bf16": None,
}


def towers_autocast(precision: PrecisionName, device: torch.device) -> AbstractContextManager[None]:
    """The context in which the towers run forward."""
    dtype = PRECISIONS[precision.value]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def towers_policy(precision: PrecisionName, output: torch.dtype | None = None) -> MixedPrecisionPolicy:
    """What sharded weights become when they are gathered, with gradients that are reduced in fp32; and what a module's
    output is cast to, where it is."""
    if precision is not PrecisionName.bf16:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=output)


def computed_in(precision: PrecisionName) -> torch.dtype:
    """What attention, and all that is a product, is computed in."""
    return torch.bfloat16 if precision is PrecisionName.bf16 else PRECISIONS[precision.value] or torch.float32


def unsharded(precision: PrecisionName) -> PrecisionName:
    """What comes next to a precision where weights lie whole, as those of a teacher do."""
    return PrecisionName.amp_bf16 if precision is PrecisionName.bf16 else precision


def build_scaler(precision: PrecisionName, device: torch.device) -> torch.amp.GradScaler:
    """The loss scaler that fp16 needs; disabled, it passes everything through."""
    return torch.amp.GradScaler(device.type, enabled=precision is PrecisionName.amp_fp16)
