"""Latency and memory of an exact search, beside faiss's flat indexes on the same vectors in the same run.

    python benchmarks/search.py --rows 1000000 --dim 512

Each side is a process of its own, with as many threads; they are asked in turn, so that what else the machine does
falls on all alike. Memory is what a process holds for itself (RssAnon) and what it has mapped of files (RssFile), which
the kernel may take back at any time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from numpy.typing import NDArray

from clipscale.apps.search.approximate import Approximate, build_index
from clipscale.apps.search.embed import part_rows
from clipscale.apps.search.exact import nearest
from clipscale.apps.search.vectors import IMAGES, PARTS, ROWS, SUMMARY, Made, Part, Row, Vectors, line, summary

K = 10
Answer = Callable[[NDArray[np.float32]], list[NDArray[np.int64]]]


def make_vectors(directory: Path, rows: int, dim: int, seed: int = 0) -> Vectors:
    """Random unit vectors of float16, as ``clipscale embed`` would leave them."""
    (directory / PARTS).mkdir(parents=True)
    step, parts = part_rows(rows), []
    for number, start in enumerate(range(0, rows, step)):
        count, name = min(step, rows - start), f"{number:06d}"
        vectors = np.random.default_rng((seed, number)).standard_normal((count, dim), np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        np.save(directory / PARTS / f"{name}.{IMAGES}", vectors.astype(np.float16))
        told = b"".join(
            line(Row(place, f"shard.tar/{place}", "shard.tar", "")) for place in range(start, start + count)
        )
        (directory / PARTS / f"{name}.{ROWS}").write_bytes(told)
        sizes = {suffix: (directory / PARTS / f"{name}.{suffix}").stat().st_size for suffix in (IMAGES, ROWS)}
        parts.append(Part(name, count, sizes))
    made = Made("random", "0", "random", [], dim, "float16", False, {})
    (directory / SUMMARY).write_bytes(summary(made, parts))
    return Vectors(directory)


def exact(directory: Path) -> Answer:
    """clipscale's exact search on mapped vectors."""
    vectors = Vectors(directory)
    return lambda queries: [rows for _, rows in nearest(vectors.chunks(), torch.from_numpy(queries), K)]


def approximate(directory: Path) -> Answer:
    """clipscale's IVF index."""
    index = Approximate(Vectors(directory))
    return lambda queries: [rows for _, rows in index.nearest(torch.from_numpy(queries), K)]


def faiss_flat(kind: str, directory: Path) -> Answer:
    """A flat index of faiss: ``Flat`` (fp32) or ``SQfp16``."""
    import faiss

    vectors = Vectors(directory)
    index = faiss.index_factory(vectors.made.dim, kind, faiss.METRIC_INNER_PRODUCT)
    for chunk in vectors.chunks():
        index.add(np.ascontiguousarray(chunk, dtype=np.float32))
    return lambda queries: list(index.search(queries, K)[1])


def faiss_fp32(directory: Path) -> Answer:
    """faiss's Flat."""
    return faiss_flat("Flat", directory)


def faiss_fp16(directory: Path) -> Answer:
    """faiss's SQfp16."""
    return faiss_flat("SQfp16", directory)


SIDES = {"clipscale exact": exact, "faiss Flat (fp32)": faiss_fp32, "faiss SQfp16": faiss_fp16}


def measure(
    directory: Path, sides: dict[str, Callable[[Path], Answer]], rounds: int, batch: int, threads: int
) -> list[dict[str, Any]]:
    """Median seconds for one query and for ``batch``, memory, and how many of the ten are those of the first side."""
    dim = Vectors(directory).made.dim
    queries = np.random.default_rng(1).standard_normal((rounds, batch, dim), np.float32)
    context = multiprocessing.get_context("spawn")
    pipes, found = {}, {name: {"side": name, "one": [], "batch": [], "same": []} for name in sides}
    for name, make in sides.items():
        pipes[name], theirs = context.Pipe()
        context.Process(target=_serve, args=(make, directory, threads, theirs), daemon=True).start()
        pipes[name].recv()
    for some in queries:
        truth = None
        for name, pipe in pipes.items():
            for count, key in ((1, "one"), (batch, "batch")):
                pipe.send(some[:count])
                rows, *seconds = pipe.recv()
                found[name][key].append(seconds)
            truth = truth or rows
            same = [len(np.intersect1d(a, b)) / K for a, b in zip(rows, truth, strict=True)]
            found[name]["same"].append(statistics.mean(same))
    for name, pipe in pipes.items():
        pipe.send(None)
        found[name] |= pipe.recv()
    return [_medians(row) for row in found.values()]


def _medians(row: dict[str, Any]) -> dict[str, Any]:
    told = {"same": statistics.mean(row["same"])}
    for key in ("one", "batch"):
        wall, cpu = zip(*row[key], strict=True)
        told |= {f"{key}_s": statistics.median(wall), f"{key}_cpu_s": statistics.median(cpu)}
    return {"side": row["side"], "own": row["own"], "mapped": row["mapped"]} | told


def _serve(make: Callable[[Path], Answer], directory: Path, threads: int, pipe: Connection) -> None:
    import faiss

    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    before = _resident()
    answer = make(directory)
    answer(np.zeros((1, Vectors(directory).made.dim), np.float32))  # what is mapped is read once
    pipe.send("ready")
    while (queries := pipe.recv()) is not None:
        began, cpu = time.perf_counter(), time.process_time()
        rows = answer(queries)
        pipe.send((rows, time.perf_counter() - began, time.process_time() - cpu))
    pipe.send({key: value - before[key] for key, value in _resident().items()})


def _resident() -> dict[str, int]:
    lines = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
    return {key: int(lines[name].split()[0]) * 1024 for key, name in (("own", "RssAnon"), ("mapped", "RssFile"))}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 1_000_000), ("dim", 512), ("rounds", 7), ("batch", 16), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ivf", action="store_true", help="build clipscale's IVF index too (minutes)")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    sides: dict[str, Callable[[Path], Answer]] = dict(SIDES)
    with tempfile.TemporaryDirectory() as scratch:
        vectors = make_vectors(Path(scratch) / "vectors", chosen.rows, chosen.dim)
        if chosen.ivf:
            settings = build_index(vectors, "ivf")
            sides[f"clipscale ivf (effort {settings.effort})"] = approximate
        rows = measure(vectors.directory, sides, chosen.rounds, chosen.batch, chosen.threads)
    if chosen.json:
        print(json.dumps(rows))
        return
    print(f"{chosen.rows:,} x {chosen.dim}, {chosen.threads} thread(s), medians of {chosen.rounds} rounds; best {K}")
    columns = f"{'one: ms':>9}{'CPU ms':>8}{'ratio':>7}{chosen.batch:>5}: ms{'CPU ms':>8}{'ratio':>7}{'same':>7}"
    print(f"{'':26}{'own MB':>8}{'mapped MB':>11}{columns}")
    for row in rows:
        ratios = [row[key] / rows[0][key] for key in ("one_cpu_s", "batch_cpu_s")]
        print(
            f"{row['side']:26}{row['own'] / 1e6:8,.0f}{row['mapped'] / 1e6:11,.0f}{row['one_s'] * 1e3:9.0f}"
            f"{row['one_cpu_s'] * 1e3:8.0f}{ratios[0]:7.2f}{row['batch_s'] * 1e3:9.0f}{row['batch_cpu_s'] * 1e3:8.0f}"
            f"{ratios[1]:7.2f}{row['same']:7.3f}"
        )


if __name__ == "__main__":
    main()
