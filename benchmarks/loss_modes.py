"""The gradient that each way of distributing a contrastive loss leaves in the encoders, against the true one.

    python benchmarks/loss_modes.py [--worlds 1 2 4] [--json FILE]

Real ranks (gloo, a process each) train linear encoders under DDP, in float64, on a global batch that is the same for
every number of ranks. The true gradient is that of one process on the whole batch with the cross entropies (or
sigmoids) of the full matrix of logits. For each mode: the cosine of the encoders' gradient and the true one, the ratio
of their norms, and the ratio of the gradients of the log temperature. 1, 1 and 1 are right.

open_clip's losses are the installed ones. ``--accum-freq`` is what its train.py does with them: all microbatches go
forward without a graph, then each once more with one and, among the features of the others, through the loss and
backward.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clipscale.losses import clip_loss, siglip_loss
from clipscale.models import Features
from clipscale.trainer.cached import backward_through_parts

PAIRS, INPUTS, WIDTH = 128, 48, 32
MICROBATCHES = 4
SCALES = {"clip": 1 / 0.07, "siglip": 10.0}
BIAS = -10.0
SIGLIP_MODES = ("bidir", "shift", "reduce", "gather")
Loss = Callable[[Features], torch.Tensor]
Parts = Sequence[tuple[torch.Tensor, torch.Tensor]]


class Towers(nn.Module):
    """Two linear encoders, a log temperature, and the sigmoid loss's bias. In float64, the same on every rank."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        shape = (INPUTS, WIDTH)
        self.image = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        self.text = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(SCALES[kind]), dtype=torch.float64))
        bias = nn.Parameter(torch.tensor(BIAS, dtype=torch.float64)) if kind == "siglip" else None
        self.register_parameter("logit_bias", bias)

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> Features:
        image, text = F.normalize(images @ self.image, dim=-1), F.normalize(texts @ self.text, dim=-1)
        bias = None if self.logit_bias is None else self.logit_bias + 0
        return Features(
            image=image, text=text, extra_text=text[:0], logit_scale=self.logit_scale.exp(), logit_bias=bias
        )


@dataclass(frozen=True)
class Mode:
    """``kind`` of loss, what the mode is called, what makes the loss on a rank, and how its gradients are formed."""

    kind: str
    name: str
    make: Callable[[], Loss]
    backward: Callable[[DistributedDataParallel, Loss, Parts], None]


def modes() -> list[Mode]:
    """Every mode that is compared."""
    clips = [Mode("clip", "clipscale", lambda: _call(clip_loss), whole)]
    clips.append(Mode("clip", f"clipscale optim.microbatches={MICROBATCHES}", lambda: _call(clip_loss), cached))
    for local in (False, True):
        for gather in (False, True):
            flags = " --local-loss" * local + " --gather-with-grad" * gather or ", no flags"
            clips.append(Mode("clip", f"open_clip{flags}", _clip_maker(local, gather), whole))
    name = f"open_clip --local-loss --gather-with-grad --accum-freq {MICROBATCHES}"
    clips.append(Mode("clip", name, _clip_maker(True, True), accumulated))
    sigmoids = [Mode("siglip", "clipscale", lambda: _call(siglip_loss), whole)]
    sigmoids.append(Mode("siglip", f"clipscale optim.microbatches={MICROBATCHES}", lambda: _call(siglip_loss), cached))
    for how in SIGLIP_MODES:
        sigmoids.append(Mode("siglip", f"open_clip --loss-dist-impl {how}", _siglip_maker(how), whole))
    name = f"open_clip --loss-dist-impl {SIGLIP_MODES[0]} --accum-freq {MICROBATCHES}"
    sigmoids.append(Mode("siglip", name, _siglip_maker(SIGLIP_MODES[0]), accumulated))
    return clips + sigmoids


def _call(loss: Callable[..., torch.Tensor]) -> Loss:
    def call(features: Features) -> torch.Tensor:
        bias = () if features.logit_bias is None else (features.logit_bias,)
        return loss(features.image, features.text, features.logit_scale, *bias)

    return call


def _clip_maker(local: bool, gather: bool) -> Callable[[], Loss]:
    def make() -> Loss:
        from open_clip.loss import ClipLoss

        return _call(ClipLoss(local, gather, rank=dist.get_rank(), world_size=dist.get_world_size()))

    return make


def _siglip_maker(how: str) -> Callable[[], Loss]:
    def make() -> Loss:
        from open_clip.loss import SigLipLoss

        return _call(SigLipLoss(rank=dist.get_rank(), world_size=dist.get_world_size(), dist_impl=how))

    return make


