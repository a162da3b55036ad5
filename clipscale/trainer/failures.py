"""What goes wrong outside of clipscale, in one line that says what to do."""

from __future__ import annotations

import errno
from pathlib import Path

import torch
import torch.distributed as dist

from clipscale.config import Config
from clipscale.distributed.runtime import restarts_left
from clipscale.errors import ClipscaleError, DiskFullError, LostPeerError, OutOfMemoryError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How the back ends begin what they say of a peer that is gone; gloo's errors have no type of their own.
COLLECTIVE = ("gloo", "NCCL", "ncclRemoteError", "Connection closed by peer", "Timed out waiting")


def in_one_line(error: BaseException, config: Config, path: Path) -> ClipscaleError | None:
    """The error that the user is to see in place of ``error``; None if that is one to look into."""
    first = next(iter(str(error).splitlines()), type(error).__name__)
    if isinstance(error, torch.OutOfMemoryError):
        return OutOfMemoryError(
            f"out of memory on the device: {first.partition('. GPU')[0]}; use {_smaller(config)}, which changes no "
            "gradient, or more GPUs with parallel=fsdp"
        )
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return DiskFullError(
            f"{error.filename or path} cannot be written: {error.strerror}; make room, and the same command goes on "
            "from the last checkpoint"
        )
    if isinstance(error, dist.DistError | RuntimeError) and any(sign in first for sign in COLLECTIVE):
        then = "all ranks start again" if restarts_left() else "the same command goes on from the last checkpoint"
        return LostPeerError(f"another rank is gone or does not answer ({first}); see {path}/logs; {then}")
    return None


def _smaller(config: Config) -> str:
    optim, choices = config.optim, []
    pairs = config.global_batch_size // max(1, config.cluster.nodes * config.cluster.processes_per_node)
    least = optim.max_microbatch if optim.max_microbatch is not None else pairs
    if least > 1:
        choices.append(f"optim.microbatches=auto optim.max_microbatch={least // 2}")
    if config.parallel.activation_checkpointing != "full":
        choices.append("parallel.activation_checkpointing=full")
    return " or ".join(choices) or "a smaller model.vision.image_size"
