"""A whole training step of clipscale's against open_clip's: CPU seconds, side by side in one run.

    python benchmarks/step.py [--model vit_b_32] [--pairs 16] [--rounds 5] [--precision fp32] [--lengths laion cc12m]

Forward, loss, backward, AdamW, clamp: ``TrainStep`` as a run calls it, and ``train_one_epoch`` of open_clip_train on an
epoch of one batch. Both sides have the same weights and the same pairs: clipscale images of bytes and packed captions,
open_clip normalised floats and ids padded to the context, as their loaders give them. open_clip steps twice, with AdamW
as it builds it, and with the fused one, which clipscale uses.

Captions have the lengths of LAION's (11.5 ± 8 words, log-normal, 1.3 tokens each and two more), CC12M's (20.2 ± 16.3),
or fill the context. One process, torch on one thread. Sides take turns; the least CPU seconds of the rounds count, and
so does their ratio; the median of the rounds' own ratios tells how far to trust it. The ceiling is the ratio of the
FLOPs that open_clip computes to those that this batch needs (``clipscale.models.flops``): what equal arithmetic could
reach.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import open_clip  # noqa: E402 - benchmarks run from anywhere, installed or not
import torch  # noqa: E402
from open_clip_train.train import train_one_epoch  # noqa: E402

from benchmarks.towers import draw_lengths, peer  # noqa: E402
from clipscale.checkpoint.interop import from_open_clip  # noqa: E402
from clipscale.config import Config, compose  # noqa: E402
from clipscale.config.model import Model  # noqa: E402
from clipscale.config.optim import Optim  # noqa: E402
from clipscale.data.loader import Batch  # noqa: E402
from clipscale.distributed.runtime import Runtime  # noqa: E402
from clipscale.models import build_model  # noqa: E402
from clipscale.models.flops import NOMINAL, Execution, flops  # noqa: E402
from clipscale.optim import build_optimizer  # noqa: E402
from clipscale.parallel import build_scaler, parallelize  # noqa: E402
from clipscale.trainer.objective import Objective  # noqa: E402
from clipscale.trainer.step import TrainStep  # noqa: E402

# Words of a caption, in the mean, and their deviation; None fills the context.
LENGTHS = {"laion": (11.5, 8.0), "cc12m": (20.2, 16.3), "full": None}


@dataclass(frozen=True)
class Pairs:
    """The same pairs as both sides take them: ``images`` Float[B, 3, S, S], ``padded`` Int64[B, L]."""

    batch: Batch
    images: torch.Tensor
    padded: torch.Tensor

    @staticmethod
    def draw(config: Model, pairs: int, name: str) -> Pairs:
        """Random pixels and random captions of the lengths that ``name`` says."""
        words, context, size = LENGTHS[name], config.context_length, config.vision.image_size
        lengths = torch.full((pairs,), context, dtype=torch.int32)
        if words is not None:
            lengths = draw_lengths(pairs, context, *words)
        generator = torch.Generator().manual_seed(0)
        padded = torch.randint(1, config.text.eot_id, (pairs, context), generator=generator)
        padded[torch.arange(pairs), lengths.long() - 1] = config.text.eot_id
        real = torch.arange(context) < lengths[:, None]
        pixels = torch.randint(0, 256, (pairs, 3, size, size), dtype=torch.uint8, generator=generator)
        where, numbers = torch.zeros(1, dtype=torch.int64), torch.arange(pairs)
        batch = Batch(pixels, padded[real].int(), lengths, where, [], numbers, numbers)
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (config.mean, config.std))
        return Pairs(batch, (pixels / 255 - mean) / std, padded * real)

    def pinned(self) -> Pairs:
        """As a loader leaves them for a GPU."""
        batch = Batch.concatenate([self.batch], pin=True)
        return Pairs(batch, self.images.pin_memory(), self.padded.pin_memory())


def configure(model: str, pairs: int, *overrides: str) -> Config:
    """A run's configuration, with what both sides take from it."""
    return compose([f"model={model}", f"global_batch_size={pairs}", *overrides])[0]


class Ours:
    """clipscale's step, on the weights of open_clip's model where they are given."""

    def __init__(self, config: Config, state: Mapping[str, torch.Tensor] | None = None, device: str = "cpu") -> None:
        self.config = config
        model, runtime = build_model(config.model), Runtime(0, 1, 0, torch.device(device))
        if state is not None:
            model.load_state_dict(from_open_clip(state))
        laid_out = parallelize(model, config.parallel, runtime.device)
        optimizer, scaler = build_optimizer(model, config.optim), build_scaler(config.precision.name, runtime.device)
        self.step = TrainStep(config, runtime, laid_out, Objective(config), optimizer, scaler, None)
        self.model = model

    def __call__(self, pairs: Pairs, steps: int = 1) -> None:
        """Train on the same pairs so many times."""
        for _ in range(steps):
            self.model.train()
            self.step.zero_grad()
            self.step(pairs.batch, 0, self.config.optim.lr)


