"""Held-out samples by index, in the order of the shards, for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from clipscale.config.model import Vision
from clipscale.data.collections import Collection
from clipscale.data.samples import BadSample, Member, decode_image, eval_crop, find_image


@dataclass(frozen=True)
class EvalItem:
    """One held-out sample: image UInt8[3, S, S], the fields that were asked for, its key, its place in its set."""

    image: torch.Tensor
    fields: tuple[Any, ...]
    key: str
    place: int = 0

    def without_image(self) -> EvalItem:
        """The same item without its pixels, to be kept or sent."""
        return EvalItem(self.image.new_empty(3, 0, 0), self.fields, self.key, self.place)


class BadItem(NamedTuple):
    """A held-out sample that cannot be used, why, and its place in its set."""

    reason: str
    key: str
    place: int = 0


class EvalSet:
    """Samples ``0 <= i < len`` of a collection, made ready for a model.

    Args:
        samples: the collection.
        image_keys: members that may hold the image.
        vision: side S of the images, and how they are made square.
        max_pixels: larger images count as bad.
        fields: functions from the raw sample to what an evaluator wants of it; may raise BadSample.
    """

    def __init__(
        self,
        samples: Collection,
        image_keys: Sequence[str],
        vision: Vision,
        max_pixels: int,
        fields: Sequence[Any],
    ) -> None:
        self._samples, self._image_keys, self._vision = samples, image_keys, vision
        self._max_pixels, self._fields = max_pixels, fields

    @property
    def damaged(self) -> dict[str, str]:
        """What is wrong with an archive, by file name."""
        return self._samples.about.damaged

    @property
    def side(self) -> int:
        """Side S of the images."""
        return self._vision.image_size

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, start: int, stop: int) -> list[EvalItem | BadItem]:
        """Samples ``start <= i < stop``."""
        return [self._prepare(i, sample) for i, sample in enumerate(self._samples.read(start, stop), start)]

    def _prepare(self, place: int, sample: Member) -> EvalItem | BadItem:
        try:
            if sample.problem:
                raise BadSample(sample.problem)
            image = decode_image(find_image(sample, self._image_keys), self._max_pixels)
            fields = tuple(field(sample) for field in self._fields)
            square = eval_crop(image, self._vision.image_size, self._vision.resize_mode)
            return EvalItem(square, fields, sample.key, place)
        except BadSample as error:
            return BadItem(str(error), sample.key, place)


class Changed:
    """Some samples of a set, at ``places``, each changed after it is read."""

    def __init__(self, images: EvalSet, change: Callable[[EvalItem], EvalItem], places: Sequence[int] | None = None):
        self._images, self._change = images, change
        self._places = range(len(images)) if places is None else places

    @property
    def side(self) -> int:
        """Side S of the images."""
        return self._images.side

    def __len__(self) -> int:
        return len(self._places)

    def read(self, start: int, stop: int) -> list[EvalItem | BadItem]:
        """Samples ``start <= i < stop`` of the places."""
        if isinstance(self._places, range):
            found = self._images.read(start, stop)
        else:
            found = [item for place in self._places[start:stop] for item in self._images.read(place, place + 1)]
        return [self._change(item) if isinstance(item, EvalItem) else item for item in found]
