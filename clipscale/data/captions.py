"""Captions as training takes them: cleaned if asked to, and of long ones a part."""

from __future__ import annotations

import re

from clipscale.data.order import KeyedRandom

_URL = re.compile(r"(https?://|www\.)\S+", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,200}>")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\ufeff]+")
_PERSON = re.compile(r"<person>", re.IGNORECASE)  # in place of names, in Conceptual 12M
_SENTENCE_END = re.compile(r"(?<=[.!?;。！？])\s*(?=\S)")


def clean_caption(caption: str) -> str:
    """A caption without web addresses, HTML tags and control characters; ``<PERSON>`` becomes a person."""
    for pattern, instead in ((_PERSON, "person"), (_URL, " "), (_TAG, " "), (_CONTROL, " ")):
        caption = pattern.sub(instead, caption)
    return " ".join(caption.split())


def from_random_sentence(caption: str, random: KeyedRandom) -> str:
    """A caption from the beginning of one of its sentences on."""
    sentences = [sentence for sentence in _SENTENCE_END.split(caption) if sentence.strip()]
    return " ".join(sentences[random.below(len(sentences)) :]) if sentences else caption
