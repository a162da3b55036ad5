"""Contrastive losses over the global batch: the true value on every rank, and gradients whose mean is the true one."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipscale.losses.clip import clip_loss
    from clipscale.losses.cross_entropy import ClassifierStats, cross_entropy_loss
    from clipscale.losses.distill import Teacher, distill_loss
    from clipscale.losses.globalbatch import PairIds, duplicate_fraction
    from clipscale.losses.registry import LOSSES
    from clipscale.losses.siglip import siglip_loss
    from clipscale.losses.stats import LossStats

__all__ = [
    "LOSSES",
    "ClassifierStats",
    "LossStats",
    "PairIds",
    "Teacher",
    "clip_loss",
    "cross_entropy_loss",
    "distill_loss",
    "duplicate_fraction",
    "siglip_loss",
]

_HOMES = {
    "LOSSES": "registry",
    "ClassifierStats": "cross_entropy",
    "LossStats": "stats",
    "PairIds": "globalbatch",
    "Teacher": "distill",
    "clip_loss": "clip",
    "cross_entropy_loss": "cross_entropy",
    "distill_loss": "distill",
    "duplicate_fraction": "globalbatch",
    "siglip_loss": "siglip",
}


def __getattr__(name: str) -> Any:
    # clipscale.losses.memory must not pay for importing torch, so the losses are looked up on first use.
    if name in _HOMES:
        return getattr(import_module(f"clipscale.losses.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'clipscale.losses' has no attribute {name!r}")
