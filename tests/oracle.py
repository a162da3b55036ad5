"""The order and the batches as the design words them, in the plainest way: whole epochs as lists, one sample at a time.

It shares with the product the hash (``permutation``, ``KeyedRandom``, ``mix``), the decoder, the crop and the
tokenizer, and nothing of what puts samples into an order.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import groupby

import torch

from clipscale.data.order import KeyedRandom, mix, permutation
from clipscale.data.samples import ImageOptions, decode_image, train_crop
from clipscale.data.tokenizer import Tokenizer

ENOUGH = 100  # epochs without a usable sample
NEGATIVES = 2  # of a sample, in batches that hold any


@dataclass(frozen=True)
class Truth:
    """What is known of a sample that a test made: its key, and ``reason`` if it is bad, or image and captions."""

    key: str
    reason: str = ""
    jpg: bytes = b""
    captions: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()
    embeddings: tuple[list[float], ...] = ()
    """Of the image, then of each caption."""


class Starved(Exception):
    """A stream meets bad samples only, for ever."""


@dataclass
class Expected:
    """A batch as it must be."""

    keys: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    images: list[torch.Tensor] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    truncated: int = 0
    positions: list[int] = field(default_factory=list)
    caption_ids: list[int] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    image_ids: list[int] = field(default_factory=list)
    negative_ids: list[int] = field(default_factory=list)
    negative_lengths: list[int] = field(default_factory=list)
    teacher: list[tuple[list[float], list[float]]] = field(default_factory=list)


def digest(content: bytes) -> int:
    """What stands for equal contents in a batch."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


@dataclass
class Oracle:
    """All that a run on ``shards`` (lists of samples, with the source that each belongs to) must give."""

    shards: Sequence[Sequence[Truth]]
    sources: Sequence[int]
    weights: Sequence[float] | None
    seed: int
    streams: int
    window: int
    per_stream: int
    image: ImageOptions
    tokenizer: Tokenizer
    extras: bool = False
    """Whether batches hold what the loss may ask for beside pairs."""
    _streams: list[list[tuple[int, int, int]]] = field(default_factory=list)
    _epochs: int = 0
    _samples: int = 0
    _pixels: dict[bytes, torch.Tensor] = field(default_factory=dict)

    def line(self, epoch: int) -> list[tuple[int, int]]:
        """``(shard, sample)`` of an epoch, end to end, before anything is shuffled within a stream."""
        runs: list[list[tuple[int, int]]] = []
        for source in range(1 + max(self.sources)):
            weight = Fraction(1) if self.weights is None else Fraction(str(self.weights[source]))
            mine = [i for i, owner in enumerate(self.sources) if owner == source]
            size = sum(len(self.shards[i]) for i in mine)
            start, stop = int(epoch * weight * size), int((epoch + 1) * weight * size)
            first = start // size
            passes = [
                (number, shard, sample)
                for number in range(first, stop // size + 1)
                for shard in (mine[i] for i in permutation(len(mine), self.seed, source, number, 1))
                for sample in range(len(self.shards[shard]))
            ]
            taken = passes[start - first * size : stop - first * size]
            runs += [[place[1:] for place in run] for _, run in groupby(taken, key=lambda place: place[:2])]
        return [place for i in permutation(len(runs), self.seed, epoch) for place in runs[i]]

    def place(self, stream: int, position: int) -> tuple[int, int, int]:
        """``(epoch, shard, sample)`` at a position of a stream."""
        self._streams = self._streams or [[] for _ in range(self.streams)]
        while position >= len(self._streams[stream]):
            self._append_epoch()
        return self._streams[stream][position]

    def _append_epoch(self) -> None:
        line, before = self.line(self._epochs), self._samples
        self._samples += len(line)
        for v, places in enumerate(self._streams):
            # As if the samples of all epochs were dealt to the streams in turn, as far as their number goes.
            length = sum(n % self.streams == v for n in range(before, self._samples))
            segment, line = line[:length], line[length:]
            for number in range(-(-length // self.window)):
                held = segment[number * self.window : (number + 1) * self.window]
                places += [(self._epochs, *held[i]) for i in permutation(len(held), self.seed, self._epochs, v, number)]
        assert not line
        self._epochs += 1

    def batch(self, positions: Sequence[int]) -> Expected:
        """The batch that follows ``positions``."""
        batch = Expected()
        for v, position in enumerate(positions):
            good, fed = 0, position
            while good < self.per_stream:
                epoch, shard, sample = self.place(v, position)
                if min(epoch - self.place(v, fed)[0], position - fed) > ENOUGH:
                    raise Starved
                position += 1
                if self._add(batch, self.shards[shard][sample], (self.seed, v, position - 1)):
                    good, fed = good + 1, position
            batch.positions.append(position)
        return batch

    def _add(self, batch: Expected, sample: Truth, key: tuple[int, int, int]) -> bool:
        if sample.reason:
            batch.bad.append((sample.reason, sample.key))
            return False
        random = KeyedRandom(*key)
        place = random.below(len(sample.captions))
        ids, cut = self.tokenizer.encode(sample.captions[place])
        if sample.jpg not in self._pixels:
            self._pixels[sample.jpg] = decode_image(sample.jpg, self.image.max_pixels)
        batch.images.append(train_crop(self._pixels[sample.jpg], self.image, random))
        batch.keys.append(sample.key)
        batch.ids += ids.tolist()
        batch.lengths.append(len(ids))
        batch.truncated += cut
        batch.caption_ids.append(digest(struct.pack(f"<{len(ids)}i", *ids.tolist())))
        batch.seeds.append(mix(*key, 2))
        if self.extras:
            self._add_extras(batch, sample, ids.tolist(), KeyedRandom(*key, 1))
            batch.teacher.append((sample.embeddings[0], sample.embeddings[1 + place]))
        return True

    def _add_extras(self, batch: Expected, sample: Truth, caption: list[int], random: KeyedRandom) -> None:
        batch.image_ids.append(digest(sample.jpg))
        left, taken = list(sample.negatives), list[list[int]]()
        while left and len(taken) < NEGATIVES:
            ids = self.tokenizer.encode(left.pop(random.below(len(left))))[0].tolist()
            if ids != caption and ids not in taken:
                taken.append(ids)
        batch.negative_ids += [one for ids in taken for one in ids]
        batch.negative_lengths += [*(len(ids) for ids in taken), *[0] * (NEGATIVES - len(taken))]