def whole(model: DistributedDataParallel, loss: Loss, parts: Parts) -> None:
    """This rank's pairs at once."""
    images, texts = zip(*parts, strict=True)
    loss(model(torch.cat(images), torch.cat(texts))).backward()


def cached(model: DistributedDataParallel, loss: Loss, parts: Parts) -> None:
    """In microbatches, as clipscale's trainer does."""

    def backward(features: Features) -> torch.Tensor:
        value = loss(features)
        value.backward()
        return value.detach()

    backward_through_parts(lambda i: model(*parts[i]), len(parts), backward, model.no_sync)


def accumulated(model: DistributedDataParallel, loss: Loss, parts: Parts) -> None:
    """In microbatches, as open_clip's train.py does: each goes backward from a loss of its own, in which the features
    of the others are constants, and DDP takes the mean over ranks every time."""
    with torch.no_grad():
        seen = [model(*part) for part in parts]
    for j, part in enumerate(parts):
        mine = model(*part)
        among = [*seen[:j], mine, *seen[j + 1 :]]
        image, text = torch.cat([one.image for one in among]), torch.cat([one.text for one in among])
        loss(mine._replace(image=image, text=text)).backward()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Float64[N, INPUTS] twice: the global batch, whose images and texts share half of their variance."""
    generator = torch.Generator().manual_seed(0)
    common, image, text = (torch.randn(PAIRS, INPUTS, generator=generator, dtype=torch.float64) for _ in range(3))
    return common + image, common + text


def dense(kind: str, features: Features) -> torch.Tensor:
    """The loss of a whole batch in one process, from its definition."""
    logits = features.logit_scale * features.image @ features.text.T
    if kind == "clip":
        target = torch.arange(len(logits))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * (logits + features.logit_bias)).sum() / len(logits)


def gradients(towers: Towers) -> tuple[torch.Tensor, float]:
    """The encoders' gradient in one vector, and that of the log temperature."""
    assert towers.image.grad is not None and towers.text.grad is not None and towers.logit_scale.grad is not None
    return torch.cat([towers.image.grad.flatten(), towers.text.grad.flatten()]), towers.logit_scale.grad.item()


def on_rank(number: int) -> dict:
    """What mode ``number`` of ``modes`` leaves on this rank, after DDP's mean, beside the truth."""
    mode, world = modes()[number], dist.get_world_size()
    towers, truth = Towers(mode.kind), Towers(mode.kind)
    shares = [whole.chunk(world)[dist.get_rank()].chunk(MICROBATCHES) for whole in batch()]
    mode.backward(DistributedDataParallel(towers), mode.make(), list(zip(*shares, strict=True)))
    dense(mode.kind, truth(*batch())).backward()
    (mine, my_scale), (right, right_scale) = gradients(towers), gradients(truth)
    return {
        "loss": mode.kind,
        "mode": mode.name,
        "ranks": world,
        "cosine": F.cosine_similarity(mine, right, dim=0).item(),
        "norm_ratio": (mine.norm() / right.norm()).item(),
        "scale_ratio": my_scale / right_scale,
    }


def show(rows: list[dict]) -> None:
    """Print the table: a line per mode, three figures per number of ranks."""
    worlds = sorted({row["ranks"] for row in rows})
    heads = [f"{world} rank{'s' * (world > 1)}" for world in worlds]
    print(f"open_clip {version('open_clip_torch')}, torch {torch.__version__}, {PAIRS} pairs in the global batch")
    print("cosine and norm of the encoders'".ljust(65) + "".join(f"{head:<25}" for head in heads))
    print("gradient; the log temperature's".ljust(65) + "cosine   norm   temp.    " * len(worlds))
    for name in dict.fromkeys((row["loss"], row["mode"]) for row in rows):
        mine = {row["ranks"]: row for row in rows if (row["loss"], row["mode"]) == name}
        figures = [mine[world] for world in worlds]
        print(
            f"{name[0]:<7}{name[1]:<58}"
            + "".join(f"{row['cosine']:.4f} {row['norm_ratio']:7.4f} {row['scale_ratio']:6.3f}   " for row in figures)
        )


def _serve(rank: int, world: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    rows = [on_rank(number) for number in range(len(modes()))]
    if not rank:
        Path(out).write_text(json.dumps(rows))
    dist.destroy_process_group()


def measure(world: int) -> list[dict]:
    """A row per mode, from ``world`` processes."""
    with tempfile.TemporaryDirectory() as place:
        out = f"{place}/rows.json"
        torch.multiprocessing.spawn(_serve, (world, f"{place}/store", out), nprocs=world)
        return json.loads(Path(out).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4], help="ranks")
    parser.add_argument("--json", type=Path, help="where all figures go")
    options = parser.parse_args()
    rows = [row for world in options.worlds for row in measure(world)]
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
