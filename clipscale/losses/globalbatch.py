"""Where this rank's pairs stand in the global batch, and how its texts get to all ranks and their gradients back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from clipscale.distributed.collectives import Group, gather, rank, total, world_size

# (image ids, text ids), each Int64[n] or None: pairs off the diagonal with an equal id are the same thing.
PairIds = tuple[torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class GlobalBatch:
    """``n`` images of this rank (rows) against the texts of all (columns).

    Every rank brings ``n`` texts and ``extra`` texts without an image, in this order, so column ``first + i`` is the
    text of row i, and columns that belong to no image are known by their place.
    """

    n: int
    extra: int
    group: Group

    @property
    def per_rank(self) -> int:
        """Columns that a rank brings."""
        return self.n + self.extra

    @property
    def world(self) -> int:
        """Ranks."""
        return world_size(self.group)

    @property
    def pairs(self) -> int:
        """N, the pairs of all ranks."""
        return self.world * self.n

    @property
    def columns(self) -> int:
        """M, the texts of all ranks."""
        return self.world * self.per_rank

    @property
    def first(self) -> int:
        """Column of this rank's first text."""
        return rank(self.group) * self.per_rank

    @property
    def own(self) -> slice:
        """Columns of this rank's pairs."""
        return slice(self.first, self.first + self.n)

    def paired(self, device: torch.device) -> torch.Tensor:
        """Bool[M], whether a column is the text of an image."""
        return torch.arange(self.columns, device=device) % self.per_rank < self.n

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        """Columns of all ranks, [M, ...], from those of this one; not differentiable."""
        with torch.no_grad():
            return gather(local, self.group)

    def scatter(self, gradient: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        """Sum [M, D] over ranks and keep this rank's columns; sent as ``dtype`` if one is given."""
        if self.world == 1:
            return gradient
        sent = gradient.to(dtype or gradient.dtype)
        mine = sent.new_empty(self.per_rank, gradient.shape[1])
        dist.reduce_scatter_tensor(mine, sent, group=self.group)
        return mine.to(gradient.dtype)

    def sum(self, vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Sum vectors over ranks, in one collective."""
        whole = total(torch.cat([vector.reshape(-1) for vector in vectors]), self.group)
        parts = whole.split([vector.numel() for vector in vectors])
        return [part.view_as(vector) for part, vector in zip(parts, vectors, strict=True)]


_agreed: set[tuple[int, ...]] = set()


def global_batch(
    image: torch.Tensor, text: torch.Tensor, extra: torch.Tensor | None, pair_ids: PairIds | None, group: Group
) -> GlobalBatch:
    """Raise ValueError unless the shapes fit, here and over all ranks, and all bring the same kinds of ids.

    On CUDA the ranks are compared once for every new shape, because reading the verdict waits for the device; a rank
    that comes alone with a new shape then waits in vain until the process group's time-out.
    """
    if image.ndim != 2 or image.shape != text.shape or not image.shape[0]:
        raise ValueError(f"image and text must both be Float[n, D], got {tuple(image.shape)} and {tuple(text.shape)}")
    if extra is not None and (extra.ndim != 2 or extra.shape[1] != text.shape[1]):
        raise ValueError(f"extra_text must be Float[k, {text.shape[1]}], got {tuple(extra.shape)}")
    for name, features in (("image", image), ("text", text), ("extra_text", extra)):
        if features is not None and not features.is_floating_point():
            raise ValueError(f"{name} must hold floating-point numbers, got {features.dtype}")
    if pair_ids is not None and len(pair_ids) != 2:
        raise ValueError(f"pair_ids must be (image_ids, text_ids), got {len(pair_ids)} of them")
    batch = GlobalBatch(len(image), 0 if extra is None else len(extra), group)
    kinds = [ids is not None for ids in pair_ids or (None, None)]
    mine = (batch.n, batch.extra, image.shape[1], *map(int, kinds))
    key = (batch.world, id(group), *mine)
    if batch.world > 1 and not (image.is_cuda and key in _agreed):
        sizes = torch.tensor([*mine, *(-size for size in mine)], device=image.device)
        dist.all_reduce(sizes, dist.ReduceOp.MAX, group=group)
        largest, smallest = sizes[: len(mine)].tolist(), [-size for size in sizes[len(mine) :].tolist()]
        if largest != smallest:
            raise ValueError(
                f"ranks bring batches of different sizes: between {smallest} and {largest} "
                f"[pairs, extra texts, dimensions, image ids, text ids]; this one brings {list(mine)}"
            )
        _agreed.add(key)
    return batch


class Hidden(NamedTuple):
    """Pairs off the diagonal that are no negatives: equal images or texts, and extra texts that are absent.

    ``rows`` and ``columns`` are lists of ids, Int64[n] and Int64[M]; ``absent`` is Bool[M] or None.
    """

    rows: list[torch.Tensor]
    columns: list[torch.Tensor]
    paired: torch.Tensor | None
    absent: torch.Tensor | None

    def mask(self, rows: slice, columns: slice) -> torch.Tensor | None:
        """Bool tile, True where a pair is hidden; None where none can be."""
        found: torch.Tensor | None = None
        for mine, everyone in zip(self.rows, self.columns, strict=True):
            same = mine[rows, None] == everyone[columns]
            found = same if found is None else found.logical_or_(same)
        if found is not None and self.paired is not None:
            found &= self.paired[columns]
        if self.absent is not None:
            absent = self.absent[columns].expand(rows.stop - rows.start, -1)
            found = absent if found is None else found.logical_or_(absent)
        return found


def hidden_pairs(batch: GlobalBatch, pair_ids: PairIds | None, extra: torch.Tensor | None) -> Hidden | None:
    """What equal ``pair_ids`` and absent extra texts (rows of zeros) hide; None if nothing. A collective."""
    rows, gathered = [], []
    for ids in pair_ids or ():
        if ids is None:
            continue
        if ids.shape != (batch.n,) or ids.dtype != torch.int64:
            raise ValueError(f"pair_ids must be Int64[{batch.n}], got {ids.dtype} {tuple(ids.shape)}")
        everyone = batch.gather(torch.cat([ids, ids.new_zeros(batch.extra)]))
        # Looking for duplicates first costs N log N, comparing all pairs n x N; on a GPU, reading the answer waits.
        if ids.is_cuda or _has_duplicates(everyone.view(batch.world, -1)[:, : batch.n]):
            rows.append(ids.contiguous())
            gathered.append(everyone)
    paired = absent = None
    if extra is not None:
        paired = batch.paired(extra.device)
        there = torch.cat([extra.new_ones(batch.n, dtype=torch.bool), (extra != 0).any(dim=1)])
        absent = ~batch.gather(there)
        if not extra.is_cuda and not bool(absent.any()):
            absent = None
    return Hidden(rows, gathered, paired, absent) if rows or absent is not None else None


def _has_duplicates(ids: torch.Tensor) -> bool:
    return len(ids.unique()) < ids.numel()


def duplicate_fraction(ids: torch.Tensor, group: Group = None) -> torch.Tensor:
    """Share of the global batch, Float[], whose id (Int64[n] on each rank) some other pair of it has too."""
    _, place, counts = gather(ids, group).unique(return_inverse=True, return_counts=True)
    return (counts[place] > 1).double().mean()
