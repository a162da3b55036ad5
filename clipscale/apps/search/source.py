"""Where the images lie that are embedded: any collection, read by place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from clipscale.config import Config
from clipscale.config.compose import override
from clipscale.data.collections import Collection, open_collection
from clipscale.data.samples import BadSample, Member, find_captions, find_image

KEYS = ("data.image_keys", "data.caption_key", "data.max_pixels", "storage.")


@dataclass(frozen=True)
class Source:
    """A collection, and how its samples are read: ``data.image_keys``, ``data.caption_key``, ``data.max_pixels``."""

    collection: Collection
    image_keys: tuple[str, ...]
    caption_key: str
    max_pixels: int

    def __len__(self) -> int:
        return len(self.collection)

    @property
    def identity(self) -> list[object]:
        """What vectors depend on: the files, and how they are read."""
        return [self.collection.identity, len(self), *self.image_keys, self.caption_key, self.max_pixels]

    def read(self, start: int, stop: int) -> Iterator[Member]:
        """Samples ``start <= i < stop``, in order."""
        return self.collection.read(start, stop)

    def image(self, sample: Member) -> bytes:
        """The bytes of a sample's image. Raises BadSample when it has none that can be used."""
        if sample.problem:
            raise BadSample(sample.problem)
        return find_image(sample, self.image_keys)

    def caption(self, sample: Member) -> str:
        """A sample's first caption, in one line. Raises BadSample when it has none."""
        return " ".join(find_captions(sample, self.caption_key)[0].splitlines()[0].split())


def open_source(where: str, overrides: Sequence[str]) -> Source:
    """Open what :func:`~clipscale.data.collections.open_collection` takes. Raises ClipscaleError, in one line, for what
    is not there, and for a key that is none of KEYS."""
    config = override(Config(), overrides, KEYS)
    data = config.data
    collection = open_collection(where, storage=config.storage)
    return Source(collection, tuple(data.image_keys), data.caption_key, data.max_pixels)
