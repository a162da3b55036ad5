"""A directory of vectors with the model that made them: texts and images in, rows out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from clipscale.apps.search.approximate import Approximate, has_index
from clipscale.apps.search.exact import nearest
from clipscale.apps.search.model import Towers, open_towers
from clipscale.apps.search.source import Source, open_source
from clipscale.apps.search.vectors import Row, Vectors
from clipscale.data.samples import BadSample, decode_image
from clipscale.errors import ConfigError, DataError

MASKS = 32  # filters whose rows are remembered


@dataclass(frozen=True)
class Filter:
    """Which rows may be found: scores of at least ``min_score``, captions with all of the ``words``, whatever their
    case, keys that begin with ``folder``."""

    min_score: float = -float("inf")
    words: str = ""
    folder: str = ""


class Hit(NamedTuple):
    """A row that was found, its number, and the cosine of query and image."""

    number: int
    score: float
    row: Row


class SearchIndex:
    """What ``clipscale search build`` and ``clipscale embed`` write, ready to be asked.

    Args:
        directory: where the vectors lie.
        model: where the model lies now, if not where it lay then.
        device: cpu or cuda, for the towers.

    Raises ClipscaleError where the vectors or the model are not there, or the model is not the one that made them.
    """

    def __init__(self, directory: Path, model: str | None = None, device: str = "cpu") -> None:
        self.vectors = Vectors(directory)
        if not len(self.vectors):
            raise DataError(f"{directory} holds no vectors: no image of its source could be used")
        self.approximate = Approximate(self.vectors) if has_index(directory) else None
        self._where, self._device = model or self.vectors.made.model, device
        self._towers: Towers | None = None
        self._source: Source | None = None
        self._mask = lru_cache(MASKS)(self._find_allowed)

    @property
    def towers(self) -> Towers:
        """The model, opened when it is first asked for. Raises ConfigError for one that did not make the vectors."""
        if self._towers is None:
            towers = open_towers(self._where, self._device)
            if towers.weights != self.vectors.made.weights:
                raise ConfigError(
                    f"{self._where} is not the model that made {self.vectors.directory} (weights {towers.weights}, not "
                    f"{self.vectors.made.weights}); name that one with --model, or build the index anew"
                )
            self._towers = towers
        return self._towers

    def search(self, query: torch.Tensor, k: int, only: Filter = Filter()) -> list[Hit]:
        """The k rows nearest to Float32[D], best first; exact where there is no index of faiss, or a filter."""
        allowed = self._mask(only.words.casefold(), only.folder) if only.words.strip() or only.folder else None
        if self.approximate is not None and allowed is None:
            ((scores, rows),) = self.approximate.nearest(query[None], k)
        else:
            ((scores, rows),) = nearest(self.vectors.chunks(), query[None], k, allowed)
        pairs = zip(scores.tolist(), rows.tolist(), strict=True)
        return [Hit(row, score, self.vectors.row(row)) for score, row in pairs if score >= only.min_score]

    def image(self, number: int) -> torch.Tensor:
        """The image of a row, UInt8[3, H, W], read from the source. Raises DataError where it is not there any more,
        IndexError for a number that is none."""
        row = self.vectors.row(number)
        if self._source is None:
            self._source = open_source(self.vectors.made.source, self.vectors.made.overrides)
        (sample,) = self._source.read(row.place, row.place + 1)
        if sample.key != row.key:
            raise DataError(f"{self.vectors.made.source} changed since it was indexed: {row.key} is {sample.key} now")
        try:
            return decode_image(self._source.image(sample), self._source.max_pixels)
        except BadSample as error:
            raise DataError(f"{row.key} cannot be read any more: {error}") from None

    def folders(self) -> list[str]:
        """What keys begin with, up to their first slash, sorted; folders or shards."""
        return sorted({row.key.partition("/")[0] for row in self.vectors.rows() if "/" in row.key})

    def _find_allowed(self, words: str, folder: str) -> NDArray[np.bool_]:
        wanted = words.split()

        def hold() -> Iterator[bool]:
            for row in self.vectors.rows():
                caption = row.caption.casefold()
                yield row.key.startswith(folder) and all(word in caption for word in wanted)

        return np.fromiter(hold(), bool, len(self.vectors))


def to_picture(image: torch.Tensor, side: int) -> Image.Image:
    """UInt8[3, H, W] as a picture whose longer side is at most ``side``."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture.thumbnail((side, side))
    return picture
