"""Raw samples to what a batch holds of them: token ids, a cut image, and what the loss compares pairs by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from clipscale.config.data import LongCaption
from clipscale.data.augment import change_colors
from clipscale.data.captions import KEPT_TOKENS, clean_caption, from_random_sentence
from clipscale.data.embeddings import StoredTeacher
from clipscale.data.order import KeyedRandom, mix
from clipscale.data.samples import (
    BadSample,
    ImageOptions,
    Member,
    content_digest,
    decode_image,
    find_image,
    find_label,
    find_negatives,
    stored_texts,
    train_crop,
)
from clipscale.data.tokenizer import Tokenizer

# They end the keys of other draws than those of the sample itself, which are the same with and without them.
NEGATIVES, TOWERS = 1, 2


@dataclass(frozen=True)
class SampleOptions:
    """How a raw sample becomes tensors."""

    image_keys: tuple[str, ...]
    caption_key: str
    image: ImageOptions
    seed: int
    clean_captions: bool = False
    long_caption: LongCaption = LongCaption.head
    image_ids: bool = False
    """Whether batches carry ids of their images; a hash of each one's bytes is what they cost."""
    negatives_key: str | None = None
    """Where a sample's hard negatives stand; None takes none."""
    negatives_per_sample: int = 1
    teachers: tuple[StoredTeacher, ...] = ()
    """Whose embeddings every sample must have."""
    label_key: str | None = None
    """Where a sample's class index stands, which then takes the place of a caption: one token, the class."""
    classes: int = 0
    """How many classes there are, where there are labels."""


class _Drawn(NamedTuple):
    """A caption and its place among the sample's, of which there are as many as are stored, usable or not."""

    caption: str
    place: int
    stored: int


@dataclass(slots=True)
class Prepared:
    """A good sample's part in a batch, but for its image."""

    key: str
    ids: NDArray[np.int32]
    cut: bool
    drawn: _Drawn
    seed: int
    image_digest: bytes = b""
    negatives: list[NDArray[np.int32]] = field(default_factory=list)
    teachers: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = field(default_factory=list)


def _stage(values: Sequence[Any], work: Callable[[int, Any], Any]) -> list[Any]:
    """``work(i, value)`` of every value; one that raises BadSample becomes it, and one that is it stays."""

    def attempt(i: int, value: Any) -> Any:
        if isinstance(value, BadSample):
            return value
        try:
            return work(i, value)
        except BadSample as error:
            return error

    return [attempt(i, value) for i, value in enumerate(values)]


