"""Sharded checkpoints that any layout and world size can load, and what a finished run gives back."""

from clipscale.checkpoint.checkpointer import Checkpointer, Saved, fingerprint, read_saved
from clipscale.checkpoint.loading import find_checkpoint, load

__all__ = ["Checkpointer", "Saved", "find_checkpoint", "fingerprint", "load", "read_saved"]
