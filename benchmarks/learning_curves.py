"""Equal samples, equal batches: does clipscale learn as open_clip does?

    python benchmarks/learning_curves.py run DATA_ROOT --experiment emoji --seed 0 --out DIR [--same-start]
    python benchmarks/learning_curves.py plot DIR --picture curves.png

``run`` trains two models side by side on the very same batches: clipscale's, by its own training step, and open_clip's
``CLIP`` with open_clip's ``ClipLoss``, the optimizer that its training script makes, and its schedule. Each starts from
its own library's initialisation with that seed, or with ``--same-start`` both from open_clip's. Both are evaluated by
the same code: the peer's weights are renamed for it, nothing else. ``plot`` draws all runs of a directory and prints
each metric's mean and spread over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 - benchmarks run from anywhere, installed or not
import open_clip  # noqa: E402
import torch  # noqa: E402
from open_clip_train.scheduler import cosine_lr  # noqa: E402

from benchmarks.towers import peer as build_peer  # noqa: E402
from clipscale.checkpoint.interop import from_open_clip  # noqa: E402
from clipscale.config import Config, compose  # noqa: E402
from clipscale.config.rundir import open_run  # noqa: E402
from clipscale.data.loader import Batch  # noqa: E402
from clipscale.data.tokenizer import build_tokenizer  # noqa: E402
from clipscale.distributed.runtime import start  # noqa: E402
from clipscale.evals import build_evaluators  # noqa: E402
from clipscale.models import CLIP, build_model  # noqa: E402
from clipscale.optim import build_optimizer, learning_rate  # noqa: E402
from clipscale.parallel import build_scaler, parallelize  # noqa: E402
from clipscale.trainer.build import build_loader, build_store, build_train_data, eval_context  # noqa: E402
from clipscale.trainer.objective import Objective  # noqa: E402
from clipscale.trainer.step import TrainStep  # noqa: E402

EVALUATIONS, WINDOW = 6, 20  # evaluations a run; steps over which a training loss is averaged
Step = Callable[[Batch, int], float]


class Ours:
    """clipscale's model and step."""

    def __init__(self, config: Config) -> None:
        self.config = config
        runtime = start("cpu", 60)
        laid_out = parallelize(build_model(config.model, seed=config.seed), config.parallel, runtime.device)
        optimizer = build_optimizer(laid_out.model, config.optim)
        scaler = build_scaler(config.precision.name, runtime.device)
        self.step = TrainStep(config, runtime, laid_out, Objective(config), optimizer, scaler, None)

    def __call__(self, batch: Batch, number: int) -> float:
        config = self.config
        before = number * config.global_batch_size
        after = before + config.global_batch_size
        lr = learning_rate(config.schedule, config.optim.lr, before, after, config.total_samples)
        self.step.model.train()
        self.step.zero_grad()
        return self.step(batch, before, lr).item()

    def model(self) -> CLIP:
        return self.step.model


class OpenClip:
    """open_clip's model, loss, optimizer and schedule, as its training script puts them together."""

    def __init__(self, config: Config) -> None:
        self.config = config
        torch.manual_seed(config.seed)
        self.net, self.loss = build_peer(config.model), open_clip.ClipLoss()
        named = list(self.net.named_parameters())

        def is_exempt(name: str, parameter: torch.Tensor) -> bool:
            return parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))

        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for n, p in named if is_exempt(n, p)], "weight_decay": 0.0},
                {"params": [p for n, p in named if not is_exempt(n, p)], "weight_decay": optim.weight_decay},
            ],
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
        )
        batch = config.global_batch_size
        warmup, steps = config.schedule.warmup_samples // batch, config.total_samples // batch
        self.schedule = cosine_lr(self.optimizer, optim.lr, warmup, steps)
        self.mean, self.std = (torch.tensor(x).view(3, 1, 1) * 255 for x in (config.model.mean, config.model.std))

    def __call__(self, batch: Batch, number: int) -> float:
        self.net.train()
        self.schedule(number)
        self.optimizer.zero_grad()
        images = (batch.images.float() - self.mean) / self.std
        loss = self.loss(*self.net(images, padded(batch, self.config.model.context_length)))
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.net.logit_scale.clamp_(0, math.log(100))
        return loss.item()

    def model(self) -> CLIP:
        model = build_model(self.config.model)
        model.load_state_dict(from_open_clip(self.net.state_dict()))
        return model


def padded(batch: Batch, context: int) -> torch.Tensor:
    """The batch's captions as open_clip's tokenizer gives them, Int64[B, L]."""
    ids = torch.zeros(len(batch.text_lengths), context, dtype=torch.int64)
    ids[torch.arange(context) < batch.text_lengths[:, None]] = batch.text_ids.long()
    return ids


