"""Whether an explanation is true: what becomes of the score as the image goes, or comes, cell by cell.

Petsiuk, Das and Saenko 2018 (arXiv:1806.07421), section 4.2. All rankings move the same cells, so that none has the
advantage of finer ones; what is faithful makes the score fall fast (deletion) and rise fast (insertion).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import gaussian_blur

from clipscale.evals.relevance import cell_of, cell_sums, mean_colour, similarity
from clipscale.models.vision import VisionTower

MOST_STEPS = 32  # points of a curve; with fewer cells, each is one
_SOBEL = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])


@dataclass(frozen=True)
class Curves:
    """Scores Float[N, K + 1] of N images as K steps take cells away, or bring them; the first is of none."""

    deletion: torch.Tensor
    insertion: torch.Tensor


def blurred(images: torch.Tensor) -> torch.Tensor:
    """Images of which only the rough distribution of colours is left: UInt8[B, 3, S, S]."""
    side = images.shape[-1]
    return gaussian_blur(images, [side // 4 * 2 - 1] * 2, [side / 8] * 2)


FILLS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"blur": blurred, "mean": mean_colour}


def edges(images: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Float[B, rows, columns], the mean strength of edges (Sobel's, of the grey image) in each cell: what a map shows
    that knows nothing of the model or the caption."""
    grey = F.pad(images.float().mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    kernels = torch.stack([_SOBEL, _SOBEL.T])[:, None].to(grey.device)
    strength = F.conv2d(grey, kernels).norm(dim=1)
    return cell_sums(strength, grid) / cell_sums(torch.ones_like(strength), grid)


def chance(count: int, grid: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Float[B, rows, columns] of random numbers."""
    return torch.rand(count, *grid, generator=generator)


@torch.no_grad()
def curves(
    tower: VisionTower, images: torch.Tensor, direction: torch.Tensor, heat: torch.Tensor, fill: str = "blur"
) -> Curves:
    """Of images UInt8[B, 3, S, S] and what they are held against, Float[B, D] (see
    :func:`clipscale.evals.relevance.similarity`), in the order of ``heat`` Float[B, rows, columns], largest first.

    ``fill`` is what stands where cells are gone: ``blur`` or ``mean``, the image's mean colour.
    """
    instead = FILLS[fill](images)
    grid, cells = heat.shape[1:], heat[0].numel()
    rows, columns = (cell_of(size, count) for size, count in zip(images.shape[2:], grid, strict=True))
    ranks = heat.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1).to(images.device)
    deletion, insertion = [], []
    for moved in torch.linspace(0, cells, min(cells, MOST_STEPS) + 1).round().tolist():
        first = (ranks < moved).unflatten(1, grid)[:, None, rows[:, None], columns]
        deletion.append(similarity(tower, torch.where(first, instead, images), direction).cpu())
        insertion.append(similarity(tower, torch.where(first, images, instead), direction).cpu())
    return Curves(torch.stack(deletion, 1), torch.stack(insertion, 1))


def area(curve: torch.Tensor) -> torch.Tensor:
    """Float[N], the mean height of curves Float[N, K + 1] over the share of cells moved, by trapezoids."""
    return ((curve[:, 1:] + curve[:, :-1]) / 2).mean(1)
