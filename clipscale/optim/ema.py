"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor


class Ema:
    """An fp32 average of a model's parameters, laid out as they are (sharded ones stay sharded).

    A plain list of tensors: torch's AveragedModel copies the module, which FSDP2 refuses.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._names = [name for name, _ in model.named_parameters()]
        self._parameters = [p for _, p in model.named_parameters()]
        # What is locked is its own average, for nothing.
        self._average = [p.detach().clone() if p.requires_grad else p.detach() for p in self._parameters]

    @torch.no_grad()
    def update(self, skip: torch.Tensor) -> None:
        """Move the average towards the weights; call it after every optimizer step.

        Where ``skip`` Float[] is 1, on the device, the step moved nothing, and the average stays as it is, bit for bit.
        """
        # A step of descent on the distance, which is the interpolation: of the operations over all parameters, only the
        # fused optimizers' can be told on the device to do nothing.
        torch._fused_sgd_(
            [_local(average) for average in self._average], [_local(p) for p in self._parameters], [],
            weight_decay=1.0, momentum=0.0, lr=1 - self.decay, dampening=0.0, nesterov=False, maximize=True,
            is_first_step=False, grad_scale=None, found_inf=skip.to(self._average[0].device),
        )  # fmt: skip

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in the model's place for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged tensors by parameter name."""
        return dict(zip(self._names, self._average, strict=True))

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self._parameters, self._average, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
