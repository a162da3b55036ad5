"""Most memory at once, allocation by allocation, of whatever runs on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step import Ours, Pairs
from clipscale.config import Config


class Peak(TorchDispatchMode):
    """Most bytes at once in storages that operations return, but for those of ``given``."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage()._cdata for tensor in given}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.given:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: one for key, one in self.alive.items() if not one[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.alive.values()))
        return out


def of_a_step(config: Config, pairs: int) -> tuple[int, float]:
    """Most bytes at once in a training step after the first one, and the tokens of its captions, in the mean."""
    ours, batch = Ours(config), Pairs.draw(config.model, pairs, "laion")
    ours(batch)
    ours.step.zero_grad()
    there = [*ours.model.parameters(), *ours.model.buffers(), batch.batch.images, batch.batch.text_ids]
    there += [tensor for state in ours.step.optimizer.state.values() for tensor in state.values()]
    with Peak(*there) as peak:
        ours(batch)
    stays = sum(tensor.untyped_storage().nbytes() for tensor in there)
    return stays + peak.bytes, batch.batch.text_lengths.float().mean().item()
