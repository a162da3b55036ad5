"""Captions as training takes them: cleaned if asked to, and of long ones a part."""

from __future__ import annotations

import re

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
