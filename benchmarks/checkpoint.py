"""What a save costs a run, beside ``torch.save`` of the same state, in one run.

    python benchmarks/checkpoint.py [--model tiny] [--worlds 1 2 4] [--steps 50] [--rounds 5] [--pairs 8] [--out DIR]

Each round trains ``--steps`` steps without a save and as many with one that begins after the first fifth of them, and
waits for it at the end; then it saves the same state (weights, AdamW's moments, average) as people do: the whole of it
on rank 0, by ``torch.save`` and fsync, while the others wait. One process has the plain model, several FSDP2's shards.

    blocked  what ``Checkpointer.save`` keeps a step waiting: the copy into the buffers on the host
    extra    wall time of the steps with a save, less that of those without
    total    from the beginning of the save to the manifest
    verify   reading every byte against its checksum, shared by the ranks
    resume   loading it into a model that is laid out

All in seconds, and the first three over ``torch.save``'s. The first round warms up, and does not count; of the others
the median is taken.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 - benchmarks run from anywhere, installed or not
import torch.distributed as dist  # noqa: E402
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict  # noqa: E402

from clipscale.checkpoint import Checkpointer, Saved  # noqa: E402
from clipscale.config import compose  # noqa: E402
from clipscale.data.loader import Batch  # noqa: E402
from clipscale.distributed.collectives import rank, whole, world_size  # noqa: E402
from clipscale.distributed.runtime import Runtime  # noqa: E402
from clipscale.models import build_model  # noqa: E402
from clipscale.optim import Ema, build_optimizer  # noqa: E402
from clipscale.parallel import build_scaler, parallelize  # noqa: E402
from clipscale.trainer.objective import Objective  # noqa: E402
from clipscale.trainer.step import TrainStep  # noqa: E402

MEASURED = ("torch.save", "blocked", "extra", "total", "verify", "resume")


def draw(step: TrainStep, pairs: int) -> Batch:
    """Random pixels, and captions of nine tokens."""
    model = step.config.model
    generator = torch.Generator().manual_seed(rank())
    ids = torch.randint(1, model.text.eot_id, (pairs, 9), dtype=torch.int32, generator=generator)
    ids[:, -1] = model.text.eot_id
    side = model.vision.image_size
    pixels = torch.randint(0, 256, (pairs, 3, side, side), dtype=torch.uint8, generator=generator)
    lengths, numbers = torch.full((pairs,), 9, dtype=torch.int32), torch.arange(pairs)
    return Batch(pixels, ids.flatten(), lengths, torch.zeros(1, dtype=torch.int64), [], numbers, numbers)


def build(model: str, pairs: int) -> TrainStep:
    """A training step of this rank, as a run builds it, with an average."""
    layout = "fsdp" if world_size() > 1 else "ddp"
    config, _ = compose([f"model={model}", f"parallel={layout}", f"global_batch_size={pairs * world_size()}"])
    runtime = Runtime(rank(), world_size(), rank(), torch.device("cpu"))
    laid_out = parallelize(build_model(config.model), config.parallel, runtime.device)
    optimizer = build_optimizer(laid_out.model, config.optim)
    scaler = build_scaler(config.precision.name, runtime.device)
    return TrainStep(config, runtime, laid_out, Objective(config), optimizer, scaler, Ema(laid_out.model, 0.999))


def seconds(work: Callable[[], object]) -> float:
    """How long all ranks take for it together."""
    if world_size() > 1:
        dist.barrier()
    started = time.perf_counter()
    work()
    if world_size() > 1:
        dist.barrier()
    return time.perf_counter() - started


def save_as_people_do(step: TrainStep, file: Path) -> None:
    """All of the state on rank 0, by ``torch.save``, on the disk when it returns."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(step.model, step.optimizer, options=options)
    assert step.ema is not None
    average = {name: whole(tensor) for name, tensor in step.ema.state_dict().items()}
    if rank() == 0:
        with file.open("wb") as target:
            torch.save({"model": weights, "optim": moments, "ema": average}, target)
            target.flush()
            os.fsync(target.fileno())


def measure(model: str, pairs: int, steps: int, rounds: int, place: Path) -> dict[str, float]:
    """The medians of this rank."""
    step = build(model, pairs)
    assert step.ema is not None
    batch, average = draw(step, pairs), step.ema.state_dict()
    saver = Checkpointer(place / "checkpoints", 1)
    found: dict[str, list[float]] = {name: [] for name in MEASURED}

    def train(count: int) -> None:
        for _ in range(count):
            step.zero_grad()
            step(batch, 0, 1e-4)

    def train_and_save(number: int) -> None:
        train(steps // 5)
        began = time.perf_counter()
        saver.save(step.model, step.optimizer, average, Saved(step=number))
        found["blocked"].append(time.perf_counter() - began)
        train(steps - steps // 5)
        saver.wait()

    def save_alone(number: int) -> None:
        saver.save(step.model, step.optimizer, average, Saved(step=number))
        saver.wait()

    for number in range(1, rounds + 2):
        without = seconds(lambda: train(steps))
        found["extra"].append(seconds(lambda: train_and_save(2 * number)) - without)  # noqa: B023 - called at once
        found["total"].append(seconds(lambda: save_alone(2 * number + 1)))  # noqa: B023
        found["torch.save"].append(seconds(lambda: save_as_people_do(step, place / "whole.pt")))
        found["verify"].append(seconds(saver.newest))
        newest = saver.newest()
        assert newest is not None
        found["resume"].append(seconds(lambda: saver.restore(newest, step.model, step.optimizer, average)))  # noqa: B023
    size = (place / "whole.pt").stat().st_size if rank() == 0 else 0
    return {name: statistics.median(values[1:]) for name, values in found.items()} | {"bytes": size}


def work(number: int, world: int, port: int, options: argparse.Namespace, place: str, answers: object) -> None:
    """A rank."""
    torch.set_num_threads(1)
    if world > 1:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=number, world_size=world)
    row = measure(options.model, options.pairs, options.steps, options.rounds, Path(place))
    if number == 0:
        answers.put(row)  # type: ignore[attr-defined]
    if world > 1:
        dist.destroy_process_group()


def run(world: int, options: argparse.Namespace) -> dict[str, float]:
    """Measure with so many processes."""
    place = Path(tempfile.mkdtemp(prefix="checkpoints-", dir=options.out))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    try:
        arguments = (world, port, options, str(place), answers)
        started = torch.multiprocessing.spawn(work, arguments, nprocs=world, join=False)
        while not started.join():
            pass
        return answers.get()
    finally:
        shutil.rmtree(place)


def main() -> None:
    """Print a row for each number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=8, help="per process")
    parser.add_argument("--out", help="directory of the checkpoints")
    options = parser.parse_args()
    print("processes     MB  torch.save s   blocked        extra          total          verify s  resume s")
    for world in options.worlds:
        row = run(world, options)
        peer = row["torch.save"]
        shares = "  ".join(f"{row[name]:6.3f} {row[name] / peer:6.1%}" for name in ("blocked", "extra", "total"))
        print(
            f"{world:9} {row['bytes'] / 1e6:6.0f}  {peer:12.3f}  {shares}  {row['verify']:8.3f}  {row['resume']:8.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
