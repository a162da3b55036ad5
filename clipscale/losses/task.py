"""What a loss is to compute, but for the tensors that have gradients."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch

from clipscale.distributed.collectives import Gathering
from clipscale.losses.globalbatch import GlobalBatch, Hidden
from clipscale.losses.tiles import Similarity, TileShape


@dataclass(frozen=True)
class Task:
    """What is to be computed: everything but the tensors that have gradients.

    ``teachers`` are similarities whose softmax is the target, to the part ``weight``, and ``untaught`` Bool[M] the
    columns of which they know nothing; ``smoothing`` spreads so much of the rest evenly. ``gathering`` is that of the
    columns, if it has begun. ``tracked``: whether there will be a backward pass.
    """

    batch: GlobalBatch
    hidden: Hidden | None
    untaught: torch.Tensor | None = None
    teachers: tuple[Similarity, ...] = ()
    weight: float = 0.0
    smoothing: float = 0.0
    tile: TileShape = "auto"
    cache_bytes: float = 0
    comm_dtype: torch.dtype | None = None
    kernels: ModuleType | None = None
    gathering: Gathering | None = None
    tracked: bool = True

    @property
    def fused(self) -> ModuleType | None:
        """The kernels, where they suffice: they know the student's similarities only, and keep no exponentials."""
        return None if self.teachers or self.smoothing else self.kernels

    def __post_init__(self) -> None:
        """Raise ValueError for what has no meaning."""
        for name, share in (("weight", self.weight), ("label_smoothing", self.smoothing)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share} must lie between 0 and 1")
        if not self.cache_bytes >= 0:
            raise ValueError(f"cache_mb={self.cache_bytes / 2**20:g} must not be negative")

    def gather(self, columns: torch.Tensor) -> torch.Tensor:
        """Columns of all ranks, [M, D], from those of this one; not differentiable."""
        sent = columns.to(self.comm_dtype or columns.dtype)
        if self.gathering is None:
            return self.batch.gather(sent)
        everyone = self.gathering.wait()
        if (everyone.shape, everyone.dtype) != ((self.batch.columns, sent.shape[1]), sent.dtype):
            raise ValueError(
                f"gathering brings {everyone.dtype} {tuple(everyone.shape)}, the texts of all ranks are {sent.dtype} "
                f"{(self.batch.columns, sent.shape[1])}"
            )
        return everyone


def refuse_second_order() -> None:
    """Raise RuntimeError where autograd would derive what a backward pass computes, and find it constant."""
    if torch.is_grad_enabled():
        raise RuntimeError("the losses have no second derivative: leave out create_graph=True")
