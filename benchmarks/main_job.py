"""How much the main job costs beyond the arithmetic: its samples/s over those of a bare loop.

    python benchmarks/main_job.py DATA_ROOT [--pairs 3] [--steps 60]

Both train the emoji experiment's model on batches of 256. The job is the real command, with workers that read, decode,
crop and tokenize, with logging and metrics. The bare loop goes round and round over eight batches made beforehand:
forward, loss, backward, AdamW. They run one after the other as processes of their own, in pairs; the ratio counts, a
single time says nothing on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

BATCH, INTERVAL, CACHED = 256, 10, 8


def job(root: str, steps: int) -> float:
    """Median samples/s of the real command, over logging intervals after the first."""
    with tempfile.TemporaryDirectory() as runs:
        overrides = [
            "experiment=emoji", f"data.root={root}", f"runs_dir={runs}", "name=job", "tracking=disabled",
            f"total_samples={steps * BATCH}", "schedule.warmup_samples=0", "data.val.shards=null",
            f"tracking.log_every_steps={INTERVAL}", "checkpoint.every_samples=null",
        ]  # fmt: skip
        subprocess.run([sys.executable, "-m", "clipscale.cli", "train", *overrides], check=True, capture_output=True)
        rows = [json.loads(line) for line in Path(runs, "job", "metrics.jsonl").read_text().splitlines()]
    return statistics.median([row["train/samples_per_s"] for row in rows if "train/loss" in row][1:])


def bare(root: str, steps: int) -> float:
    """Median samples/s of a plain loop over cached batches."""
    import numpy as np
    import torch

    from clipscale.config import compose
    from clipscale.config.rundir import open_run
    from clipscale.data.tokenizer import build_tokenizer
    from clipscale.distributed.runtime import start
    from clipscale.losses import clip_loss
    from clipscale.models import build_model
    from clipscale.optim import build_optimizer
    from clipscale.trainer.build import build_loader, build_store, build_train_data

    with tempfile.TemporaryDirectory() as runs:
        overrides = ["experiment=emoji", f"data.root={root}", f"runs_dir={runs}", "data.workers=0"]
        config = open_run(*compose(overrides), overrides).config
    runtime = start("cpu", 60)
    train = build_train_data(config, config.data, build_store(config), runtime)
    positions = np.zeros(train.order.streams, np.int64)
    loader = build_loader(config, train, positions, build_tokenizer(config.tokenizer, config.model), runtime)
    batches = list(islice(loader, CACHED))
    model = build_model(config.model).train()
    optimizer = build_optimizer(model, config.optim)
    rates, started = [], time.perf_counter()
    for step in range(1, steps + 1):
        batch = batches[step % CACHED]
        optimizer.zero_grad()
        features = model(batch.images, batch.text_ids, batch.text_lengths)
        clip_loss(features.image, features.text, features.logit_scale).backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)
        if step % INTERVAL == 0:
            rates.append(INTERVAL * BATCH / (time.perf_counter() - started))
            started = time.perf_counter()
    return statistics.median(rates[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--bare", action="store_true", help="run the bare loop alone and print its samples/s")
    options = parser.parse_args()
    if options.bare:
        print(bare(options.root, options.steps))
        return
    ratios = []
    for pair in range(options.pairs):
        ours = job(options.root, options.steps)
        command = [sys.executable, __file__, options.root, "--steps", str(options.steps), "--bare"]
        theirs = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        ratios.append(ours / theirs)
        print(f"pair {pair + 1}: job {ours:,.0f}/s, bare loop {theirs:,.0f}/s, ratio {ratios[-1]:.3f}")
    print(f"ratio: median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
