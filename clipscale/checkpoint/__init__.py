"""Sharded checkpoints that any layout and world size can load, and what a finished run gives back."""

from clipscale.checkpoint.checkpointer import Checkpointer, Saved, fingerprint, read_saved
from clipscale.checkpoint.loading import TOKENIZER, find_checkpoint, load, load_tokenizer

__all__ = [
    "TOKENIZER",
    "Checkpointer",
    "Saved",
    "find_checkpoint",
    "fingerprint",
    "load",
    "load_tokenizer",
    "read_saved",
]
