"""What every contrastive loss asks of its inputs."""

from __future__ import annotations

import torch


def check_features(image: torch.Tensor, text: torch.Tensor) -> None:
    """Raise ValueError unless both are Float[n, D] of one shape, n at least 1."""
    if image.ndim != 2 or image.shape != text.shape or not image.shape[0]:
        raise ValueError(f"image and text must both be Float[n, D], got {tuple(image.shape)} and {tuple(text.shape)}")