@dataclass(frozen=True)
class Preparer:
    """Prepares samples as the options say."""

    options: SampleOptions
    tokenizer: Tokenizer

    def __call__(
        self, raw: Sequence[tuple[int, int, Member]], images: torch.Tensor, empty: Sequence[Iterator[int]]
    ) -> list[Prepared | BadSample]:
        """Raw samples of ``(stream, position)`` to ids and to ``images``; a bad one becomes its reason.

        A good one's image takes the next of the rows in ``images`` that are empty for its stream.

        Each stage goes through all samples: one sample after the other takes half as long again, because the stages
        drive each other out of the processor's caches.
        """
        options, samples = self.options, [sample for _, _, sample in raw]
        randoms = [KeyedRandom(options.seed, stream, position) for stream, position, _ in raw]
        if options.label_key is not None:
            texts = _stage(samples, lambda i, _: self._label(*raw[i]))
        else:
            captions = _stage(samples, lambda i, sample: self._draw(sample, randoms[i]))
            texts = _stage(captions, lambda i, drawn: self._prepare(drawn, randoms[i], *raw[i]))
        if options.negatives_key is not None:
            texts = _stage(texts, lambda i, prepared: self._add_negatives(prepared, *raw[i]))
        if options.teachers:
            texts = _stage(texts, lambda i, prepared: self._add_teachers(prepared, samples[i]))

        def place(i: int, prepared: Prepared) -> Prepared:
            data = find_image(samples[i], options.image_keys)
            image = self._cut(data, randoms[i])
            images[next(empty[i])] = image  # now, while it is in the processor's caches
            if options.image_ids:
                prepared.image_digest = content_digest(data)
            return prepared

        return _stage(texts, place)

    def _label(self, stream: int, position: int, sample: Member) -> Prepared:
        if sample.problem:
            raise BadSample(sample.problem)
        assert self.options.label_key is not None
        label = find_label(sample, self.options.label_key)
        if not 0 <= label < self.options.classes:
            raise BadSample("label_outside_classes")
        seed = sample_seed(self.options.seed, stream, position)
        return Prepared(sample.key, np.array([label], np.int32), False, _Drawn("", 0, 1), seed)

    def _draw(self, sample: Member, random: KeyedRandom) -> _Drawn:
        if sample.problem:
            raise BadSample(sample.problem)
        stored = self._clean(stored_texts(sample, self.options.caption_key))
        places = [place for place, caption in enumerate(stored) if caption]
        if not places:
            raise BadSample("empty_caption")
        place = places[random.below(len(places))]
        return _Drawn(stored[place], place, len(stored))

    def _prepare(self, drawn: _Drawn, random: KeyedRandom, stream: int, position: int, sample: Member) -> Prepared:
        ids, cut = self._encode(drawn.caption, random)
        return Prepared(sample.key, ids, cut, drawn, sample_seed(self.options.seed, stream, position))

    def _add_negatives(self, prepared: Prepared, stream: int, position: int, sample: Member) -> Prepared:
        """As many as there should be and are, no two of the same tokens, none of the caption's."""
        options = self.options
        assert options.negatives_key is not None
        random = KeyedRandom(options.seed, stream, position, NEGATIVES)
        texts = [text for text in self._clean(find_negatives(sample, options.negatives_key)) if text]
        while texts and len(prepared.negatives) < options.negatives_per_sample:
            ids, _ = self._encode(texts.pop(random.below(len(texts))), random)
            if not any(np.array_equal(ids, other) for other in (prepared.ids, *prepared.negatives)):
                prepared.negatives.append(ids)
        return prepared

    def _add_teachers(self, prepared: Prepared, sample: Member) -> Prepared:
        prepared.teachers = [
            one.read(sample, prepared.drawn.place, prepared.drawn.stored) for one in self.options.teachers
        ]
        return prepared

    def _clean(self, texts: list[str]) -> list[str]:
        return [clean_caption(text) for text in texts] if self.options.clean_captions else texts

    def _encode(self, caption: str, random: KeyedRandom) -> tuple[NDArray[np.int32], bool]:
        ids, cut = self.tokenizer.encode(caption)
        part = self.options.long_caption
        if cut and part is LongCaption.random_sentence:
            ids, _ = self.tokenizer.encode(from_random_sentence(caption, random))
        elif cut and part in KEPT_TOKENS:
            ids, _ = self.tokenizer.encode(caption, partial(KEPT_TOKENS[part], random))
        return ids, cut

    def _cut(self, data: bytes, random: KeyedRandom) -> torch.Tensor:
        image = decode_image(data, self.options.image.max_pixels)
        return change_colors(train_crop(image, self.options.image, random), self.options.image.colors, random)


def sample_seed(seed: int, stream: int, position: int) -> int:
    """What the towers draw from for the sample at ``position`` of ``stream``: 64 bits, as a signed number."""
    return (mix(seed, stream, position, TOWERS) ^ 1 << 63) - (1 << 63)


def stack_teachers(samples: Sequence[Prepared]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each teacher, the embeddings of all images and of all captions, Float32[B, D_t]."""
    found = []
    for of_one in zip(*(sample.teachers for sample in samples), strict=True):
        images, texts = zip(*of_one, strict=True)
        found.append((torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(texts))))
    return found
