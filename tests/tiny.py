"""A tiny model as `clipscale export --to safetensors` leaves one, without training it."""

from __future__ import annotations

from pathlib import Path

from clipscale.checkpoint.export import write_safetensors
from clipscale.config import compose
from clipscale.models import build_model

SIZES = (
    "model=tiny", "model.vision.image_size=32", "model.vision.layers=1", "model.vision.width=32",
    "model.vision.heads=2", "model.text.layers=1", "model.text.width=32", "model.text.heads=2",
    "model.embed_dim=16", "eval.batch_size=16",
)  # fmt: skip


def write_tiny(directory: Path, *overrides: str) -> Path:
    """A model with fresh weights, which every command takes."""
    config, _ = compose([*SIZES, *overrides])
    directory.mkdir(parents=True)
    write_safetensors(build_model(config.model, seed=config.seed), config, directory)
    return directory
