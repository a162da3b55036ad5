"""clipscale: train CLIP-style image-text models at any scale.

``clipscale.load(run)`` gives back what a run trained: ``(model, preprocess, tokenizer)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from clipscale.checkpoint.loading import load


def __getattr__(name: str) -> Any:
    # `clipscale --help` must not pay for importing torch, so `load` is looked up on first use.
    if name == "load":
        from clipscale.checkpoint.loading import load

        return load
    raise AttributeError(f"module 'clipscale' has no attribute {name!r}")
