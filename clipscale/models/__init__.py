"""The dual encoder: a timm image tower, our text transformer, one shared space and its temperature."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipscale.models.clip import CLIP, Classifier, Features, build_model

__all__ = ["CLIP", "Classifier", "Features", "build_model"]


def __getattr__(name: str) -> Any:
    # clipscale.models.flops must not pay for importing torch and timm, so the towers are looked up on first use.
    if name in __all__:
        from clipscale.models import clip

        return getattr(clip, name)
    raise AttributeError(f"module 'clipscale.models' has no attribute {name!r}")
