"""Sharded checkpoints that any layout and world size can load, and what a finished run gives back."""

from clipscale.checkpoint.checkpointer import Checkpointer, fingerprint
from clipscale.checkpoint.loading import load
from clipscale.checkpoint.manifest import Saved, Stored
from clipscale.checkpoint.own import TOKENIZER, find_checkpoint, load_tokenizer

__all__ = [
    "TOKENIZER",
    "Checkpointer",
    "Saved",
    "Stored",
    "find_checkpoint",
    "fingerprint",
    "load",
    "load_tokenizer",
]
