"""Shards for ``loader.py``: JPEGs of a given size in pixels and in bytes, with captions and JSON.

The pictures are photos enlarged, or seeded fields of colour where there are none. Enlarging leaves them smooth, and how
long a JPEG takes to decode goes by its bytes; so grain is added until a file has as many bytes as photos of that size
have.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

QUALITY = 90
PROBES = 32  # pictures from which the amount of grain is found
GRAIN_SIDE = 1024


class ImageSet(NamedTuple):
    """Samples of one image size: width and height in pixels, mean bytes of a file."""

    name: str
    width: int
    height: int
    file_bytes: int
    samples: int
    shards: int

    @property
    def pattern(self) -> str:
        """The shards' names."""
        return f"{self.name}-{{{0:06d}..{self.shards - 1:06d}}}.tar"


class Picture(NamedTuple):
    """A picture of any size, its caption, and what its JSON holds."""

    image: Image.Image
    caption: str
    fields: dict[str, object]


def make_shards(directory: Path, photos: Path | None, sizes: ImageSet) -> None:
    """Write a set's shards into ``directory``, unless they are there."""
    done = directory / f"{sizes.name}.json"
    if done.exists() and json.loads(done.read_text()) == [*sizes]:
        return
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    grain = rng.standard_normal((GRAIN_SIDE, GRAIN_SIDE), dtype=np.float32)
    strength = _strength(list(islice(pictures(photos), PROBES)), grain, sizes)
    endless = pictures(photos)
    for shard, count in enumerate(np.diff(np.linspace(0, sizes.samples, sizes.shards + 1).astype(int))):
        with tarfile.open(directory / f"{sizes.name}-{shard:06d}.tar", "w") as archive:
            for number, picture in enumerate(islice(endless, int(count))):
                members = {
                    "jpg": _encode(picture.image, grain, strength, sizes, rng),
                    "txt": picture.caption.encode(),
                    "json": json.dumps(picture.fields).encode(),
                }
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{shard:06d}_{number:04d}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    done.write_text(json.dumps([*sizes]))


def pictures(photos: Path | None) -> Iterator[Picture]:
    """Photos of the shards in a directory, or drawn ones, for ever."""
    if photos is None:
        for seed in cycle(range(4096)):
            rng = np.random.default_rng(seed)
            colours = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            caption = f"a picture of {rng.integers(2, 99)} fields of colour, number {seed}"
            yield Picture(Image.fromarray(colours), caption, {"captions": [caption], "label": seed % 10})
    for path in cycle(sorted(photos.glob("photos-train-*.tar")) if photos else []):
        with tarfile.open(path) as archive:
            parts: dict[str, bytes] = {}
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None
                parts[member.name.rpartition(".")[2]] = file.read()
                if len(parts) == 3:
                    image = Image.open(io.BytesIO(parts["jpg"])).convert("RGB")
                    yield Picture(image, parts["txt"].decode(), json.loads(parts["json"]))
                    parts = {}


def _strength(probes: Sequence[Picture], grain: NDArray[np.float32], sizes: ImageSet) -> float:
    """The grain's standard deviation, in grey levels, with which files have the wanted bytes on average."""
    low, high = 0.0, 64.0
    for _ in range(12):
        middle = (low + high) / 2
        rng = np.random.default_rng(1)
        mean = np.mean([len(_encode(probe.image, grain, middle, sizes, rng)) for probe in probes])
        low, high = (middle, high) if mean < sizes.file_bytes else (low, middle)
    return high


def _encode(
    image: Image.Image, grain: NDArray[np.float32], strength: float, sizes: ImageSet, rng: np.random.Generator
) -> bytes:
    width, height = sizes.width, sizes.height
    pixels = np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    top, left = rng.integers(GRAIN_SIDE - height), rng.integers(GRAIN_SIDE - width)
    pixels = pixels + strength * grain[top : top + height, left : left + width, None]
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
