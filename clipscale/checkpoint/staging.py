"""Copies of a state dict in the host's memory, so that training may go on while they are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor


class Staging:
    """Keeps its buffers from one copy to the next: fresh memory costs several times the copy itself.

    They take as much of the host's memory as the state takes on this rank.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], torch.Tensor] = {}

    def copy(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state with every tensor in a buffer of its own, on the CPU; sharded ones stay sharded.

        What it returns is overwritten by the next copy.
        """
        copied = self._copied(state, ())
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # the copies are only begun
        return copied

    def _copied(self, value: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(value, torch.Tensor):
            return self._buffered(value.detach(), path)
        if isinstance(value, Mapping):
            return {key: self._copied(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copied(item, (*path, i)) for i, item in enumerate(value))
        return value

    def _buffered(self, tensor: torch.Tensor, path: tuple[Any, ...]) -> torch.Tensor:
        kept = self._kept.get(path)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = self._kept[path] = _on_host(tensor)
        else:
            _local(kept).copy_(_local(tensor), non_blocking=True)
        return kept


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "cpu":
        return tensor.clone()
    copied = tensor.to("cpu")
    if isinstance(copied, DTensor):
        copied._local_tensor = copied._local_tensor.pin_memory()  # as torch's own staging does
        return copied
    return copied.pin_memory()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
