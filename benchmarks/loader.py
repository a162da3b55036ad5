"""clipscale's training loader against open_clip's WebDataset pipeline, on the same shards in one run.

    python benchmarks/loader.py --peer-python /tmp/peer/bin/python [--photos DIR] [--work DIR] [--pairs 5]

open_clip's pipeline needs an older webdataset than clipscale, so it has a virtual environment of its own:

    python -m venv /tmp/peer
    /tmp/peer/bin/python -m pip install open_clip_torch==3.3.0 "webdataset<=0.2.86" braceexpand pandas torch torchvision

with the torch and torchvision of clipscale's environment. Without ``--peer-python`` clipscale is measured alone.

Every loader runs in a process of its own (``loader_side.py``), pinned to one core with 0 workers and to two with 2,
torch on one thread. For the rates the processes take turns of a few batches; whose turn it is not is stopped, workers
and all. The ratio of a pair counts, a single time says nothing on a shared machine. Samples per CPU second are of the
process and its workers together, and suffer less from other processes.
``floats`` is clipscale with its batches made into what open_clip's are, normalised floats and padded ids, which its
model otherwise does on the device.

``--photos`` is a directory of ``photos-train-*.tar`` whose pictures are used; without it they are drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from loader_shards import ImageSet, make_shards
from loader_side import Job

SIDE = Path(__file__).resolve().with_name("loader_side.py")
ROOT = SIDE.parents[1]  # where they run, too: a server of loader workers looks for modules in its directory first
MEASURES = ("rate", "first", "resume", "memory")
SETS = (ImageSet("256x256", 256, 256, 21_000, 4096, 8), ImageSet("500x375", 500, 375, 48_000, 4096, 8))
SMALL = ImageSet("96x96", 96, 96, 4_000, 1024, 4)
COPIES = 16  # of the larger set's shards, by links: a set larger than what the loader holds in memory
EPOCHS_SHOWN = (1, 10, 20, 30, 40, 50)


class Rater:
    """A process that draws batches when told, and stands still otherwise."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it goes with the process
        self.process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            text=True, start_new_session=True,
        )  # fmt: skip
        self._answer()

    def turn(self) -> dict:
        """What it measured in one turn."""
        assert self.process.stdin is not None
        os.killpg(self.process.pid, signal.SIGCONT)
        print("go", file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            sys.exit(self.errors.read().strip())
        os.killpg(self.process.pid, signal.SIGSTOP)
        return json.loads(line)

    def close(self) -> None:
        """End it and its workers."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


class Bench:
    """Starts measurements, with the options of the command line."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.shards = options, options.work / "shards"
        self.sides = ("clipscale", "open_clip") if options.peer_python else ("clipscale",)

    def job(self, side: str, measure: str, images: ImageSet, **more: object) -> Job:
        """A job on one of the sets."""
        return Job(side, measure, str(self.shards), images.pattern, images.samples, **more)

    def start(self, job: Job, cache: Path | None = None) -> tuple[list[str], dict[str, str]]:
        """Command and environment of a job; ``cache`` is where clipscale looks for indexes of shards."""
        cpus = sorted(os.sched_getaffinity(0))
        job.cpus = cpus[-min(max(1, job.workers), len(cpus)) :]
        python = sys.executable if job.side == "clipscale" else self.options.peer_python
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache or self.options.work / "cache")}
        if job.side == "clipscale":
            environment["PYTHONPATH"] = str(ROOT)
        return [python, str(SIDE), json.dumps(asdict(job))], environment

    def run(self, job: Job, cache: Path | None = None) -> dict:
        """What one process measured."""
        command, environment = self.start(job, cache)
        answer = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        if answer.returncode:
            sys.exit(f"{job.side}: {answer.stderr.strip()}")
        return json.loads(answer.stdout.splitlines()[-1])

    def rates(self, images: ImageSet, workers: int) -> None:
        """Samples per second, in pairs."""
        jobs = {side: self.job(side, "rate", images, workers=workers) for side in self.sides}
        if not workers:
            jobs["floats"] = self.job("clipscale", "rate", images, floats=True)
        raters: dict[str, Rater] = {}
        rows = []
        print(f"\n{images.name}, {workers} workers: samples/s (samples per CPU second)", flush=True)
        try:
            for name, job in jobs.items():
                raters[name] = Rater(*self.start(job))
            for pair in range(self.options.pairs):
                row = {name: rater.turn() for name, rater in raters.items()}
                rows.append(row)
                text = ", ".join(f"{name} {one['per_s']:,.0f} ({one['per_cpu_s']:,.0f})" for name, one in row.items())
                print(f"pair {pair + 1}: {text}{self._ratios(row)}", flush=True)
        finally:
            for rater in raters.values():
                rater.close()
        for name in [name for name in jobs if name != "open_clip" and "open_clip" in jobs]:
            for key, what in (("per_s", "samples/s"), ("per_cpu_s", "samples per CPU second")):
                ratios = [row[name][key] / row["open_clip"][key] for row in rows]
                spread = f"from {min(ratios):.2f} to {max(ratios):.2f}"
                print(f"{name} / open_clip, {what}: median {statistics.median(ratios):.2f}, {spread}")

    @staticmethod
    def _ratios(row: dict[str, dict]) -> str:
        if "open_clip" not in row:
            return ""
        ours, peer = row["clipscale"], row["open_clip"]
        return f"; ratio {ours['per_s'] / peer['per_s']:.2f} ({ours['per_cpu_s'] / peer['per_cpu_s']:.2f})"

    def first_batch(self, large: Job) -> None:
        """Seconds until the first batch; without the index of the shards, too, and where the set is large."""
        print("\nto the first batch: seconds (CPU seconds), medians of", self.options.pairs)
        for name, job in {SETS[1].name: self.job("clipscale", "first", SETS[1]), large.pattern: large}.items():
            for workers in (0, 2):
                row = {side: self._first(replace(job, side=side, workers=workers)) for side in self.sides}
                if not workers:
                    row["clipscale without an index"] = self._first(job, indexed=False)
                text = ", ".join(f"{side} {one}" for side, one in row.items())
                print(f"{name} ({job.samples:,} samples), {workers} workers: {text}", flush=True)

    def _first(self, job: Job, indexed: bool = True) -> str:
        rows = []
        for _ in range(self.options.pairs):
            with tempfile.TemporaryDirectory() as cold:
                rows.append(self.run(job, None if indexed else Path(cold)))
        return _seconds(rows)

    def resume(self, large: Job) -> None:
        """What it costs to go on from the middle of an epoch, for two sizes of the shuffle window."""
        print(f"\nto go on inside an epoch of {large.samples:,} samples, 0 workers: seconds (CPU seconds), medians")
        for window in (None, 16):
            for skip in (0, large.samples // large.batch // 2):
                job = replace(large, skip=skip, window=window)
                rows = [self.run(job) for _ in range(self.options.pairs)]
                print(
                    f"data.window={window or 'null'}, after {skip} batches: first batch after {_seconds(rows)}, "
                    f"{rows[0]['read_bytes'] / 1e6:,.0f} MB read; {rows[0]['again']:,} samples read again",
                    flush=True,
                )
        print("open_clip: cannot go on inside an epoch; it starts the epoch again, in another order")

    def memory(self) -> None:
        """Resident memory of clipscale's loader over epochs, 2 workers."""
        job = self.job("clipscale", "memory", SMALL, workers=2, epochs=self.options.epochs)
        rows = self.run(job)["resident_mb"]
        text = ", ".join(f"{n}: {rows[n - 1][0]:,} + {rows[n - 1][1]:,}" for n in EPOCHS_SHOWN if n <= len(rows))
        print(f"\nMB resident after epochs of {SMALL.samples:,} samples, process + workers: {text}", flush=True)


def _seconds(rows: list[dict]) -> str:
    wall, cpu = (statistics.median(row[key] for row in rows) for key in ("first_s", "first_cpu_s"))
    return f"{wall:.2f} ({cpu:.2f})"


def link_copies(shards: Path, images: ImageSet) -> ImageSet:
    """The set many times over, by symbolic links."""
    samples, count = images.samples * COPIES, images.shards * COPIES
    many = images._replace(name=f"{images.name}-x{COPIES}", samples=samples, shards=count)
    for number in range(many.shards):
        link = shards / f"{many.name}-{number:06d}.tar"
        link.unlink(missing_ok=True)
        link.symlink_to(f"{images.name}-{number % images.shards:06d}.tar")
    return many


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", help="interpreter of open_clip's environment")
    parser.add_argument("--photos", type=Path, help="directory of photos-train-*.tar")
    parser.add_argument("--work", type=Path, help="directory of the shards, kept; without it a temporary one")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=50, help="of the memory measurement")
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=MEASURES)
    options = parser.parse_args()
    scratch = None if options.work else Path(tempfile.mkdtemp())
    options.work = (options.work or scratch).resolve()
    bench = Bench(options)
    try:
        for images in (*SETS, SMALL):
            make_shards(bench.shards, options.photos, images)
        large = bench.job("clipscale", "first", link_copies(bench.shards, SETS[1]))
        if "rate" in options.measures:
            for images in SETS:
                for workers in (0, 2):
                    bench.rates(images, workers)
        if "first" in options.measures:
            bench.first_batch(large)
        if "resume" in options.measures:
            bench.resume(large)
        if "memory" in options.measures:
            bench.memory()
    finally:
        if scratch:
            shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
