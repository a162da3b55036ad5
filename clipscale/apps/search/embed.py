"""``clipscale embed``: the vectors of all images of a folder or of shards, part by part, taken up again after a stop.

The list of samples is cut into parts that depend on nothing but its length, so the same files come out on one process
and on many, killed on the way or not.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rich.console
import rich.table
import torch
from numpy.typing import NDArray

from clipscale.apps.data.jobs import Jobs, Tasks, share
from clipscale.apps.search.approximate import Settings
from clipscale.apps.search.model import Towers, open_towers
from clipscale.apps.search.source import Source, open_source
from clipscale.apps.search.vectors import (
    IMAGES,
    PARTS,
    ROWS,
    SUMMARY,
    TEXTS,
    UNUSABLE,
    Made,
    Part,
    Row,
    Vectors,
    line,
    summary,
)
from clipscale.apps.writing import whole, whole_text
from clipscale.data.samples import BadSample, Member
from clipscale.errors import ConfigError

STEP, TOOL = "embed", "embed"
DTYPES = ("float16", "float32")
BATCH = 64
MOST_PARTS, SMALLEST, LARGEST = 64, 4 * BATCH, 256 * BATCH  # parts of a small source; rows of a part
PARQUET = "parquet"


@dataclass(frozen=True)
class Wanted:
    """What is to be embedded, and how: the model, the source and its ``KEY=VALUE``, the type of the numbers, whether
    captions are embedded as well, whether parts are written as Parquet too, and where the towers run."""

    model: str
    source: str
    overrides: tuple[str, ...] = ()
    dtype: str = "float16"
    texts: bool = False
    parquet: bool = False
    device: str = "auto"


class EmbedTask(NamedTuple):
    """One part: samples ``start <= i < stop`` of the source, into ``directory/NAME.*``."""

    start: int
    stop: int
    wanted: Wanted
    directory: Path
    name: str


def embed(wanted: Wanted, output: Path, jobs: int = 0) -> Vectors:
    """Embed a source into a directory; the same call goes on where it was stopped, whenever and however that was.

    Finished parts are kept if their bytes still have the checksums that were noted. Under torchrun or Slurm, the ranks
    share the work. Raises ClipscaleError for a model or a source that is not there, and for a directory that was begun
    with others.
    """
    if wanted.dtype not in DTYPES:
        raise ConfigError(f"--dtype {wanted.dtype}: choose from {', '.join(DTYPES)}")
    if wanted.parquet:
        _require_parquet()
    for kept in (_opened, _source):  # by an earlier call, since which they may have changed
        kept.cache_clear()
    towers, source = _opened(wanted.model, wanted.device), _source(wanted.source, wanted.overrides)
    options = {
        "model": towers.weights, "source": source.identity, "dtype": wanted.dtype, "captions": wanted.texts,
        "parquet": wanted.parquet,
    }  # fmt: skip
    work = Jobs(output, TOOL, options, 1 if towers.device.type == "cuda" else jobs)
    starts = range(0, len(source), part_rows(len(source)))
    names = [f"{number:06d}" for number in range(len(starts))]

    def task(number: int) -> EmbedTask:
        stop = min(starts[number] + starts.step, len(source))
        return EmbedTask(starts[number], stop, wanted, output / PARTS, names[number])

    work.recheck(STEP, names, partial(_is_whole, output / PARTS))
    with _threads_kept():
        results = work.run(STEP, embed_part, Tasks(names, task))
    return _sum_up(wanted, towers, output, results)


def part_rows(count: int) -> int:
    """Samples of a part, for a source of ``count``: whole batches, so that parts change no number."""
    return min(LARGEST, max(SMALLEST, -(-count // (MOST_PARTS * BATCH)) * BATCH))


def embed_part(task: EmbedTask) -> dict[str, Any]:
    """Write the files of a part. Gives ``rows``, ``files`` (size in bytes and SHA-256, by suffix) and ``unusable``
    (key and reason of each)."""
    towers, source = _opened(task.wanted.model, task.wanted.device), _source(task.wanted.source, task.wanted.overrides)
    rows: list[Row] = []
    images, texts = [], []
    unusable: list[tuple[str, str]] = []
    for some, crops in _batches(task, towers, source, unusable):
        vectors = towers.encode_images(crops)
        if task.wanted.texts:
            texts.append(towers.encode_texts([row.caption for row in some]))
        images.append(vectors)
        rows += some
    files = {IMAGES: _npy(images, towers.dim, task.wanted.dtype), ROWS: b"".join(map(line, rows))}
    if task.wanted.texts:
        files[TEXTS] = _npy(texts, towers.dim, task.wanted.dtype)
    if task.wanted.parquet:
        files[PARQUET] = _parquet(rows, files)
    noted = {suffix: _write(task.directory / f"{task.name}.{suffix}", data) for suffix, data in files.items()}
    return {"rows": len(rows), "files": noted, "unusable": unusable}


def _batches(
    task: EmbedTask, towers: Towers, source: Source, unusable: list[tuple[str, str]]
) -> Iterator[tuple[list[Row], torch.Tensor]]:
    """Rows with their images, UInt8[n, 3, S, S], batch by batch; what cannot be used goes to ``unusable``."""
    prepare = partial(_prepare, towers=towers, source=source, needs_caption=task.wanted.texts)
    incoming = enumerate(source.read(task.start, task.stop), task.start)
    threads = len(os.sched_getaffinity(0)) if towers.device.type == "cuda" else 1
    with ThreadPoolExecutor(threads) as pool:
        while some := list(islice(incoming, BATCH)):
            found = list(pool.map(prepare, some))
            unusable += [
                (sample.key, item) for (_, sample), item in zip(some, found, strict=True) if isinstance(item, str)
            ]
            good = [item for item in found if not isinstance(item, str)]
            if good:
                yield [row for row, _ in good], torch.stack([crop for _, crop in good])


def _prepare(
    numbered: tuple[int, Member], towers: Towers, source: Source, needs_caption: bool
) -> tuple[Row, torch.Tensor] | str:
    """A row and its image, or the reason why there is none."""
    place, sample = numbered
    try:
        crop = towers.crop(source.image(sample), source.max_pixels)
        try:
            caption = source.caption(sample)
        except BadSample:
            if needs_caption:
                raise
            caption = ""
        return Row(place, sample.key, source.collection.location(place), caption), crop
    except BadSample as error:
        return str(error)


def _npy(parts: Sequence[torch.Tensor], dim: int, dtype: str) -> bytes:
    vectors = torch.cat([torch.zeros(0, dim), *parts]).numpy()
    if not np.isfinite(vectors).all():
        raise ConfigError(
            "the model gives vectors with numbers that are none (NaN or infinite); was it trained to the end?"
        )
    out = io.BytesIO()
    np.save(out, vectors.astype(dtype))
    return out.getvalue()


def _parquet(rows: Sequence[Row], files: Mapping[str, bytes]) -> bytes:
    pa, parquet = _require_parquet()

    def column(data: bytes) -> Any:
        vectors: NDArray[Any] = np.load(io.BytesIO(data))
        return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])

    told = {
        name: [getattr(row, name).encode(errors="replace").decode() for row in rows]
        for name in ("key", "path", "caption")
    }
    columns = told | {"image": column(files[IMAGES])} | ({"text": column(files[TEXTS])} if TEXTS in files else {})
    out = io.BytesIO()
    parquet.write_table(pa.table(columns), out)
    return out.getvalue()


def _require_parquet() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("--parquet needs pyarrow: pip install 'clipscale[data]'") from None
    return pyarrow, pyarrow.parquet


def _write(path: Path, data: bytes) -> tuple[int, str]:
    with whole(path, durable=True) as out:
        out.write(data)
    return len(data), hashlib.sha256(data).hexdigest()


def _is_whole(directory: Path, name: str, result: Mapping[str, Any]) -> bool:
    """Whether the files of a part are as they were written."""
    for suffix, (size, digest) in result["files"].items():
        path = directory / f"{name}.{suffix}"
        if not path.is_file() or path.stat().st_size != size:
            return False
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                return False
    return True


def _sum_up(wanted: Wanted, towers: Towers, output: Path, results: Mapping[str, Any]) -> Vectors:
    """Write what holds for all parts, the same on every rank that comes here."""
    unusable = [(key, reason) for result in results.values() for key, reason in result["unusable"]]
    with whole_text(output / UNUSABLE) as out:
        csv.writer(out, lineterminator="\n").writerows([("key", "reason"), *unusable])
    made = Made(
        wanted.model, towers.weights, wanted.source, list(wanted.overrides), towers.dim, wanted.dtype, wanted.texts,
        dict(Counter(reason for _, reason in unusable).most_common()),
    )  # fmt: skip
    parts = [
        Part(name, result["rows"], {suffix: size for suffix, (size, _) in result["files"].items()})
        for name, result in results.items()
    ]
    with whole(output / SUMMARY, durable=True) as out:
        out.write(summary(made, parts))
    return Vectors(output)


def tell(vectors: Vectors, as_json: bool, index: Settings | None = None) -> None:
    """Print what was embedded, what could not be, and what index was built; one rank does."""
    if share()[0]:
        return
    made, size = vectors.made, sum(sum(part.sizes.values()) for part in vectors.parts)
    if as_json:
        told = {"images": len(vectors), "dim": made.dim, "dtype": made.dtype, "bytes": size, "unusable": made.unusable}
        told |= {"index": index._asdict() if index else None}
        print(json.dumps(told))
        return
    table = rich.table.Table("embedded", "images", title=str(vectors.directory))
    table.columns[1].justify = "right"
    table.add_row(f"{made.dim} dimensions, {made.dtype}, {size / 1e6:,.1f} MB", f"{len(vectors):,}")
    for reason, number in made.unusable.items():
        table.add_row(f"unusable: {reason}", f"{number:,}")
    if index:
        way = f"{index.kind}, effort {index.effort}: recall {index.recall:.3f} of the exact ten, of {index.queries}"
        table.add_row(way, f"{index.rows:,}")
    rich.console.Console().print(table)
    if made.unusable:
        print(f"which ones: {vectors.directory / UNUSABLE}")


@contextmanager
def _threads_kept() -> Iterator[None]:
    """A part that is embedded in this process leaves its number of threads as it was."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@cache
def _opened(model: str, device: str) -> Towers:
    towers = open_towers(model, device)
    if towers.device.type == "cpu":
        torch.set_num_threads(1)  # a sum's last digits depend on how it was split; processes are what -j adds
    return towers


@cache
def _source(where: str, overrides: tuple[str, ...]) -> Source:
    return open_source(where, list(overrides))