class Theirs:
    """open_clip's model, loss and optimizer, in the training loop of open_clip_train."""

    def __init__(self, config: Config, device: str = "cpu", compiled: bool = False) -> None:
        self.model = peer(config.model).to(device)
        self.model.output_dict = True
        self.optimizer = peers_optimizer(self.model, config.optim)
        self.loss = open_clip.ClipLoss(cache_labels=True)
        self._module = torch.compile(self.model) if compiled else self.model
        self._args = SimpleNamespace(
            device=device, precision=config.precision.name.value, distill=False, accum_freq=1, skip_scheduler=True,
            horovod=False, grad_clip_norm=None, rank=0, local_rank=0, world_size=1, batch_size=config.global_batch_size,
            log_every_n_steps=1000, wandb=False,
        )  # fmt: skip

    def __call__(self, pairs: Pairs, steps: int = 1, fused: bool | None = True) -> None:
        """Train an epoch that is the same pairs so many times; ``fused=None`` is AdamW as torch chooses it."""
        for group in self.optimizer.param_groups:  # its state is the same for both
            group["fused"] = fused
        loader: Any = _Loader([(pairs.images, pairs.padded)] * steps)
        loader.num_batches, loader.num_samples = steps, steps * len(pairs.images)
        data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
        train_one_epoch(self._module, data, self.loss, 0, self.optimizer, None, None, None, self._args)


class _Loader(list[Any]):
    """A list that carries attributes."""


def peers_optimizer(model: torch.nn.Module, config: Optim) -> torch.optim.AdamW:
    """AdamW as open_clip_train builds it."""
    words = ("bn", "ln", "bias", "logit_scale")
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in (0.0, config.weight_decay)]
    for name, parameter in model.named_parameters():
        is_exempt = parameter.ndim < 2 or any(word in name for word in words)
        groups[0 if is_exempt else 1]["params"].append(parameter)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


@dataclass(frozen=True)
class Sides:
    """Both sides, on equal weights at first."""

    ours: Ours
    theirs: Theirs

    @staticmethod
    def of(config: Config) -> Sides:
        theirs = Theirs(config)
        return Sides(Ours(config, theirs.model.state_dict()), theirs)

    def turn(self, pairs: Pairs) -> dict[str, float]:
        """CPU seconds of a step: ``ours``, ``theirs`` and ``fused``, theirs with the fused AdamW."""
        return {
            "ours": _seconds(lambda: self.ours(pairs), self.ours.model),
            "theirs": _seconds(lambda: self.theirs(pairs, fused=None), self.theirs.model),
            "fused": _seconds(lambda: self.theirs(pairs), self.theirs.model),
        }

    @torch.no_grad()
    def losses(self, pairs: Pairs) -> list[float]:
        """Of both sides on the same pairs: equal before the first step, to rounding."""
        mine, other, batch = self.ours.model, self.theirs.model, pairs.batch
        return [
            self.theirs.loss(mine.encode_image(batch.images, True), mine.encode_text(batch, None, True), 20.0).item(),
            self.theirs.loss(
                other.encode_image(pairs.images, True), other.encode_text(pairs.padded, True), 20.0
            ).item(),
        ]


def _seconds(step: Callable[[], None], model: torch.nn.Module) -> float:
    begun = time.process_time()
    step()
    spent = time.process_time() - begun
    model.zero_grad()  # the other side's step has the memory then
    return spent


def ceiling(config: Model, batch: Batch) -> float:
    """How many times more FLOPs open_clip computes for a batch than it needs."""
    needed = flops(config, Execution(batch.text_lengths.tolist()))
    return flops(config, NOMINAL).training / needed.training


def measure(sides: Sides, pairs: Pairs, rounds: int) -> dict[str, float]:
    """CPU seconds of a step, the ratios to both peers (of the least, and the rounds' median), and the ceiling."""
    turns = [sides.turn(pairs) for _ in range(rounds + 1)][1:]  # the first one only warms up
    found = {side: min(turn[side] for turn in turns) for side in turns[0]}
    for side in ("theirs", "fused"):
        found[f"{side}_ratio"] = found[side] / found["ours"]
        found[f"{side}_median"] = statistics.median(turn[side] / turn["ours"] for turn in turns)
    return found | {"ceiling": ceiling(sides.ours.config.model, pairs.batch)}


def show(model: str, precision: str, lengths: str, pairs: Pairs, row: dict[str, float]) -> None:
    """Print what :func:`measure` found."""
    tokens = f"{pairs.batch.text_lengths.float().mean():.1f}"
    share = row["fused_ratio"] / row["ceiling"]
    about = {"model": model, "precision": precision, "lengths": lengths, "tokens": tokens, "share": share}
    print(ROW.format(**about, **row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_b_32", help="one of the model group's ViTs")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", nargs="+", choices=("fp32", "amp_bf16"), default=["fp32", "amp_bf16"])
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=[*LENGTHS])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(HEADER)
    for precision in options.precision:
        config = configure(options.model, options.pairs, f"precision={precision}")
        sides = Sides.of(config)
        for name in options.lengths:
            pairs = Pairs.draw(config.model, options.pairs, name)
            show(options.model, precision, name, pairs, measure(sides, pairs, options.rounds))
        del sides  # before the next ones are built: two models and their optimizers fill gigabytes


ABOUT = "{model:<10} {precision:<9} {lengths:<6} {tokens:>5} {ours:8.2f}"
PEERS = "{theirs:10.2f} {theirs_ratio:6.2f} ({theirs_median:.2f}) {fused:10.2f} {fused_ratio:6.2f} ({fused_median:.2f})"
ROW = f"{ABOUT} {PEERS} {{ceiling:8.3f}} {{share:5.0%}}"
HEADER = (
    "                                    clipscale   open_clip (median)  fused AdamW (median)  ceiling\n"
    "model      precision lengths, tokens    CPU s       CPU s  ratio           CPU s  ratio             of it, fused"
)


if __name__ == "__main__":
    main()
