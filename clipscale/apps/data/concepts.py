"""Concepts in captions: whole words in a row, whatever their case; as quick for half a million as for ten."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from clipscale.errors import ConfigError

WORD = re.compile(r"\w+")


class Concepts:
    """A set of concepts to be looked for.

    Args:
        lines: the concepts; of those that are the same in words (``T-shirt``, ``t shirt``), the first one stands.
    """

    def __init__(self, lines: Sequence[str]) -> None:
        self.names: dict[str, str] = {}  # as written, by the words joined
        for line in lines:
            words = _words(line)
            if words:
                self.names.setdefault(" ".join(words), line)
        self._lengths = sorted({name.count(" ") + 1 for name in self.names})

    def find(self, caption: str) -> set[str]:
        """The concepts in a caption, as they were written."""
        words = _words(caption)
        grams = (
            " ".join(words[start : start + length])
            for length in self._lengths
            for start in range(len(words) - length + 1)
        )
        return {self.names[gram] for gram in grams if gram in self.names}


@cache
def read_concepts(path: Path) -> Concepts:
    """The concepts of a file, one a line. Raises ConfigError when it cannot be read or holds none."""
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    concepts = Concepts([line.strip() for line in lines])
    if not concepts.names:
        raise ConfigError(f"{path} holds no concept: a word or more in each line")
    return concepts


def _words(text: str) -> list[str]:
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())
