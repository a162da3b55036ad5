"""Approximate neighbours by faiss, for more vectors than can be compared one by one in time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from clipscale.apps.search.exact import nearest
from clipscale.apps.search.vectors import IMAGES, TEXTS, Vectors
from clipscale.apps.writing import whole
from clipscale.errors import ConfigError, DataError

KINDS = ("ivf", "hnsw")
INDEX, SETTINGS = "faiss.index", "faiss.json"
TARGET = 0.95  # recall at 10 up to which the effort of a search is raised
QUERIES, AT = 200, 10  # that recall is measured with, and at
EFFORTS = tuple(1 << step for step in range(4, 12))  # lists or candidates that a search looks at


class Settings(NamedTuple):
    """What was built: ``ivf`` or ``hnsw``, over how many rows, the effort of a search, and the share of the exact ten
    nearest that it then finds, for queries of images or of texts."""

    kind: str
    rows: int
    effort: int
    recall: float
    queries: str


class Approximate:
    """An index of faiss on disk. Raises DataError where it is not of these vectors."""

    def __init__(self, vectors: Vectors) -> None:
        faiss = require_faiss()
        path = vectors.directory / INDEX
        try:
            self.settings = Settings(**json.loads((vectors.directory / SETTINGS).read_text()))
            # The lists of an IVF index stay on disk, mapped; a graph is read whole, and the flag does nothing.
            self._index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise DataError(
                f"{path} cannot be read ({str(error).splitlines()[0]}); clipscale search build mends it"
            ) from None
        if self.settings.rows != len(vectors) or self._index.ntotal != len(vectors):
            raise DataError(f"{path} is not of these vectors; clipscale search build mends it")
        _set_effort(self._index, self.settings.kind, self.settings.effort)

    def nearest(self, queries: torch.Tensor, k: int) -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """As :func:`~clipscale.apps.search.exact.nearest`, but for rows that it does not look at."""
        return _search(self._index, queries, k)


def has_index(directory: Path) -> bool:
    """Whether an index of faiss has been built."""
    return (directory / SETTINGS).is_file()


def remove(directory: Path) -> None:
    """Remove the index, if there is one: searches are exact again."""
    for name in (SETTINGS, INDEX):
        (directory / name).unlink(missing_ok=True)


def build_index(vectors: Vectors, kind: str) -> Settings:
    """Build an index in the vectors' directory, and measure its recall.

    The same each time on the same kind of machine, on however many threads, with faiss 1.15.1; in older ones a graph
    may depend on which thread came first. Raises ConfigError without faiss.
    """
    faiss = require_faiss()
    count, dim = len(vectors), vectors.made.dim
    # As faiss advises: some multiple of the root, and at least 39 vectors to find the centre of a list from.
    lists = 1 << int(math.log2(max(1.0, min(4 * math.sqrt(count), count / 39))))
    # Vectors are kept in half precision: half the memory, and an error below that of the towers.
    name = f"IVF{lists},SQfp16" if kind == "ivf" else "HNSW32,SQfp16"
    index = faiss.index_factory(dim, name, faiss.METRIC_INNER_PRODUCT)
    index.train(_spread(vectors, min(count, 64 * lists)))
    for chunk in vectors.chunks():
        index.add(np.ascontiguousarray(chunk, dtype=np.float32))
    remove(vectors.directory)
    with whole(vectors.directory / INDEX) as out:
        faiss.write_index(index, faiss.PyCallbackIOWriter(out.write))
    settings = _measure(index, kind, vectors, lists)
    with whole(vectors.directory / SETTINGS) as out:
        out.write(json.dumps(settings._asdict()).encode())
    return settings


def require_faiss() -> Any:
    """The library. Raises ConfigError where it is not installed."""
    try:
        import faiss
    except ImportError:
        raise ConfigError("an approximate index needs faiss: pip install 'clipscale[search]'") from None
    return faiss


def _measure(index: Any, kind: str, vectors: Vectors, lists: int) -> Settings:
    """Raise the effort until a sample of queries finds what an exact search finds."""
    of = TEXTS if vectors.has_texts else IMAGES
    queries = torch.from_numpy(_spread(vectors, min(len(vectors), QUERIES), of))
    exact = nearest(vectors.chunks(), queries, AT)
    recall = 0.0
    for effort in EFFORTS:
        _set_effort(index, kind, effort)
        found = _search(index, queries, AT)
        shared = sum(len(np.intersect1d(a, b)) for (_, a), (_, b) in zip(exact, found, strict=True))
        recall = shared / sum(len(rows) for _, rows in exact)
        if recall >= TARGET or (kind == "ivf" and effort >= lists):
            break
    return Settings(kind, len(vectors), effort, recall, "captions" if of == TEXTS else "images")


def _set_effort(index: Any, kind: str, effort: int) -> None:
    if kind == "ivf":
        index.nprobe = effort
    else:
        index.hnsw.efSearch = effort


def _search(index: Any, queries: torch.Tensor, k: int) -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    scores, rows = index.search(queries.numpy(), k)
    return [(some[at >= 0], at[at >= 0]) for some, at in zip(scores, rows, strict=True)]


def _spread(vectors: Vectors, count: int, kind: str = IMAGES) -> NDArray[np.float32]:
    """Vectors of ``count`` rows, evenly spread, Float32[count, D]."""
    wanted = np.linspace(0, len(vectors) - 1, count).astype(np.int64)
    parts, start = [], 0
    for chunk in vectors.chunks(kind):
        here = wanted[(wanted >= start) & (wanted < start + len(chunk))] - start
        parts.append(chunk[here].astype(np.float32))
        start += len(chunk)
    return np.concatenate(parts)
