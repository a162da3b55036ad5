"""The dual encoder: a timm image tower, our text transformer, one shared space and its temperature."""

from clipscale.models.clip import CLIP, Features, build_model

__all__ = ["CLIP", "Features", "build_model"]
