"""The CLIP score of every sample: the cosine of its image and its caption, by a trained model."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rich.console
import rich.table
import torch
from numpy.typing import NDArray

from clipscale.apps.data.jobs import MARKERS, Jobs, share
from clipscale.apps.data.shards import all_samples, identity
from clipscale.apps.writing import whole_text
from clipscale.config.data import Data
from clipscale.config.model import Vision
from clipscale.data.manifest import ShardFile
from clipscale.data.samples import BadSample, Member, decode_image, eval_crop, find_captions, find_image

BATCH = 256
LEVELS = 2000  # into which [-1, 1] is cut to find percentiles: they are right to 0.001
PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)


class ScoreTask(NamedTuple):
    """One shard to be scored, and the file of its scores."""

    file: ShardFile
    path: Path
    checkpoint: Path
    data: Data


def score_shards(files: Sequence[ShardFile], output: Path, run: Path, data: Data, jobs: int, ray: bool) -> list[Path]:
    """Score all samples, write ``output/scores.csv`` and print percentiles; the files of each shard's scores.

    The scores stay in ``output``, so that the same command with a limit need not compute them again. Raises
    ClipscaleError when ``run`` is none.
    """
    from clipscale.checkpoint.own import find_checkpoint  # slow to import, and the filter may need no model

    checkpoint, _ = find_checkpoint(run)
    options = {
        "shards": identity(files), "model": checkpoint.resolve(), "caption_key": data.caption_key,
        "image_keys": data.image_keys, "max_pixels": data.max_pixels,
    }  # fmt: skip
    work = Jobs(output, "score", options, 1 if torch.cuda.is_available() else jobs, ray)
    place = output / MARKERS / "score" / "scores"
    tasks = {f"{i:06d}": ScoreTask(file, place / f"{i:06d}.csv", checkpoint, data) for i, file in enumerate(files)}
    work.run("score", score_shard, tasks)
    paths = [task.path for task in tasks.values()]
    if not share()[0]:
        _print(_join(paths, output / "scores.csv"), output)
    return paths


def score_shard(task: ScoreTask) -> dict[str, Any]:
    """Write the rows ``key, score, reason`` of one shard; a sample without a score has the reason why."""
    scored = 0
    with whole_text(task.path) as out:
        for key, score, reason in _scores(task):
            csv.writer(out, lineterminator="\n").writerow([key, score, reason])
            scored += not reason
    return {"scored": scored}


def read_scores(path: Path) -> list[tuple[str, str]]:
    """``(score, reason)`` of each sample of a shard, in its order."""
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as rows:
        return [(score, reason) for _, score, reason in csv.reader(rows)]


@cache
def _model(checkpoint: Path, device: str) -> Any:
    from clipscale.checkpoint.loading import load

    return load(checkpoint, device)


def _device() -> str:
    """One GPU for each process of a node that shares the work, or the CPU."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # a sum's last digits depend on how it was split; processes are what -j adds
        return "cpu"
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    return f"cuda:{local % torch.cuda.device_count()}"


def _scores(task: ScoreTask) -> Iterator[tuple[str, str, str]]:
    device = _device()
    model, _, tokenizer = _model(task.checkpoint, device)
    prepare = partial(_prepare, data=task.data, vision=model.config.vision)
    threads = len(os.sched_getaffinity(0)) if device != "cpu" else 1
    with ThreadPoolExecutor(threads) as pool, torch.inference_mode():
        incoming = all_samples(task.file)
        while samples := list(islice(incoming, BATCH)):
            prepared = list(pool.map(prepare, samples))
            good = [item for item in prepared if not isinstance(item, str)]
            values = iter(_cosines(model, tokenizer, good, device))
            for sample, item in zip(samples, prepared, strict=True):
                reason = item if isinstance(item, str) else ""
                yield sample.key, "" if reason else f"{next(values):.6f}", reason


def _prepare(sample: Member, data: Data, vision: Vision) -> tuple[torch.Tensor, list[str]] | str:
    """An image and its captions, or the reason why there is no such pair."""
    try:
        if sample.problem:
            raise BadSample(sample.problem)
        image = decode_image(find_image(sample, data.image_keys), data.max_pixels)
        return eval_crop(image, vision.image_size, vision.resize_mode), find_captions(sample, data.caption_key)
    except BadSample as error:
        return str(error)


def _cosines(model: Any, tokenizer: Any, pairs: Sequence[tuple[torch.Tensor, list[str]]], device: str) -> list[float]:
    """The score of each pair; of several captions, the mean, as each is drawn equally often in training."""
    if not pairs:
        return []
    owner = [i for i, (_, several) in enumerate(pairs) for _ in several]
    images = model.encode_image(torch.stack([image for image, _ in pairs]).to(device), normalize=True)
    captions = [caption for _, several in pairs for caption in several]
    texts = [
        model.encode_text(tokenizer(captions[at : at + BATCH]).to(device), normalize=True)
        for at in range(0, len(captions), BATCH)
    ]
    cosines = (images[owner] * torch.cat(texts)).sum(1).double().cpu().numpy()
    return (np.bincount(owner, cosines) / np.bincount(owner)).tolist()


def _join(paths: Sequence[Path], path: Path) -> NDArray[np.int64]:
    """Write ``scores.csv`` of all shards; how many scores lie at each level."""
    counts = np.zeros(LEVELS + 1, np.int64)
    with whole_text(path) as out:
        out.write("key,score,reason\n")
        for part in paths:
            out.write(part.read_text(encoding="utf-8", errors="surrogateescape"))
            values = np.array([float(score) for score, reason in read_scores(part) if not reason])
            levels = ((values + 1) / 2 * LEVELS).round().clip(0, LEVELS).astype(np.int64)
            counts += np.bincount(levels, minlength=LEVELS + 1)
    return counts


def _print(counts: NDArray[np.int64], output: Path) -> None:
    table = rich.table.Table("percentile", "CLIP score", "keeps", title=f"{counts.sum():,} samples")
    below = np.cumsum(counts) / max(counts.sum(), 1)
    for percent in PERCENTILES:
        level = int(np.searchsorted(below, percent / 100)) / LEVELS * 2 - 1
        table.add_row(f"{percent} %", f"{level:.3f}", f"{100 - percent} %")
    for column in table.columns:
        column.justify = "right"
    rich.console.Console().print(table)
    print(f"scores: {output / 'scores.csv'}")
