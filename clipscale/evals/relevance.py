"""Which parts of an image made its similarity to a text, by its gradients or by its attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from clipscale.errors import ClipscaleError, ConfigError
from clipscale.evals.attention import RecordedAttention
from clipscale.models.vision import VisionTower

STEPS = 16  # of the integral; with 8, deletion curves are the same to three digits


def similarity(tower: VisionTower, images: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Float[B], the normalised features of images, as VisionTower takes them, times Float[B, D]: cosine similarities
    where those are unit vectors, differences of them where they are differences."""
    return (F.normalize(tower(images).float(), dim=-1) * direction).sum(-1)


def relevance(tower: VisionTower, images: torch.Tensor, direction: torch.Tensor, method: str) -> torch.Tensor:
    """Float[B, rows, columns], how much each cell of images UInt8[B, 3, S, S] speaks for ``direction`` Float[B, D].

    The cells are the patches of a ViT, or the places of the last feature map of anything else. ``integrated`` is in
    units of the score, and has both signs; ``attention`` and ``gradcam`` are shares, at least 0, with a sum of 1.
    Raises ConfigError for a method that does not fit the tower, which :func:`methods` names.
    """
    fitting = methods(tower)
    if method not in fitting:
        raise ConfigError(f"--method {method}: for {type(tower.trunk).__name__}, choose from {', '.join(fitting)}")
    found = METHODS[method](tower, images, direction).detach().float()
    if method == "integrated":
        return found
    return found / found.sum((1, 2), keepdim=True).clamp(min=torch.finfo(found.dtype).tiny)


def methods(tower: VisionTower) -> tuple[str, ...]:
    """The methods that fit a tower, the one that is best where it was measured first (docs/explaining.md)."""
    if _layout(tower.trunk) is not None:
        return ("integrated", "attention")
    return ("integrated", "gradcam")


def cells(tower: VisionTower) -> tuple[int, int]:
    """Rows and columns of what :func:`relevance` gives. Raises ClipscaleError for a tower that has no such."""
    if (layout := _layout(tower.trunk)) is not None:
        return layout.grid
    size = tower.image_size
    with torch.no_grad():
        rows, columns = _feature_map(tower, tower.mean.new_zeros(1, 3, size, size))[1].shape[2:]
    return rows, columns


def cell_of(size: int, count: int) -> torch.Tensor:
    """Int64[size], which of ``count`` cells, that go over all of the image, each of its rows (or columns) of pixels is
    in: the cells are unequal where the size is no multiple of their number, and every pixel is in one."""
    return torch.arange(size) * count // size


def cell_sums(values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Float[B, rows, columns], of Float[B, S, S] the sums over the cells."""
    rows, columns = (
        F.one_hot(cell_of(size, count), count).to(values) for size, count in zip(values.shape[1:], grid, strict=True)
    )
    return rows.T @ values @ columns


def mean_colour(images: torch.Tensor) -> torch.Tensor:
    """Images of one colour each, the mean of theirs: UInt8[B, 3, S, S]."""
    return images.float().mean((2, 3), keepdim=True).round().to(images.dtype).expand(images.shape)


def _integrated(tower: VisionTower, images: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Integrated gradients (Sundararajan, Taly and Yan 2017, arXiv:1703.01365, equations 1 and 3) on the way from the
    image's mean colour, added up over each cell: all cells together are what the score gains on that way."""
    end = tower.normalize(images).detach()
    start = tower.normalize(mean_colour(images))
    total = torch.zeros_like(end)
    for step in range(STEPS):
        point = (start + (end - start) * ((step + 0.5) / STEPS)).requires_grad_()
        total += torch.autograd.grad(similarity(tower, point, direction).sum(), point)[0]
    values = (total / STEPS * (end - start)).float().sum(1)
    return cell_sums(values, cells(tower))


@dataclass(frozen=True)
class Layout:
    """Tokens of a ViT: ``prefix`` of them come before those of the patches, which lie in a ``grid``."""

    prefix: int
    grid: tuple[int, int]

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.prefix + self.grid[0] * self.grid[1]


def _layout(trunk: Any) -> Layout | None:
    """None for what is no ViT, or one whose attention does not reach over all of the image."""
    grid = getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
    prefix = getattr(trunk, "num_prefix_tokens", None)
    if grid is None or prefix is None or not hasattr(trunk, "blocks"):
        return None
    return Layout(prefix, (int(grid[0]), int(grid[1])))


def _attention(tower: VisionTower, images: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Chefer, Gur and Wolf 2021 (arXiv:2103.15679), equations 5 and 6, for the pooled token.

    Of every block, ``mean over heads of relu(A * dS/dA)`` tells which tokens moved which; ``R <- R + that @ R`` follows
    it through the blocks, and the pooled token's row of R says where in the image its features come from.
    """
    layout = _layout(tower.trunk)
    assert layout is not None
    with RecordedAttention() as recorded:
        score = similarity(tower, images, direction)
    weights, count = recorded.weights, layout.tokens
    if not weights or any(w.shape[0] != len(images) or w.shape[-1] != count for w in weights):
        raise ClipscaleError(
            f"the attention of {type(tower.trunk).__name__} does not reach over all of the image, and cannot be "
            "followed; use --method integrated"
        )
    gradients = torch.autograd.grad(score.sum(), weights)
    found = torch.eye(count, device=images.device).expand(len(images), count, count)
    for weight, gradient in zip(weights, gradients, strict=True):
        moved = (weight * gradient).clamp(min=0).mean(1).float()
        if moved.shape[1] == count:
            found = found + moved @ found
        else:  # asked by the pooled token alone: the class token's, or a probe's that is none of the image's
            own = 0 if getattr(tower.trunk, "attn_pool", None) is not None else found[:, :1]
            found = own + moved @ found
    by_token = found.shape[1] == 1 or tower.trunk.global_pool == "token"
    pooled = found[:, 0] if by_token else found[:, layout.prefix :].mean(1)
    return pooled[:, layout.prefix :].unflatten(1, layout.grid)


def _grad_cam(tower: VisionTower, images: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Selvaraju et al. 2017 (arXiv:1610.02391), equations 1 and 2, on the last feature map."""
    features, channels = _feature_map(tower, tower.normalize(images))
    pooled = tower.proj(tower.trunk.forward_head(features))
    score = (F.normalize(pooled.float(), dim=-1) * direction).sum()
    (gradient,) = torch.autograd.grad(score, channels)
    return (gradient.mean((2, 3), keepdim=True) * channels).sum(1).clamp(min=0)


def _feature_map(tower: VisionTower, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the trunk pools, as it has it, and the same as Float[B, C, rows, columns], through which it is computed."""
    trunk = tower.trunk
    features = trunk.forward_features(images)
    width = getattr(trunk, "head_hidden_size", None) or trunk.num_features
    if features.ndim != 4:
        raise ClipscaleError(f"{type(trunk).__name__} has no feature map of rows and columns; use a ViT or a ResNet")
    if features.shape[1] == width or features.shape[3] != width:
        return features, features
    channels = features.permute(0, 3, 1, 2)
    return channels.permute(0, 2, 3, 1), channels


METHODS: dict[str, Callable[[VisionTower, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "integrated": _integrated,
    "attention": _attention,
    "gradcam": _grad_cam,
}
