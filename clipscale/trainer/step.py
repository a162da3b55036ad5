"""One optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from clipscale.config import Config
from clipscale.data.loader import Batch, step_seed
from clipscale.distributed.collectives import whole
from clipscale.distributed.runtime import Runtime
from clipscale.losses import LOSSES
from clipscale.models import CLIP, Features
from clipscale.optim import Ema
from clipscale.parallel import towers_autocast


@dataclass
class TrainStep:
    """Forward, global-batch loss, backward, update: everything that moves the weights, in order.

    ``module`` is the parallelised model that is called, ``model`` the one that owns the parameters.
    """

    config: Config
    runtime: Runtime
    module: Callable[..., Features]
    model: CLIP
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Ema | None
    _norm: torch.Tensor | None = None  # of the gradient before clipping; None if nothing is clipped

    def __call__(self, batch: Batch, samples_seen: int, lr: float) -> torch.Tensor:
        """Train on this rank's part of a batch that begins after ``samples_seen``. Returns the loss of the global
        batch, Float[], still on the device."""
        # Derived, never saved: a resumed run draws what an undisturbed one would have drawn.
        torch.manual_seed(step_seed(self.config.seed, samples_seen, self.runtime.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        device = self.runtime.device
        images = batch.images.to(device, non_blocking=True)
        ids = batch.text_ids.to(device, non_blocking=True)
        lengths = batch.text_lengths.to(device, non_blocking=True)
        with towers_autocast(self.config.precision.name, device):
            features = self.module(images, ids, lengths, int(batch.text_lengths.max()))
        loss = LOSSES[self.config.loss.name.value](*features)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        if self.config.optim.clip_grad_norm is not None:
            self._norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._clamp_temperature()
        if self.ema is not None:
            self.ema.update()
        return loss.detach()

    def grad_norm(self) -> float:
        """Norm of the last step's gradient over all parameters of all ranks, before it was clipped."""
        norm = nn.utils.get_total_norm(_gradients(self.model)) if self._norm is None else self._norm
        return whole(norm).item()

    def logit_scale(self) -> float:
        """The multiplier on similarities."""
        return math.exp(whole(self.model.logit_scale.detach()).item())

    def zero_grad(self) -> None:
        """Drop the gradients; kept until here so that their norm can be read."""
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _clamp_temperature(self) -> None:
        highest = self.config.loss.max_logit_scale
        if highest is not None:
            self.model.logit_scale.clamp_(0.0, math.log(highest))


def _gradients(model: nn.Module) -> Iterable[torch.Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]
