"""What training leaves out of the image tower, drawn from each sample's own seed.

Stochastic depth (Huang et al. 2016) leaves residual branches out, patch dropout (FLIP, Li et al. 2023) patches. What a
sample loses depends on its seed alone, never on the samples, the microbatch or the rank that it is computed with, so
that their number leaves the gradient as it is. Everything is computed on the seeds' device, and nothing waits for it.
"""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from clipscale.config.model import Vision
from clipscale.errors import ConfigError

PATHS, PATCHES = 1, 2  # what is drawn: a sample's numbers of one kind say nothing of those of another
_MASK = (1 << 32) - 1


def draw(seeds: torch.Tensor, kind: int, count: int) -> torch.Tensor:
    """``count`` uniform 32-bit numbers for each of ``seeds`` Int64[B], as Int64[B, count]: a hash, no device's own."""
    state = _scramble(_scramble(_scramble(seeds >> 32 & _MASK ^ kind) ^ seeds & _MASK))
    # An odd step visits all numbers of 32 bits; its product with a count stays within 63.
    steps = torch.arange(count, device=seeds.device) * 0x9E3779B9
    return _scramble(state[:, None] + steps & _MASK)


def _scramble(x: torch.Tensor) -> torch.Tensor:
    # Wellons' hash prospector, 32 bits: 15 2c1b3c6d 12 297a2d39 15. Both factors are below 2^31, so that no product
    # leaves the 63 bits in which signed integers are the same everywhere.
    x = (x ^ x >> 15) * 0x2C1B3C6D & _MASK
    x = (x ^ x >> 12) * 0x297A2D39 & _MASK
    return x ^ x >> 15


class DropPath(nn.Module):
    """Stochastic depth of one residual branch, Float[B, ...] to the same; ``scale`` Float[B] is 0 for the samples that
    lose it, and makes up for those in the others."""

    scale: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        return x * self.scale.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class DropPatches(nn.Module):
    """Patch dropout, Float[B, N, d] to Float[B, K, d]; ``kept`` Int64[B, K] are the tokens that stay."""

    kept: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        # Rows of all images in one: a gather along the second dimension would keep its input for the backward pass.
        first = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
        rows = (first + self.kept).flatten()
        return x.flatten(0, 1).index_select(0, rows).unflatten(0, self.kept.shape)


class Drops(nn.Module):
    """All that an image tower's trunk leaves out in training; made once the trunk is, whose modules it replaces.

    Raises ConfigError where patches are to be dropped and the trunk is no ViT.
    """

    thresholds: torch.Tensor

    def __init__(self, trunk: nn.Module, vision: Vision) -> None:
        super().__init__()
        rates = _path_rates(trunk)
        self._paths = [DropPath() for _ in rates]
        for name, path in zip(rates, self._paths, strict=True):
            trunk.set_submodule(name, path)
        # A branch stays where a number of 32 bits is below its threshold.
        thresholds = [round((1 - rate) * 2**32) for rate in rates.values()]
        # Integers, which no change of the model's dtype rounds.
        self.register_buffer("thresholds", torch.tensor(thresholds, dtype=torch.int64), persistent=False)
        self._patches: DropPatches | None = None
        if vision.patch_dropout:
            if not isinstance(trunk, VisionTransformer):
                raise ConfigError(
                    f"model.vision.patch_dropout={vision.patch_dropout}: model.vision.timm={vision.timm} is no "
                    "VisionTransformer of timm's, whose patches could be left out; use model.vision.patch_dropout=0"
                )
            self._patches = DropPatches()
            trunk.set_submodule("patch_drop", self._patches)
            self._prefix, self._of = trunk.num_prefix_tokens, trunk.patch_embed.num_patches
            self._keep = vision.kept_patches(self._of)

    def draw(self, count: int, seeds: torch.Tensor | None, device: torch.device) -> None:
        """Draw for the next forward pass in training, and for its repetition in the backward pass: of ``count`` images,
        by ``seeds`` Int64[count]; where there are none, by torch's own generator."""
        if not self._paths and self._patches is None:
            return
        if seeds is None:
            seeds = torch.randint(2**62, (count,), device=device)
        if self._paths:
            drawn = draw(seeds, PATHS, len(self._paths))
            scales = (drawn < self.thresholds) * (2.0**32 / self.thresholds)
            for path, scale in zip(self._paths, scales.unbind(1), strict=True):
                path.scale = scale.contiguous()
        if self._patches is not None:
            # Sorted by equal numbers' places, so that every device keeps the same ones, however unlikely a tie is.
            chosen = draw(seeds, PATCHES, self._of).argsort(dim=1, stable=True)[:, : self._keep] + self._prefix
            prefix = torch.arange(self._prefix, device=device).expand(count, -1)
            self._patches.kept = torch.cat([prefix, chosen], dim=1)


def _path_rates(trunk: nn.Module) -> dict[str, float]:
    """The rates of timm's modules that drop something, by name; of one in two places, under both."""
    found: list[tuple[str, Any]] = [*trunk.named_modules(remove_duplicate=False)]
    return {
        name: module.drop_prob
        for name, module in found
        if isinstance(module, timm.layers.DropPath) and module.drop_prob
    }
