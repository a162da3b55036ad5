"""One measurement of one loader in a process of its own; ``loader.py`` starts it, with either one's interpreter.

    python benchmarks/loader_side.py '{"side": "clipscale", "measure": "rate", …}'

prints a line of JSON; of a rate, one when it is ready and one more for every line that it is sent. Nothing here imports
both loaders: they need different versions of webdataset.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

IMAGE_SIZE, CONTEXT = 224, 77
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass
class Job:
    """What to measure, on which shards, how.

    ``samples`` of the set; ``cpus`` to run on; ``floats`` turns clipscale's batches into what open_clip's are (images
    as normalised floats, padded ids); ``skip`` batches lie before the first one; a rate is of ``turn`` batches.
    """

    side: str
    measure: str
    root: str
    pattern: str
    samples: int
    workers: int = 0
    cpus: list[int] = field(default_factory=list)
    batch: int = 256
    turn: int = 4
    epochs: int = 50
    floats: bool = False
    skip: int = 0
    window: int | None = None


class Side(Protocol):
    """A loader, its libraries imported and its tokenizer built."""

    def batches(self) -> Iterator[int]:
        """Build the loader and make batches for ever; yields the pairs in each."""


class Clipscale:
    """The training loader, as ``clipscale train`` builds it."""

    def __init__(self, job: Job) -> None:
        import numpy as np
        import torch

        from clipscale.config import compose
        from clipscale.config.rundir import open_run
        from clipscale.data.tokenizer import build_tokenizer
        from clipscale.distributed.runtime import start
        from clipscale.trainer import build

        torch.set_num_threads(1)
        self.job, self._build, self._positions, self.again = job, build, np.full, 0
        window = "null" if job.window is None else job.window
        with tempfile.TemporaryDirectory() as runs:
            overrides = [
                "experiment=demo", "model=vit_b_32", "data=shards", f"data.root={job.root}",
                f"data.train.shards={json.dumps(job.pattern)}", f"data.workers={job.workers}", f"data.window={window}",
                f"global_batch_size={job.batch}", "total_samples=1000000", "data.val.shards=null",
                "data.zeroshot.shards=null", f"runs_dir={runs}", "tracking.mode=disabled", "schedule.warmup_samples=0",
            ]  # fmt: skip
            self.config = open_run(*compose(overrides), overrides).config
        self.runtime = start("cpu", 60)
        self.tokenizer = build_tokenizer(self.config.tokenizer, self.config.model)

    def batches(self) -> Iterator[int]:
        build, config = self._build, self.config
        train = build.build_train_data(config, config.data, build.build_store(config), self.runtime)
        streams = train.order.streams
        positions = self._positions(streams, self.job.skip * self.job.batch // streams)
        starts = [train.order.window(stream, int(at)).start for stream, at in enumerate(positions)]
        self.again = int(positions.sum()) - sum(starts)
        for batch in build.build_loader(config, train, positions, self.tokenizer, self.runtime):
            if self.job.floats:
                self._as_open_clip(batch)
            yield len(batch.keys)

    def _as_open_clip(self, batch: Any) -> tuple[Any, Any]:
        import torch

        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        ids = torch.zeros(len(batch.keys), CONTEXT, dtype=torch.int64)
        ids[torch.arange(CONTEXT) < batch.text_lengths[:, None]] = batch.text_ids.long()
        return batch.images.float().div_(255).sub_(mean).div_(std), ids


class OpenClip:
    """open_clip's WebDataset pipeline, as its own training script builds it."""

    def __init__(self, job: Job) -> None:
        import open_clip
        import torch
        from open_clip_train.data import get_wds_dataset

        torch.set_num_threads(1)
        self.job, self._get = job, get_wds_dataset
        self.transform = open_clip.image_transform(IMAGE_SIZE, is_train=True)
        self.tokenizer = open_clip.get_tokenizer("ViT-B-32")

    def batches(self) -> Iterator[int]:
        job = self.job
        # One endless epoch where rates are measured, so that none of its edges falls into the time.
        samples = job.samples if job.measure == "memory" else 10**9
        args = SimpleNamespace(
            train_data=f"{job.root}/{job.pattern}", train_num_samples=samples, train_data_upsampling_factors=None,
            dataset_resampled=False, seed=0, batch_size=job.batch, workers=job.workers, world_size=1,
        )  # fmt: skip
        data = self._get(args, self.transform, is_train=True, tokenizer=self.tokenizer)
        epoch = 0
        while True:
            data.set_epoch(epoch)
            for images, texts in data.dataloader:
                assert images.shape[1:] == (3, IMAGE_SIZE, IMAGE_SIZE) and texts.shape[1:] == (CONTEXT,)
                yield len(images)
            epoch += 1


SIDES: dict[str, type[Clipscale] | type[OpenClip]] = {"clipscale": Clipscale, "open_clip": OpenClip}


def measure(job: Job) -> dict[str, Any]:
    """Run one job; the keys of the answer depend on ``job.measure``, first or memory."""
    side: Side = SIDES[job.side](job)
    return _first(side) if job.measure == "first" else _memory(job, side)


def rates(job: Job) -> Callable[[], dict[str, Any]]:
    """A function that draws ``job.turn`` batches from a loader that is in its stride.

    It tells the pairs per second, and per second of CPU time of the process and its workers.
    """
    side: Side = SIDES[job.side](job)
    batches = side.batches()

    def turn(count: int) -> dict[str, Any]:
        cpu, started = _cpu_s(), time.perf_counter()
        pairs = sum(islice(batches, count))
        return {"per_s": pairs / (time.perf_counter() - started), "per_cpu_s": pairs / max(_cpu_s() - cpu, 0.01)}

    turn(2 if not job.workers else 5 * job.workers)  # more than workers prepare in advance
    return lambda: turn(job.turn)


def _first(side: Side) -> dict[str, Any]:
    """Seconds, CPU seconds and bytes read until the first batch is there; samples of those that lay before it."""
    read, cpu, started = _bytes_read(), _cpu_s(), time.perf_counter()
    batches = side.batches()
    next(batches)
    return {
        "first_s": time.perf_counter() - started,
        "first_cpu_s": _cpu_s() - cpu,
        "read_bytes": _bytes_read() - read,
        "again": getattr(side, "again", 0),
    }


def _memory(job: Job, side: Side) -> dict[str, Any]:
    """Resident MB of the process and of its workers, after each of ``job.epochs`` epochs."""
    batches, rows = side.batches(), []
    for _ in range(job.epochs):
        for _ in islice(batches, job.samples // job.batch):
            pass
        rows.append([_resident_mb(os.getpid()), sum(_resident_mb(child) for child in _children())])
    return {"resident_mb": rows}


def _children() -> list[int]:
    """All processes below this one."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it ended meanwhile
    found = [os.getpid()]
    for above in found:
        found += [child for child, parent in parents.items() if parent == above]
    return found[1:]


def _cpu_s() -> float:
    ticks = 0
    for process in (os.getpid(), *_children()):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _resident_mb(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


def _bytes_read() -> int:
    """Of this process, from files in memory too."""
    return int(Path("/proc/self/io").read_text().split()[1])


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    if job.cpus:
        os.sched_setaffinity(0, job.cpus)
    code = 1
    try:
        if job.measure == "rate":
            draw = rates(job)
            print(json.dumps("ready"), flush=True)
            for _ in sys.stdin:
                print(json.dumps(draw()), flush=True)
        else:
            print(json.dumps(measure(job)), flush=True)
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)  # the workers of an endless loader need not be waited for


if __name__ == "__main__":
    main()
