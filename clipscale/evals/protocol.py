"""What an evaluator is, and how it gets features from a model spread over ranks.

Work is cut into batches of the whole set, independently of the number of ranks, and the batches are dealt to the
ranks in turn: every number is the same on one rank and on many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from clipscale.data.evalset import BadItem, EvalItem, EvalSet
from clipscale.data.samples import pack
from clipscale.data.tokenizer import Tokenizer
from clipscale.distributed.collectives import gather_rows, rank, whole, world_size
from clipscale.errors import DataError
from clipscale.evals.examples import Examples
from clipscale.models import CLIP


class Images(Protocol):
    """Samples with images, by place: an :class:`EvalSet`, or what stands for one."""

    @property
    def side(self) -> int:
        """Side S of the images."""
        ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> list[EvalItem | BadItem]:
        """Samples ``start <= i < stop``."""
        ...


@dataclass(frozen=True)
class EvalContext:
    """A model ready to be asked.

    ``autocast`` makes the context in which its towers compute; ``loss`` takes normalised features (image, text), on the
    device, of a batch that this rank holds whole. Evaluators leave what may be looked at in ``examples``. ``progress``
    is told, of images or captions under way, how many of how many are done.
    """

    model: CLIP
    tokenizer: Tokenizer
    device: torch.device
    batch_size: int
    autocast: Callable[[], AbstractContextManager[Any]]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    examples: Examples = field(default_factory=Examples)
    progress: Callable[[int, int], object] = lambda done, total: None

    @property
    def scale(self) -> float:
        """The multiplier on cosine similarities. A collective where the model is sharded."""
        return whole(self.model.logit_scale.detach()).exp().item()

    def encode_captions(self, captions: Sequence[str]) -> torch.Tensor:
        """Float[N, D] on the CPU, normalised, of N captions."""

        def encode(start: int, stop: int) -> tuple[torch.Tensor, None]:
            ids, lengths = pack([self.tokenizer.encode(caption)[0] for caption in captions[start:stop]])
            return self.model.encode_text(ids.to(self.device), lengths, normalize=True), None

        return self._deal(len(captions), encode)[0]

    def encode_images(
        self, images: Images, projected: bool = True
    ) -> tuple[torch.Tensor, list[EvalItem], list[BadItem]]:
        """Float[N, D] on the CPU, normalised, of the N usable images; the items (without pixels); the others.

        Not ``projected``: Float[N, width], what the tower projects, as it is. Raises DataError when no image is usable.
        """
        tower = self.model.visual

        def encode(start: int, stop: int) -> tuple[torch.Tensor, list[EvalItem | BadItem]]:
            read = images.read(start, stop)
            pixels = [item.image for item in read if isinstance(item, EvalItem)]
            # A forward pass of a sharded model is a collective: a batch without a usable image takes part too.
            stacked = torch.stack(pixels) if pixels else torch.zeros(1, 3, images.side, images.side).byte()
            stacked = stacked.to(self.device)
            features = self.model.encode_image(stacked, normalize=True) if projected else tower.pool(stacked).float()
            return features[: len(pixels)], [
                item.without_image() if isinstance(item, EvalItem) else item for item in read
            ]

        features, parts = self._deal(len(images), encode)
        items = [item for part in parts for item in part]
        good = [item for item in items if isinstance(item, EvalItem)]
        bad = [item for item in items if isinstance(item, BadItem)]
        if not good:
            raise DataError(f"none of {len(bad)} held-out samples can be used, the first for: {bad[0].reason}")
        return features, good, bad

    def _deal(
        self, count: int, encode: Callable[[int, int], tuple[torch.Tensor, Any]]
    ) -> tuple[torch.Tensor, list[Any]]:
        """Run ``encode(start, stop)`` on every batch, dealt to the ranks in turn, and put the results in order."""
        batches = -(-count // self.batch_size)
        mine: dict[int, tuple[torch.Tensor, Any]] = {}
        nothing = torch.zeros(0, self.model.config.embed_dim, device=self.device)
        for turn in range(-(-batches // world_size())):
            number = turn * world_size() + rank()
            # A rank that has no batch left repeats the last one, so that all ranks run equally many forward passes.
            start = min(number, batches - 1) * self.batch_size
            with torch.no_grad(), self.autocast():
                result = encode(start, min(start + self.batch_size, count))
            nothing = result[0][:0]
            if number < batches:
                mine[number] = result
            self.progress(min((turn + 1) * world_size() * self.batch_size, count), count)
        features = gather_rows(torch.cat([nothing, *(f for f, _ in mine.values())]))
        everyone: list[Any] = [[(i, len(f), extra) for i, (f, extra) in mine.items()]]
        if world_size() > 1:
            local, everyone = everyone[0], [None] * world_size()
            dist.all_gather_object(everyone, local)
        dealt = [entry for part in everyone for entry in part]
        rows = dict(zip([i for i, _, _ in dealt], features.split([n for _, n, _ in dealt]), strict=True))
        in_order = sorted(dealt, key=lambda entry: entry[0])
        return torch.cat([rows[i] for i, _, _ in in_order]).cpu(), [extra for _, _, extra in in_order]


class Evaluator(Protocol):
    """One kind of evaluation."""

    @property
    def data(self) -> EvalSet:
        """What it evaluates on."""
        ...

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of the numbers by which runs can be judged."""
        ...

    def run(self, context: EvalContext) -> dict[str, float]:
        """Named numbers, e.g. ``val/loss``; one with a meaningful chance level has a ``…_chance`` twin."""
        ...
