"""The loss of many ranks is the loss of one, in value and in every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from clipscale.losses import clip_loss, siglip_loss

N, D = 24, 16


def _features(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(N, D, generator=generator, dtype=torch.float64) for _ in range(2))
    return F.normalize(image, dim=-1).to(dtype), F.normalize(text, dim=-1).to(dtype)


def _dense(name: str, image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    logits = scale * image @ text.T
    if name == "clip":
        target = torch.arange(len(image))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    signs = 2 * torch.eye(len(image), dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * (logits + bias)).sum() / len(image)


def _grads(name: str, dtype: torch.dtype, share: slice | None, factor: float) -> dict[str, Any]:
    image, text = _features(dtype)
    if share is not None:
        image, text = image[share], text[share]
    image, text = image.clone().requires_grad_(), text.clone().requires_grad_()
    scale = torch.tensor([20.0], dtype=dtype, requires_grad=True)
    bias = torch.tensor([-5.0], dtype=dtype, requires_grad=True)
    if share is None:
        loss = _dense(name, image, text, scale, bias)
    else:
        loss = clip_loss(image, text, scale) if name == "clip" else siglip_loss(image, text, scale, bias)
    (factor * loss).sum().backward()
    out = {"loss": loss.detach(), "image": image.grad, "text": text.grad, "scale": scale.grad}
    return out | ({"bias": bias.grad} if name == "siglip" else {})


def _on_rank(name: str, dtype: torch.dtype, factor: float) -> dict[str, Any]:
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    n = N // world
    return _grads(name, dtype, slice(rank * n, (rank + 1) * n), factor)


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_equals_the_dense_loss(pools: Any, name: str, world: int, dtype: torch.dtype, factor: float) -> None:
    bound = 1e-10 if dtype is torch.float64 else 1e-5
    truth = _grads(name, torch.float64, None, factor)
    ranks = pools[world].run(_on_rank, name, dtype, factor) if world > 1 else [_on_rank(name, dtype, factor)]
    for result in ranks:
        assert abs(result["loss"].double() - truth["loss"]).max() <= bound * abs(truth["loss"])
    # DDP and FSDP2 average over ranks: features belong to one rank each, so W times the truth is theirs.
    for key in ("image", "text"):
        mine = torch.cat([result[key] for result in ranks]).double() / world
        assert (mine - truth[key]).norm() <= bound * truth[key].norm(), key
    for key in ("scale", "bias"):
        if key in truth:
            mean = sum(result[key].double() for result in ranks) / world
            assert (mean - truth[key]).norm() <= bound * max(truth[key].norm(), 1e-3), key


def _locked(name: str) -> tuple[bool, torch.Tensor]:
    image, text = _features(torch.float64)
    text = text.clone().requires_grad_()
    scale, bias = torch.tensor(20.0), torch.tensor(-5.0)
    loss = clip_loss(image, text, scale) if name == "clip" else siglip_loss(image, text, scale, bias)
    loss.backward()
    return image.grad is None, text.grad


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_locked_tower(pool2: Any, name: str) -> None:
    assert all(locked for locked, _ in pool2.run(_locked, name))


def test_logits_are_fp32_under_autocast() -> None:
    image, text = _features(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = clip_loss(image, text, 50.0)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, clip_loss(image, text, 50.0))


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"Float\[n, D\]"):
        clip_loss(torch.zeros(2, 3), torch.zeros(3, 3), 1.0)
    with pytest.raises(ValueError, match=r"Float\[n, D\]"):
        siglip_loss(torch.zeros(0, 3), torch.zeros(0, 3), 1.0, 0.0)


def test_agrees_with_open_clip() -> None:
    from open_clip.loss import ClipLoss, SigLipLoss

    image, text = _features(torch.float32)
    scale, bias = torch.tensor(20.0), torch.tensor(-5.0)
    torch.testing.assert_close(clip_loss(image, text, scale), ClipLoss()(image, text, scale))
    torch.testing.assert_close(siglip_loss(image, text, scale, bias), SigLipLoss()(image, text, scale, bias))
