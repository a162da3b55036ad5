"""What the kernels must equal torch's tiles in: a table, and what one case of it measures.

Run as a program, it is one of two ranks that go through the table in Triton's interpreter, which must be chosen before
triton is imported: ``TRITON_INTERPRET=1 python -m tests.kernels RANK STORE ANSWER``. Cases of one process are shared
out between the ranks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from clipscale.distributed.collectives import ALONE
from clipscale.losses import Teacher, clip_loss, distill_loss, siglip_loss

WORLD = 2


@dataclass(frozen=True)
class Case:
    """A batch of n pairs a rank. ``geometry``: of no likeness, "trained" (a text lies by its image), "opposed" (all
    texts lie opposite to all images), "lonely" (one text does) or "long" (no unit vectors). ``ids``: lists of pair ids.
    ``bound``: on how far kernels and tiles may be from each other, relatively, in fp32.
    """

    n: int
    dimensions: int
    loss: str = "clip"
    scale: float = 14.3
    dtype: torch.dtype = torch.float32
    geometry: str = "random"
    tile: Any = "auto"
    ids: int = 0
    extra: int = 0
    comm_dtype: torch.dtype | None = None
    needs: tuple[str, ...] = ("image", "text", "scale", "bias", "extra")
    world: int = 1
    bound: float = 1e-5


# Where all images, and all texts, are nearly the same, the scale's gradient cancels. Tiles in fp32 lose as many digits
# there (1e-4 of it at a scale of 20); only those that went to float64 altogether do not.
CANCELS = 1e-4

CASES = {
    "one pair": Case(1, 8, tile=7),
    "edges": Case(131, 24, tile=(50, 60)),
    "a block and a bit": Case(129, 33),
    "many blocks": Case(1100, 8, tile=2000),
    "many dimensions": Case(33, 1152, scale=50),
    "many tiles": Case(40, 96, tile=(13, 9), scale=100, geometry="trained"),
    "trained": Case(140, 64, scale=100, geometry="trained"),
    "opposed": Case(150, 17, scale=100, geometry="opposed", tile=(64, 96), bound=CANCELS),
    "opposed, hidden": Case(90, 16, scale=100, geometry="opposed", ids=2, extra=5, bound=CANCELS),
    "opposed bf16": Case(66, 32, scale=100, geometry="opposed", dtype=torch.bfloat16, bound=CANCELS),
    "lonely": Case(70, 32, scale=100, geometry="lonely", tile=(64, 48)),
    "long": Case(70, 20, scale=100, geometry="long", tile=(64, 48)),
    "ids of images": Case(75, 32, ids=1, tile=(40, 40)),
    "ids of both": Case(75, 32, ids=2, scale=40),
    "extra texts": Case(45, 32, extra=40, tile=(32, 30)),
    "extra texts and ids": Case(45, 32, extra=13, ids=2),
    "locked images": Case(50, 16, needs=("text", "scale")),
    "locked texts": Case(50, 16, needs=("image",)),
    "scale alone": Case(50, 16, needs=("scale",)),
    "bf16": Case(72, 40, dtype=torch.bfloat16, scale=30, ids=1, extra=3),
    "fp16": Case(72, 40, dtype=torch.float16, scale=30, ids=1, extra=3),
    "sigmoid": Case(131, 24, "siglip", tile=(50, 60)),
    "sigmoid, many blocks": Case(1100, 8, "siglip", tile=2000),
    "sigmoid, trained": Case(60, 96, "siglip", scale=100, geometry="trained"),
    "sigmoid, extra texts and ids": Case(45, 32, "siglip", extra=13, ids=2),
    "sigmoid, locked images": Case(50, 16, "siglip", needs=("text", "bias")),
    "sigmoid, bf16": Case(72, 40, "siglip", dtype=torch.bfloat16, ids=1, extra=3),
    "ranks": Case(37, 24, tile=(30, 41), world=WORLD),
    "ranks, hidden": Case(37, 24, ids=2, extra=6, world=WORLD),
    "ranks, opposed": Case(70, 16, scale=100, geometry="opposed", world=WORLD, bound=CANCELS),
    "ranks, sent as bf16": Case(37, 24, comm_dtype=torch.bfloat16, world=WORLD),
    "ranks, sigmoid": Case(37, 24, "siglip", ids=1, extra=6, world=WORLD),
}


def inputs(case: Case, rank: int = 0) -> dict[str, torch.Tensor]:
    """Float64 features, with rows of zeros among the extra texts; pair ids of which some are equal."""
    generator = torch.Generator().manual_seed(1000 * rank + case.n)

    def draw(length: int) -> torch.Tensor:
        return F.normalize(torch.randn(length, case.dimensions, generator=generator, dtype=torch.float64), dim=-1)

    image, text, extra = draw(case.n), draw(case.n), draw(case.extra)
    if case.geometry == "trained":
        text = F.normalize(image + 0.3 * text, dim=-1)
    if case.geometry == "opposed":
        axis = F.one_hot(torch.tensor(0), case.dimensions)
        image, text, extra = (
            F.normalize(0.1 * image + axis, dim=-1),
            F.normalize(0.1 * text - axis, dim=-1),
            extra - axis,
        )
    if case.geometry == "long":
        image, text = 3 * image, 2 * text
    if case.geometry == "lonely":
        axis = F.one_hot(torch.tensor(0), case.dimensions)
        image, text = F.normalize(0.3 * image + axis, dim=-1), F.normalize(0.3 * text + axis, dim=-1)
        text[case.n // 2] *= -1
    extra[::3] = 0
    ids = torch.randint(0, case.n, (case.n, 2), generator=generator).T  # not one after the other in memory
    return {"image": image, "text": text, "extra": extra, "ids": ids}


def outcome(case: Case, backend: Any, dtype: torch.dtype, device: str, rank: int) -> dict[str, torch.Tensor]:
    """The loss and the gradients, of features rounded to the case's type and given as ``dtype``."""
    given = inputs(case, rank)
    leaves = {key: given[key].to(case.dtype).to(device, dtype) for key in ("image", "text", "extra")}
    leaves |= {
        "scale": torch.tensor([case.scale], dtype=torch.float32, device=device),
        "bias": torch.tensor([-5.0], device=device),
    }
    for key, leaf in leaves.items():
        leaf.requires_grad_(key in case.needs)
    first, second = (ids.to(device) for ids in given["ids"])
    options = dict(
        group=ALONE if case.world == 1 else None,
        pair_ids=[None, (first, None), (first, second)][case.ids],
        extra_text=leaves["extra"] if case.extra else None,
        tile=case.tile, comm_dtype=case.comm_dtype, backend=backend,
    )  # fmt: skip
    features = leaves["image"], leaves["text"], leaves["scale"]
    loss = clip_loss(*features, **options) if case.loss == "clip" else siglip_loss(*features, leaves["bias"], **options)
    (2 * loss).backward()
    grads = {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None and leaf.numel()}
    return {"loss": loss.detach(), **grads}


