"""Held-out samples by index, in the order of the shards, for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch

from clipscale.config.model import Vision
from clipscale.data.manifest import ShardFile, damages, summarise
from clipscale.data.samples import BadSample, Member, decode_image, eval_crop, find_image
from clipscale.data.stream import read_samples


@dataclass(frozen=True)
class EvalItem:
    """One held-out sample: image UInt8[3, S, S], the fields that were asked for, its key."""

    image: torch.Tensor
    fields: tuple[Any, ...]
    key: str

    def without_image(self) -> EvalItem:
        """The same item without its pixels, to be kept or sent."""
        return EvalItem(self.image.new_empty(3, 0, 0), self.fields, self.key)


class BadItem(NamedTuple):
    """A held-out sample that cannot be used, and why."""

    reason: str
    key: str


class EvalSet:
    """Samples ``0 <= i < len`` of some shards.

    Args:
        files: the shards.
        image_keys: members that may hold the image.
        vision: side S of the images, and how they are made square.
        max_pixels: larger images count as bad.
        fields: functions from the raw sample to what an evaluator wants of it; may raise BadSample.
    """

    def __init__(
        self,
        files: Sequence[ShardFile],
        image_keys: Sequence[str],
        vision: Vision,
        max_pixels: int,
        fields: Sequence[Any],
    ) -> None:
        self._files, self._image_keys, self._vision = files, image_keys, vision
        self._max_pixels, self._fields = max_pixels, fields
        summaries = summarise(files)
        self._ends = np.cumsum([summary.samples for summary in summaries])
        self.damaged = damages(files, summaries)  # what is wrong with an archive, by file name

    @property
    def side(self) -> int:
        """Side S of the images."""
        return self._vision.image_size

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, start: int, stop: int) -> list[EvalItem | BadItem]:
        """Samples ``start <= i < stop``."""
        return [self._prepare(sample) for sample in self._raw(start, min(stop, len(self)))]

    def _raw(self, start: int, stop: int) -> chain[Member]:
        begins = np.concatenate([[0], self._ends[:-1]])
        return chain.from_iterable(
            read_samples(file, max(start - begin, 0), min(stop, end) - begin)
            for file, begin, end in zip(self._files, begins.tolist(), self._ends.tolist(), strict=True)
            if begin < stop and end > start
        )

    def _prepare(self, sample: Member) -> EvalItem | BadItem:
        try:
            if sample.problem:
                raise BadSample(sample.problem)
            image = decode_image(find_image(sample, self._image_keys), self._max_pixels)
            fields = tuple(field(sample) for field in self._fields)
            return EvalItem(eval_crop(image, self._vision.image_size, self._vision.resize_mode), fields, sample.key)
        except BadSample as error:
            return BadItem(str(error), sample.key)
