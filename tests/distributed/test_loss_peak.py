"""What the losses take at once, allocation by allocation, is what the formula says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.peak import Peak
from clipscale.losses import clip_loss, siglip_loss
from clipscale.losses.memory import LossMemory, loss_memory

N, D = 2048, 128


def _peak(options: dict[str, Any]) -> int:
    torch.manual_seed(0)
    dtype = torch.float32 if options.get("feature_bytes", 4) == 4 else torch.bfloat16
    image, text = (F.normalize(torch.randn(N, D), dim=-1).to(dtype).requires_grad_() for _ in range(2))
    scale, bias = torch.tensor([10.0], requires_grad=True), torch.tensor([-10.0], requires_grad=True)
    given: dict[str, Any] = {"tile": options["tile"]}
    if options.get("masked"):
        given["pair_ids"] = (torch.arange(N) // 2, torch.arange(N) // 2)
    if options.get("smoothing"):
        given["label_smoothing"] = 0.1
    if "cache_mb" in options:
        given["cache_mb"] = options["cache_mb"]
    with Peak(image, text) as peak:
        if options.get("loss") == "siglip":
            siglip_loss(image, text, scale, bias, **given).backward()
        else:
            clip_loss(image, text, scale, **given).backward()
    return peak.bytes


SMALL, LARGE = (256, 512), (1024, 2048)
WAYS: list[dict[str, Any]] = [
    {"tile": SMALL},
    {"tile": LARGE},
    {"tile": SMALL, "cache_mb": 2},
    {"tile": LARGE, "smoothing": True},
    {"tile": LARGE, "masked": True, "feature_bytes": 2},
    {"tile": SMALL, "feature_bytes": 2},
    {"tile": SMALL, "loss": "siglip"},
    {"tile": LARGE, "loss": "siglip"},
    {"tile": LARGE, "loss": "siglip", "feature_bytes": 2},
]


@pytest.mark.parametrize("world", [1, 2])
def test_the_peak(pools: Any, world: int) -> None:
    for way in WAYS:
        found = max(pools[world].run(_peak, way)) if world > 1 else _peak(way)
        assert loss_memory(N, world, D, **way).peak == pytest.approx(found, rel=0.1), way


def test_what_a_gpu_would_hold() -> None:
    """The numbers of the document: a tile of 134 MB, or 268; with all else, nothing that grows with the square."""
    half = loss_memory(4096, 8, 512, feature_bytes=2, cuda=True, kernels=True)
    assert (half.gathered, half.gradients) == (32768 * 512 * 2, 4 * (4096 + 32768) * 512)
    assert 134e6 < half.tiles < 190e6 < 268e6 < loss_memory(4096, 8, 512, cuda=True, kernels=True).tiles < 290e6
    assert isinstance(half, LossMemory) and half.peak < 0.6 * 4 * 4096 * 32768
