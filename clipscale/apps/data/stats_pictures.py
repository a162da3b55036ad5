"""Thumbnails and captions of the samples that a page shows."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image

from clipscale.apps.data.examine import examine, own_key, shown
from clipscale.apps.data.jobs import Jobs
from clipscale.config.data import Data
from clipscale.data.manifest import ShardFile
from clipscale.data.samples import BadSample, find_captions
from clipscale.data.stream import read_samples

SIDE = 192  # pixels of a thumbnail's longer side
CAPTIONS, CHARACTERS = 4, 240  # that are shown of a sample


@dataclass(frozen=True)
class Card:
    """A sample to look at: ``image`` is a data URI, empty when there is none; a bad one has a ``reason``."""

    key: str
    shard: str
    captions: list[str]
    more_captions: int = 0
    characters: int = 0
    width: int = 0
    height: int = 0
    image: str = ""
    reason: str = ""


@dataclass(frozen=True)
class _Task:
    file: ShardFile
    label: str
    places: list[int]
    data: Data


def cards(
    jobs: Jobs, drawn: Mapping[str, Sequence[tuple[int, int]]], files: Sequence[ShardFile], labels: Sequence[str],
    data: Data,
) -> dict[str, list[Card]]:  # fmt: skip
    """The cards of some samples, given by draw as ``(shard, place)``."""
    wanted: dict[int, set[int]] = {}
    for entries in drawn.values():
        for shard, place in entries:
            wanted.setdefault(shard, set()).add(place)
    tasks = {
        f"{shard:06d}": _Task(files[shard], labels[shard], sorted(places), data)
        for shard, places in sorted(wanted.items())
    }
    made = jobs.run("thumbnails", _make, tasks)
    return {
        name: [Card(**made[f"{shard:06d}"][str(place)]) for shard, place in entries] for name, entries in drawn.items()
    }


def _make(task: _Task) -> dict[str, Any]:
    """Cards by place."""
    return {
        str(place): asdict(_card(task, sample))
        for place in task.places
        for sample in read_samples(task.file, place, place + 1)
    }


def _card(task: _Task, sample: Any) -> Card:
    key = shown(own_key(sample), 200)
    try:
        captions = find_captions(sample, task.data.caption_key)
    except BadSample:
        captions = []
    texts = [shown(caption, CHARACTERS) for caption in captions[:CAPTIONS]]
    about = (key, task.label, texts, max(len(captions) - CAPTIONS, 0), max(map(len, captions), default=0))
    try:
        _, pixels = examine(sample, task.data)
    except BadSample as error:
        return Card(*about, reason=str(error))
    height, width = pixels.shape[-2:]
    return Card(*about, width, height, _thumbnail(Image.fromarray(pixels.permute(1, 2, 0).numpy())))


def _thumbnail(image: Image.Image) -> str:
    """A data URI; images that are small already keep their pixels."""
    buffer = io.BytesIO()
    if max(image.size) > SIDE:
        image.thumbnail((SIDE, SIDE))
        image.save(buffer, "JPEG", quality=82)
        kind = "jpeg"
    else:
        image.save(buffer, "PNG" if max(image.size) <= 32 else "JPEG", quality=88)
        kind = "png" if max(image.size) <= 32 else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
