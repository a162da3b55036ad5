"""Small shards for tests, with damage where it is wanted."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clipscale.config.data import Storage
from clipscale.data.io import ShardStore
from clipscale.data.manifest import ShardFile

STORE = ShardStore(Storage())
WORDS = ("red", "green", "blue", "large", "small", "round", "square", "tall", "dark", "bright")


def jpeg(number: int, size: int = 16) -> bytes:
    """A picture that depends on a number."""
    rng = np.random.default_rng(number)
    pixels = np.kron(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8), np.ones((size // 4, size // 4, 1), np.uint8))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def sample(number: int) -> dict[str, bytes]:
    """Members of a good sample."""
    words = [WORDS[int(digit)] for digit in f"{number:03d}"]
    fields = {
        "captions": [f"a {' '.join(words)} thing", f"{' '.join(words)}"],
        "label": number % 7,
        "name": str(number),
    }
    return {
        "jpg": jpeg(number),
        "txt": f"a {' '.join(words)} thing".encode(),
        "json": json.dumps(fields).encode(),
    }


def write_shard(path: Path, samples: Sequence[tuple[str, Mapping[str, bytes]]]) -> Path:
    """Write ``(key, members)`` pairs as a tar."""
    with tarfile.open(path, "w") as archive:
        for key, members in samples:
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def write_shards(
    directory: Path, counts: Sequence[int], bad: Mapping[int, Mapping[str, bytes]] | None = None
) -> list[Path]:
    """Shards ``00000.tar …`` of ``counts`` samples, numbered on; ``bad`` replaces the members of some."""
    directory.mkdir(parents=True, exist_ok=True)
    paths, number = [], 0
    for i, count in enumerate(counts):
        numbers = range(number, number + count)
        content = [(f"{n:06d}", (bad or {}).get(n, sample(n))) for n in numbers]
        paths.append(write_shard(directory / f"{i:05d}.tar", content))
        number += count
    return paths


def shard_files(paths: Sequence[Path]) -> list[ShardFile]:
    """What the loader takes, one source."""
    return [ShardFile(STORE, str(path)) for path in paths]