def run(root: str, experiment: str, seed: int, steps: int, same_start: bool = False) -> list[dict]:
    """Rows ``{side, step, loss | metric: value}`` of both sides trained on the same batches."""
    overrides = [f"experiment={experiment}", f"data.root={root}", f"seed={seed}", "data.workers=0"]
    config, _ = compose(overrides)
    overrides += [
        f"total_samples={steps * config.global_batch_size}",
        f"schedule.warmup_samples={min(config.schedule.warmup_samples, steps * config.global_batch_size // 8)}",
    ]
    with tempfile.TemporaryDirectory() as runs:
        config = open_run(*compose([*overrides, f"runs_dir={runs}"]), overrides).config
    ours, theirs = Ours(config), OpenClip(config)
    if same_start:
        ours.step.model.load_state_dict(from_open_clip(theirs.net.state_dict()))
    sides = {"clipscale": ours, "open_clip": theirs}
    rows: list[dict] = []
    losses: dict[str, list[float]] = defaultdict(list)
    for number, batch in enumerate(islice(batches(config), steps)):
        for name, step in sides.items():
            losses[name].append(step(batch, number))
        if (number + 1) % WINDOW == 0 or number + 1 == steps:
            rows += [
                {"side": name, "step": number + 1, "train/loss": statistics.fmean(found[-WINDOW:])}
                for name, found in losses.items()
            ]
        if (number + 1) * EVALUATIONS % steps < EVALUATIONS:
            rows += [
                {"side": name, "step": number + 1, **evaluate(config, side.model())} for name, side in sides.items()
            ]
            print(json.dumps(rows[-2:]), flush=True)
    return rows


def batches(config: Config) -> Iterator[Batch]:
    runtime = start("cpu", 60)
    train = build_train_data(config, config.data, build_store(config), runtime)
    tokenizer = build_tokenizer(config.tokenizer, config.model)
    return iter(build_loader(config, train, np.zeros(train.order.streams, np.int64), tokenizer, runtime))


def evaluate(config: Config, model: CLIP) -> dict[str, float]:
    """What the run's own evaluators say of a model."""
    tokenizer = build_tokenizer(config.tokenizer, config.model)
    context = eval_context(config, model.eval(), tokenizer, torch.device("cpu"))
    found: dict[str, float] = {}
    for one in build_evaluators(config.data, build_store(config), config.model, config.global_batch_size):
        found |= one.run(context)
    return {key: value for key, value in found.items() if not key.endswith("_chance")}


def summarise(folder: Path, picture: Path) -> None:
    """Draw every run of ``folder``, and print the last values: mean and range over seeds of each side."""
    import matplotlib.pyplot as plt

    runs: dict[str, list[list[dict]]] = defaultdict(list)
    for path in sorted(folder.glob("*-seed*.json")):
        runs[path.name.split("-seed")[0]].append(json.loads(path.read_text()))
    shown = {"train/loss": "training loss", "val/retrieval/i2t_r1": "retrieval, image to text R@1"}
    figure, axes = plt.subplots(len(runs), 3, figsize=(13, 3.6 * len(runs)), squeeze=False, layout="constrained")
    for row, (experiment, seeds) in zip(axes, runs.items(), strict=True):
        top1 = any("val/zeroshot/top1" in point for point in seeds[0])
        last = {"val/zeroshot/top1": "zero-shot top-1"} if top1 else {"val/loss": "held-out loss"}
        for axis, (metric, title) in zip(row, (shown | last).items(), strict=True):
            draw(axis, seeds, metric)
            axis.set_title(f"{experiment}: {title}")
            axis.set_xlabel("steps")
        print(f"\n{experiment}, {len(seeds)} seeds: mean (least to most) after the last step")
        for metric in sorted({key for point in seeds[0] for key in point} - {"side", "step"}):
            told = []
            for side in ("clipscale", "open_clip"):
                ends = [
                    [point[metric] for point in one if point["side"] == side and metric in point][-1] for one in seeds
                ]
                told.append(f"{side} {statistics.fmean(ends):.4f} ({min(ends):.4f} to {max(ends):.4f})")
            print(f"| `{metric}` | " + " | ".join(told) + " |")
    axes[0, 0].legend()
    figure.savefig(picture, dpi=90)


def draw(axis, seeds: list[list[dict]], metric: str) -> None:
    # The peer's are wide: from the same weights, ours lie on them.
    for side, color, width in (("open_clip", "tab:orange", 5.0), ("clipscale", "tab:blue", 1.2)):
        for number, one in enumerate(seeds):
            points = [(point["step"], point[metric]) for point in one if point["side"] == side and metric in point]
            axis.plot(*zip(*points, strict=True), color=color, alpha=0.6, lw=width, label=None if number else side)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("root")
    one.add_argument("--experiment", default="emoji", help="emoji or photos")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--steps", type=int, default=400)
    one.add_argument("--out", type=Path, required=True, help="directory for the rows of each run")
    one.add_argument("--same-start", action="store_true", help="give clipscale open_clip's first weights")
    plot = commands.add_parser("plot")
    plot.add_argument("folder", type=Path)
    plot.add_argument("--picture", type=Path, default=Path("curves.png"))
    options = parser.parse_args()
    if options.command == "plot":
        summarise(options.folder, options.picture)
        return
    rows = run(options.root, options.experiment, options.seed, options.steps, options.same_start)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.experiment}-seed{options.seed}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
