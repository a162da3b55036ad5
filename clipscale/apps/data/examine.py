"""One sample as training would take it, and what tells people which one it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from clipscale.config.data import Data
from clipscale.data.manifest import ShardFile
from clipscale.data.samples import BadSample, Member, decode_image, find_captions, find_image

_JOINERS = "\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"  # parts of emoji and of words, though not printable


@dataclass(frozen=True)
class ShardTask:
    """A shard to be looked through; what is too large for a task's result goes to files in ``parts``."""

    number: int
    label: str
    file: ShardFile
    data: Data
    parts: Path

    def part(self, kind: str) -> Path:
        """Where this shard's part of a result lies."""
        return self.parts / f"{self.number:06d}.{kind}"


def examine(sample: Member, data: Data) -> tuple[list[str], torch.Tensor]:
    """All captions and the image UInt8[3, H, W]. Raises BadSample with the reason that training would count."""
    if sample.problem:
        raise BadSample(sample.problem)
    captions = find_captions(sample, data.caption_key)
    return captions, decode_image(find_image(sample, data.image_keys), data.max_pixels)


def own_key(sample: Member) -> str:
    """A sample's key without its shard's name."""
    return sample.key.partition("/")[2]


def address(file: ShardFile) -> str:
    """Where a shard lies, without the signature of a URL."""
    return file.location.partition("?")[0] if file.location.startswith("http") else file.location


def labels(files: Sequence[ShardFile]) -> list[str]:
    """What to call shards: their names, or their locations where two have one name; no signature of a URL."""
    locations = [address(file) for file in files]
    names = [location.rpartition("/")[2] for location in locations]
    counts = Counter(location.rpartition("/")[2] for location in {*locations})  # a table comes in parts, of one file
    return [name if counts[name] == 1 else location for name, location in zip(names, locations, strict=True)]


def shown(text: str, length: int) -> str:
    """Text of anybody's for one line: no line breaks, no control characters, nothing that cannot be encoded."""
    line = " ".join(text[: 4 * length].split())
    line = "".join(c if c.isprintable() or c in _JOINERS else "\N{REPLACEMENT CHARACTER}" for c in line)
    return line if len(line) <= length else f"{line[: length - 1]}…"
