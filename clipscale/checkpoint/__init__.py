"""Sharded checkpoints that any layout and world size can load, and what a finished run gives back."""

from clipscale.checkpoint.checkpointer import Checkpointer, Saved
from clipscale.checkpoint.loading import load

__all__ = ["Checkpointer", "Saved", "load"]
