"""What samples are like, as small summaries that can be added up: captions, images, JSON fields, and a draw of them."""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

from PIL import Image

from clipscale.apps.data.examine import examine, own_key
from clipscale.apps.data.summaries import Draw, Spread, Top, hash64
from clipscale.config.data import Data
from clipscale.data.samples import BadSample, Member, find_image
from clipscale.data.tokenizer import Tokenizer

DRAWN = {"random": 48, "longest": 12, "shortest": 12, "smallest": 12, "largest": 12, "widest": 12, "bad": 4}
KEPT = {"words": 3000, "bigrams": 3000, "captions": 1000, "value": 1000}  # texts of a shard; 100 of anything else
FIELDS = 100  # of JSON that are described
CAPTION_CHARACTERS, VALUE_CHARACTERS, WORD_CHARACTERS = 200, 80, 40  # of what is kept
READ_CHARACTERS = 20_000  # of a caption, in which words and tokens are counted
UNCUT = 1 << 20  # tokens

_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_RUN = re.compile(r"\S{200}")


@dataclass
class Summary:
    """Of any number of samples: ``counts``, distributions, most frequent texts, and draws, each by name."""

    counts: dict[str, int] = field(default_factory=dict)
    spreads: dict[str, Spread] = field(default_factory=dict)
    tops: dict[str, Top] = field(default_factory=dict)
    draws: dict[str, Draw] = field(default_factory=dict)

    def count(self, name: str, number: int = 1) -> None:
        """Add to a count."""
        self.counts[name] = self.counts.get(name, 0) + number

    def spread(self, name: str) -> Spread:
        """A distribution, empty at first."""
        return self.spreads.setdefault(name, Spread())

    def top(self, name: str) -> Top:
        """Most frequent texts, none at first."""
        return self.tops.setdefault(name, Top(KEPT.get(name.partition(":")[0], 100)))

    def draw(self, name: str) -> Draw:
        """A draw, empty at first."""
        return self.draws.setdefault(name, Draw(DRAWN[name.partition(":")[0]]))

    def merge(self, other: Summary) -> None:
        """Take in the summary of other samples."""
        for name, number in other.counts.items():
            self.count(name, number)
        for name, spread in other.spreads.items():
            self.spread(name).merge(spread)
        for name, top in other.tops.items():
            self.top(name).merge(top)
        for name, draw in other.draws.items():
            self.draw(name).merge(draw)

    def to_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads."""
        parts: dict[str, Mapping[str, Any]] = {"spreads": self.spreads, "tops": self.tops, "draws": self.draws}
        found: dict[str, Any] = {"counts": self.counts}
        return found | {kind: {name: part.to_json() for name, part in named.items()} for kind, named in parts.items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Summary:
        """The inverse of :meth:`to_json`."""
        kinds: tuple[Any, ...] = (Spread, Top, Draw)
        parts = zip(kinds, ("spreads", "tops", "draws"), strict=True)
        return cls(
            dict(value["counts"]), *({n: kind.from_json(v) for n, v in value[name].items()} for kind, name in parts)
        )


@dataclass(frozen=True)
class Place:
    """Where a sample stands: numbers of its shard and in it, and a hash that orders samples at random."""

    shard: int
    number: int
    tie: int


def describe(
    summary: Summary, sample: Member, place: Place, data: Data, tokenizer: str, context_length: int
) -> list[str]:
    """Add one sample to a summary; returns its captions, none if it cannot be used."""
    summary.count("samples")
    summary.top("members").add(list(sample.members))
    _describe_json(summary, sample)
    try:
        captions, image = examine(sample, data)
    except BadSample as error:
        summary.top("reasons").add([str(error)])
        _consider(summary, f"bad:{error}", place.tie, place)
        return []
    summary.spread("captions_per_sample").add(len(captions))
    for caption in captions:
        _describe_caption(summary, caption, tokenizer, context_length)
    height, width = image.shape[-2:]
    _describe_image(summary, find_image(sample, data.image_keys), width, height)
    lengths = [len(caption) for caption in captions]
    ranks = {
        "random": place.tie, "longest": -max(lengths), "shortest": min(lengths), "smallest": width * height,
        "largest": -width * height, "widest": -max(width / height, height / width),
    }  # fmt: skip
    for name, rank in ranks.items():
        _consider(summary, name, rank, place)
    return captions


def tie(label: str, sample: Member) -> int:
    """A sample's place in the draw's order, wherever and whenever it is read."""
    return hash64(f"{label}\n{own_key(sample)}")


def _consider(summary: Summary, name: str, rank: float, place: Place) -> None:
    summary.draw(name).add(rank, place.tie, place.shard, place.number)


def _describe_caption(summary: Summary, caption: str, tokenizer: str, context_length: int) -> None:
    summary.spread("characters").add(len(caption))
    # Byte-pair encoding takes quadratic time for one endless word, so such a word is counted in pieces.
    read = _RUN.sub(r"\g<0> ", caption[:READ_CHARACTERS])
    tokens = len(uncut(tokenizer).encode(read)[0])
    summary.spread("tokens").add(tokens)
    summary.count("cut", int(tokens > context_length))
    words = [word[:WORD_CHARACTERS] for word in _WORD.findall(read.lower())]
    summary.spread("words").add(len(words))
    summary.top("words").add(set(words))  # counted once a caption, or one endless caption would decide
    summary.top("bigrams").add({f"{first} {second}" for first, second in pairwise(words)})
    summary.top("captions").add([caption[:CAPTION_CHARACTERS]])


@lru_cache(maxsize=1)
def uncut(name: str) -> Tokenizer:
    """The tokenizer without a context length in practice. Raises ConfigError for a name that is none."""
    return Tokenizer(name, UNCUT)


def _describe_image(summary: Summary, data: bytes, width: int, height: int) -> None:
    values = {"width": width, "height": height, "aspect_ratio": width / height, "megapixels": width * height / 1e6}
    for name, value in (values | {"bytes_per_image": len(data)}).items():
        summary.spread(name).add(value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # decoding has said what there is to say
            with Image.open(io.BytesIO(data)) as image:
                known = image.format or "unknown", image.mode
    except Exception:  # the faster decoder reads some that Pillow does not
        known = "unknown", "unknown"
    summary.top("formats").add([known[0]])
    summary.top("modes").add([known[1]])


def _describe_json(summary: Summary, sample: Member) -> None:
    if "json" not in sample.members:
        return
    try:
        fields = json.loads(sample.members["json"])
    except (ValueError, RecursionError):
        summary.count("unreadable_json")
        return
    if not isinstance(fields, dict):
        summary.count("unreadable_json")
        return
    for name, value in fields.items():
        _describe_field(summary, name[:VALUE_CHARACTERS], value)


def _describe_field(summary: Summary, name: str, value: Any) -> None:
    if f"type:{name}" not in summary.tops and sum(key.startswith("type:") for key in summary.tops) >= FIELDS:
        summary.count("values_of_further_fields")
        return
    kind = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")
    summary.top(f"type:{name}").add([kind])
    if kind == "number" and abs(value) < 1e300:  # neither infinite nor NaN
        summary.spread(f"number:{name}").add(value)
    elif kind == "list":
        summary.spread(f"length:{name}").add(len(value))
    if kind in ("number", "boolean", "string"):
        text = value if kind == "string" else json.dumps(value)
        summary.top(f"value:{name}").add([text[:VALUE_CHARACTERS]])
