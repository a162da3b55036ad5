"""What ``loss.py`` measures: the losses of both sides, the features they get, and one forward and backward of them."""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from clipscale.losses import clip_loss, siglip_loss

# Mean and deviation of the cosine of an image and its own text. At 2,048 pairs of 512 dimensions the loss is then 6e-5
# at a scale of 50 and 3e-8 at 80, as in a model that has learnt its data.
ALIGNED, SPREAD = 0.405, 0.02
SCALES = (14.3, 30.0, 50.0, 80.0)
BIAS = -10.0  # SigLIP's first bias, with its first scale of 10
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Side:
    """A loss as ``call(image, text, scale, bias)``, and the name of the peer that it is measured against."""

    call: Callable[..., torch.Tensor]
    scale: float
    peer: str | None = None


def sides() -> dict[str, Side]:
    """All that is measured, by name; those of a peer first."""
    from open_clip.loss import ClipLoss, SigLipLoss

    softmax, sigmoid = ClipLoss(), SigLipLoss()
    return {
        "open_clip clip": Side(lambda image, text, scale, _: softmax(image, text, scale), SCALES[0]),
        "open_clip siglip": Side(sigmoid, 10.0),
        "clip": Side(_clip, SCALES[0], "open_clip clip"),
        "clip, 256 MB of tiles": Side(partial(_clip, cache_mb=256), SCALES[0], "open_clip clip"),
        "siglip": Side(siglip_loss, 10.0, "open_clip siglip"),
    }


def _clip(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, _: torch.Tensor, **how: int) -> torch.Tensor:
    return clip_loss(image, text, scale, **how)


def features(pairs: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64[n, D] twice, unit vectors: images in random directions, texts at about that cosine to them."""
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(pairs, width, generator=generator, dtype=torch.float64), dim=-1)
    across = torch.randn(pairs, width, generator=generator, dtype=torch.float64)
    across = F.normalize(across - (across * image).sum(dim=-1, keepdim=True) * image, dim=-1)
    cosine = ALIGNED + SPREAD * torch.randn(pairs, 1, generator=generator, dtype=torch.float64)
    return image, cosine * image + (1 - cosine**2).sqrt() * across


@dataclass
class Inputs:
    """Leaves of the graph: Float[n, D] twice, and the scale and bias as Float[]."""

    image: torch.Tensor
    text: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def make(cls, pairs: int, width: int, scale: float, dtype: torch.dtype = torch.float32) -> Inputs:
        """Those of ``features``, rounded to fp32 first whatever the type: all types get the same pairs."""
        parameters = torch.float64 if dtype is torch.float64 else torch.float32
        image, text = (feature.float().to(dtype).requires_grad_() for feature in features(pairs, width))
        return cls(image, text, *(torch.tensor(x, dtype=parameters, requires_grad=True) for x in (scale, BIAS)))

    def run(self, side: Side, around: AbstractContextManager | None = None) -> torch.Tensor:
        """Forward and backward; the gradients of an earlier one are dropped before. Returns the loss."""
        leaves = (self.image, self.text, self.scale, self.bias)
        for leaf in leaves:
            leaf.grad = None
        with around or nullcontext():
            loss = side.call(*leaves)
        loss.backward()
        return loss.detach()


def seconds(inputs: Inputs, side: Side) -> float:
    """CPU seconds that this process spends on one forward and backward."""
    started = time.process_time()
    inputs.run(side)
    return time.process_time() - started


def peak_bytes(name: str, pairs: int, width: int) -> int:
    """How far one forward and backward raises this process's resident memory above where it stood with the inputs.

    For a process of its own (``loss.py`` says with which allocator). A small problem goes first, so that libraries and
    what they set up on first use do not count. The kernel's high-water mark is reset (Linux only); ``ru_maxrss`` would
    not do, since a child starts with its parent's.
    """
    side = sides()[name]
    Inputs.make(512, width, side.scale).run(side)
    inputs = Inputs.make(pairs, width, side.scale)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _high_water_bytes()
    inputs.run(side)
    return _high_water_bytes() - before


def _high_water_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    assert found
    return 1024 * int(found[1])


def errors(pairs: int, width: int, scale: float) -> dict[str, list[float]]:
    """Relative errors of the loss, the features' gradients and the scale's, against float64 on the same fp32 features.

    The reference takes the cross entropies of the whole matrix of logits in float64. Rounding features to bf16 is part
    of what it costs to have them in bf16, and counts.
    """
    ours, theirs = (sides()[name] for name in ("clip", "open_clip clip"))
    exact = Inputs.make(pairs, width, scale, torch.float64)
    truth = _result(exact, exact.run(Side(_dense, scale)))
    found = {"loss": [truth[0].item()]}
    for name, side, dtype, autocast in (
        ("open_clip fp32", theirs, torch.float32, False),
        ("open_clip bf16 autocast", theirs, torch.float32, True),
        ("clipscale fp32", ours, torch.float32, False),
        ("clipscale bf16 features", ours, torch.bfloat16, False),
    ):
        inputs = Inputs.make(pairs, width, scale, dtype)
        loss = inputs.run(side, torch.autocast("cpu", torch.bfloat16, enabled=autocast))
        pairs_of = zip(_result(inputs, loss), truth, strict=True)
        found[name] = [((mine - right).norm() / right.norm()).item() for mine, right in pairs_of]
    return found


def _dense(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    logits, target = scale * image @ text.T, torch.arange(len(image))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _result(inputs: Inputs, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert inputs.image.grad is not None and inputs.text.grad is not None and inputs.scale.grad is not None
    both = torch.cat([inputs.image.grad, inputs.text.grad])
    return loss.double(), both.double(), inputs.scale.grad.double()
