"""One optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from clipscale.config import Config
from clipscale.data.loader import Batch, step_seed
from clipscale.distributed.collectives import Gathering, whole
from clipscale.distributed.runtime import Runtime
from clipscale.errors import ConfigError
from clipscale.models import CLIP, Features
from clipscale.optim import Ema
from clipscale.parallel import Parallelized, computed_in, takes_statistics, towers_autocast
from clipscale.telemetry import Stragglers
from clipscale.trainer.cached import backward_through_parts
from clipscale.trainer.objective import Objective, SendAhead, Stats, extra_rows


class Verdict(NamedTuple):
    """On one step, Float[] each, on the device and the same on all ranks."""

    skipped: torch.Tensor
    """1 if the loss or the gradient was not finite, so that nothing moved."""
    bad: torch.Tensor
    """1 if that was more than fp16's scaler looking for its scale."""
    loss: torch.Tensor
    """Infinite if it was no number."""


@dataclass
class TrainStep:
    """Forward, global-batch loss, backward, update: everything that moves the weights, in order.

    A step whose loss or gradient is not finite moves nothing: weights, moments, averages and running statistics keep
    their bits. That is decided on the device, from numbers that all ranks have alike; :attr:`verdict` tells it.

    Raises ConfigError when ``optim.microbatches`` asks for what this model or this rank's share of a batch cannot give.
    """

    config: Config
    runtime: Runtime
    laid_out: Parallelized
    objective: Objective
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Ema | None
    _stats: Stats | None = None  # of the last step, if they were asked for
    _norm: torch.Tensor | None = None  # of the last step's gradient before clipping, whole
    stragglers: Stragglers | None = None
    verdict: Verdict | None = None
    """On the last step."""

    def __post_init__(self) -> None:
        self._statistics = [*self.model.buffers()] if takes_statistics(self.model) else []
        pairs = self.config.global_batch_size // self.runtime.world
        self.microbatches = self.config.optim.count_microbatches(pairs)
        if self.microbatches > 1 and takes_statistics(self.model):
            raise ConfigError(
                f"optim.microbatches={self.config.optim.microbatches}: BatchNorm would take the statistics of "
                f"{self.microbatches} microbatches for those of the batch, so model.vision.timm="
                f"{self.config.model.vision.timm} needs optim.microbatches=1; parallel.activation_checkpointing=full "
                "saves memory too"
            )

    @property
    def model(self) -> CLIP:
        """The model that owns the parameters."""
        return self.laid_out.model

    def __call__(self, batch: Batch, samples_seen: int, lr: float, stats: bool = False) -> torch.Tensor:
        """Train on this rank's part of a batch that begins after ``samples_seen``. Returns the loss of the global
        batch, Float[], still on the device; after one with ``stats``, :meth:`statistics` tells more."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        before = [buffer.clone() for buffer in self._statistics]
        loss = self._backward(batch, samples_seen, stats)
        self.scaler.unscale_(self.optimizer)
        self._norm = self._clip()
        self.verdict = self._judge(loss, self._norm)
        self._update(self.verdict.skipped)
        for buffer, kept in zip(self._statistics, before, strict=True):
            buffer.copy_(torch.where(self.verdict.skipped > 0, kept, buffer))
        return loss

    def _clip(self) -> torch.Tensor:
        """Norm of the gradient over all parameters of all ranks, which is clipped if that is asked for."""
        highest = self.config.optim.clip_grad_norm
        if highest is not None:
            return whole(nn.utils.clip_grad_norm_(self.model.parameters(), highest, foreach=True))
        return whole(nn.utils.get_total_norm(_gradients(self.model), foreach=True))

    def _judge(self, loss: torch.Tensor, norm: torch.Tensor) -> Verdict:
        loss = loss.to(norm.device)
        finite = torch.isfinite(loss)
        skipped = ~(finite & torch.isfinite(norm))
        bad = skipped
        if self.scaler.is_enabled():  # it looks for its scale by letting gradients overflow
            scale = self.scaler._get_scale_async()  # its public name reads it back
            assert scale is not None
            bad = skipped & (~finite | (scale < 1))
        return Verdict(skipped.float(), bad.float(), torch.where(finite, loss, math.inf))

    def _update(self, skip: torch.Tensor) -> None:
        # Read by torch's fused optimizers, as its scaler does it: they leave weights, moments and counts alone.
        optimizer: Any = self.optimizer
        optimizer.found_inf = skip
        optimizer.step()
        del optimizer.found_inf
        self.scaler.update()
        self._clamp_temperature()
        if self.ema is not None:
            self.ema.update(skip)

    def _backward(self, batch: Batch, samples_seen: int, stats: bool) -> torch.Tensor:
        """Give the parameters their gradients, scaled as the scaler likes. Returns the loss, detached."""
        parts = batch.cut(self.microbatches)

        def forward(i: int, ahead: SendAhead | None = None) -> Features:
            # For what does not draw from the samples' own seeds. Derived, never saved: a resumed run draws what an
            # undisturbed one would have drawn, and a repeated forward pass what the first one drew.
            torch.manual_seed(step_seed(self.config.seed, samples_seen, self.runtime.rank, i))
            return self._features(parts[i], ahead)

        def backward(features: Features, gathering: Gathering | None = None) -> torch.Tensor:
            loss, self._stats = self.objective(features, batch, parts, stats, gathering)
            self.scaler.scale(loss).backward()
            return loss.detach()

        if len(parts) == 1:
            ahead = self.objective.send_ahead(batch)
            return backward(forward(0, ahead), ahead.gathering if ahead else None)
        return backward_through_parts(forward, len(parts), backward, self.laid_out.without_sync)

    def _features(self, batch: Batch, ahead: SendAhead | None) -> Features:
        device, ids, lengths = self.runtime.device, batch.text_ids, batch.text_lengths
        if batch.negative_ids is not None and batch.negative_lengths is not None:
            ids = torch.cat([ids, batch.negative_ids])
            lengths = torch.cat([lengths, batch.negative_lengths[batch.negative_lengths > 0]])
        images, ids, seeds = (tensor.to(device, non_blocking=True) for tensor in (batch.images, ids, batch.seeds))
        # A context for each pass: the casts that autocast keeps from one without a graph have none.
        with towers_autocast(self.config.precision.name, device):
            packing = self.model.text.packing(lengths, device, computed_in(self.config.precision.name))
            begin = ahead.begin if ahead else None
            # A method: FSDP hands on copies of dataclasses where it casts inputs, and a copy's gathering would be lost.
            with self.stragglers.computing() if self.stragglers else nullcontext():
                features = self.laid_out.module(images, ids, packing, begin, seeds)
        return features._replace(extra_text=extra_rows(features.extra_text, batch))

    def grad_norm(self) -> float:
        """Norm of the last step's gradient over all parameters of all ranks, before it was clipped."""
        assert self._norm is not None
        return self._norm.item()

    def param_norm(self) -> float:
        """Norm of all weights that are trained; a collective where they are sharded."""
        trained = [p.detach() for p in self.model.parameters() if p.requires_grad]
        return whole(nn.utils.get_total_norm(trained, foreach=True)).item()

    def logit_scale(self) -> float:
        """The multiplier on similarities."""
        return math.exp(whole(self.model.logit_scale.detach()).item())

    def statistics(self) -> dict[str, float]:
        """Numbers about the last step's batch, if its call asked for them."""
        found = self._stats._asdict() if self._stats is not None else {}
        return {f"train/{name}": value.item() for name, value in found.items()}

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _clamp_temperature(self) -> None:
        highest = self.config.loss.max_logit_scale
        if highest is not None and self.model.logit_scale.requires_grad:
            self.model.logit_scale.clamp_(0.0, math.log(highest))


def _gradients(model: nn.Module) -> Iterable[torch.Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]
