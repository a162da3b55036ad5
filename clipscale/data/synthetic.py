"""Random tensors in place of samples: how fast training is when data cost nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, islice

import numpy as np
import torch
from numpy.typing import NDArray

from clipscale.data.loader import Batch, Skipped, ranges_of
from clipscale.data.order import SampleOrder, stretches
from clipscale.data.samples import caption_ids, content_digest, join_digests, pack
from clipscale.data.tokenizer import Tokenizer


class SyntheticLoader:
    """Batches as :class:`~clipscale.data.loader.TrainLoader` gives them, with one and the same random content.

    Captions fill the whole context, which is the most a text tower can have to do.
    """

    def __init__(
        self,
        order: SampleOrder,
        positions: NDArray[np.int64],
        *,
        rank: int,
        world: int,
        global_batch_size: int,
        image_size: int,
        tokenizer: Tokenizer,
        pin_memory: bool,
        image_ids: bool = False,
        skipped: Skipped = (),
    ) -> None:
        self._streams = np.array_split(np.arange(order.streams), world)[rank]
        self._walks = [
            _walk(int(position), ranges)
            for position, ranges in zip(positions[self._streams], ranges_of(self._streams, skipped), strict=True)
        ]
        self._per_stream = global_batch_size // order.streams
        count, random = len(self._streams) * self._per_stream, np.random.default_rng([order.seed, rank])
        words = random.integers(0, tokenizer.vocab_size, (count, tokenizer.context_length), dtype=np.int32)
        words[:, -1] = tokenizer.eot_id
        images = torch.from_numpy(random.integers(0, 256, (count, 3, image_size, image_size), dtype=np.uint8))
        seeds = torch.from_numpy(random.integers(-(2**63), 2**63 - 1, count))
        self._images, self._ids, self._lengths, self._caption_ids, self._seeds = (
            tensor.pin_memory() if pin_memory else tensor
            for tensor in (images, *pack(list(words)), caption_ids(list(words)), seeds)
        )
        self._image_ids: torch.Tensor | None = None
        if image_ids:
            numbers = join_digests([content_digest(image.numpy().tobytes()) for image in images])
            self._image_ids = numbers.pin_memory() if pin_memory else numbers

    def __iter__(self) -> Iterator[Batch]:
        while True:
            taken = [[*islice(walk, self._per_stream)] for walk in self._walks]
            keys = [
                f"synthetic/{stream}-{position}"
                for stream, positions in zip(self._streams, taken, strict=True)
                for position in positions
            ]
            yield Batch(
                self._images,
                self._ids,
                self._lengths,
                torch.tensor([positions[-1] + 1 for positions in taken], dtype=torch.int64),
                keys,
                self._caption_ids,
                self._seeds,
                image_ids=self._image_ids,
            )


def _walk(position: int, skipped: Sequence[tuple[int, int]]) -> Iterator[int]:
    for start, stop in stretches(position, skipped):
        yield from count(start) if stop is None else range(start, stop)