def measure(case: Case, device: str = "cpu", rank: int = 0) -> dict[str, dict[str, float]]:
    """For the loss and each gradient: how far kernels and tiles are from each other, and each from float64, relative
    to the largest."""
    kernels, tiles = (outcome(case, backend, case.dtype, device, rank) for backend in ("triton", "torch"))
    truth = outcome(replace(case, comm_dtype=None), "torch", torch.float64, device, rank)
    assert kernels.keys() == tiles.keys() == truth.keys()

    def distance(one: torch.Tensor, other: torch.Tensor, size: torch.Tensor) -> float:
        return float((one.double() - other.double()).norm() / size.double().norm().clamp(min=1e-30))

    return {
        key: {
            "apart": distance(kernels[key], tiles[key], truth[key]),
            "kernels": distance(kernels[key], truth[key], truth[key]),
            "tiles": distance(tiles[key], truth[key], truth[key]),
        }
        for key in truth
    }


def too_far(case: Case, errors: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """What of :func:`measure` is not as near as it must be. Of halves, kernels may be at most twice as wrong as tiles:
    both round to them, each its own way."""
    halves = case.dtype is not torch.float32 or case.comm_dtype is not None
    return {
        key: found
        for key, found in errors.items()
        if not (found["kernels"] - 2 * found["tiles"] if halves else found["apart"]) <= case.bound  # NaN is too far
    }


def _others() -> dict[str, Callable[[Any], torch.Tensor]]:
    """Losses for which there are no kernels, by what they have that others have not."""
    given = {key: value.float() for key, value in inputs(Case(30, 16)).items()}
    pair = given["image"], given["text"]
    double, teacher = [tensor.double() for tensor in pair], Teacher(*pair[::-1], 9.0)
    return {
        "teachers": lambda backend: distill_loss(*pair, 20.0, [teacher], group=ALONE, backend=backend),
        "smoothing": lambda backend: clip_loss(*pair, 20.0, label_smoothing=0.1, group=ALONE, backend=backend),
        "statistics": lambda backend: clip_loss(*pair, 20.0, stats=True, group=ALONE, backend=backend)[0],
        "statistics, sigmoid": lambda backend: siglip_loss(
            *pair, 20.0, -5.0, stats=True, group=ALONE, backend=backend
        )[0],
        "float64": lambda backend: clip_loss(*double, 20.0, group=ALONE, backend=backend),
    }  # fmt: skip


def main(rank: int, store: str, answer: str) -> None:
    """Measure this rank's share of the table."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    cases = [(name, case) for i, (name, case) in enumerate(CASES.items()) if case.world == WORLD or i % WORLD == rank]
    found: dict[str, Any] = {name: measure(case, rank=rank) for name, case in cases}
    found["not as tiles"] = [name for name, loss in _others().items() if not torch.equal(loss("triton"), loss("torch"))]
    Path(answer).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
