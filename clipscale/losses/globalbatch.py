"""Where this rank's pairs stand in the global batch, and how its texts get to all ranks and their gradients back."""

from __future__ import annotations

import zlib
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


_agreed: set[tuple[str, str]] = set()


def agree(batch: GlobalBatch, brings: str, problem: str | None, device: torch.device) -> None:
    """Raise ValueError, on all ranks, if one has a ``problem`` or ``brings`` another kind of batch. A collective.

    On CUDA the ranks are compared once for every new kind, because reading the verdict waits for the device; a rank
    that comes alone with a new one then waits in vain until the process group's time-out.
    """
    if batch.world == 1:
        if problem:
            raise ValueError(problem)
        return
    key = (getattr(batch.group, "group_name", ""), brings)
    if device.type == "cuda" and problem is None and key in _agreed:
        return
    code = zlib.crc32(brings.encode())
    verdict = torch.tensor([problem is not None, code, -code], device=device)
    dist.all_reduce(verdict, dist.ReduceOp.MAX, group=batch.group)
    wrong, most, least = verdict.tolist()
    if wrong or most != -least:
        everyone = [(problem, brings)] * batch.world
        dist.all_gather_object(everyone, (problem, brings), group=batch.group)
        for number, (theirs, _) in enumerate(everyone):
            if theirs:
                raise ValueError(theirs if theirs == problem else f"rank {number}: {theirs}")
        number = next(i for i, (_, theirs) in enumerate(everyone) if theirs != everyone[0][1])
        raise ValueError(f"ranks bring different things: 0 {everyone[0][1]}, {number} {everyone[number][1]}")
    _agreed.add(key)


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
