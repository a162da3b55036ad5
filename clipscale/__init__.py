"""clipscale: train CLIP-style image-text models at any scale.

``clipscale.load(run)`` gives back what a run trained: ``(model, preprocess, tokenizer)``.
``clipscale.rerank(run, caption, images)`` orders images by how well they match a caption.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load", "rerank"]

if TYPE_CHECKING:
    from clipscale.apps.rerank import rerank
    from clipscale.checkpoint.loading import load


def __getattr__(name: str) -> Any:
    # `clipscale --help` must not pay for importing torch, so these are looked up on first use.
    if name == "load":
        from clipscale.checkpoint.loading import load

        return load
    if name == "rerank":
        from clipscale.apps.rerank import rerank

        return rerank
    raise AttributeError(f"module 'clipscale' has no attribute {name!r}")
