"""Captions as training takes them: cleaned if asked to, and of long ones a part."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from clipscale.config.data import LongCaption
from clipscale.data.order import KeyedRandom

_URL = re.compile(r"(https?://|www\.)\S+", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,200}>")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\ufeff]+")  # no joiners: they are letters
_PERSON = re.compile(r"<person>", re.IGNORECASE)  # in place of names, in Conceptual 12M
_SENTENCE_START = re.compile(r"(?<=[.!?;])\s+(?=\S)|(?<=[。！？])(?=\S)")


def clean_caption(caption: str) -> str:
    """A caption without web addresses, HTML tags and control characters; ``<PERSON>`` becomes a person."""
    for pattern, instead in ((_PERSON, "person"), (_URL, " "), (_TAG, " "), (_CONTROL, " ")):
        caption = pattern.sub(instead, caption)
    return " ".join(caption.split())


def from_random_sentence(caption: str, random: KeyedRandom) -> str:
    """A caption from the beginning of one of its sentences on."""
    starts = [0, *(match.end() for match in _SENTENCE_START.finditer(caption))]
    return caption[starts[random.below(len(starts))] :]


def _block(random: KeyedRandom, count: int, room: int) -> Sequence[int]:
    start = random.below(count - room + 1)
    return range(start, start + room)


def _any(random: KeyedRandom, count: int, room: int) -> Sequence[int]:
    kept: list[int] = []
    for place in range(count):  # each set of `room` places is as likely as any other
        if random.below(count - place) < room - len(kept):
            kept.append(place)
    return kept


# Which tokens stay of a caption that has ``count``, where there is room for fewer (CLIPA, Li et al. 2023, section 3).
KEPT_TOKENS: dict[LongCaption, Callable[[KeyedRandom, int, int], Sequence[int]]] = {
    LongCaption.block: _block,
    LongCaption.random: _any,
}
