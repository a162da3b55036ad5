"""The loss of many ranks is the loss of one, in value and in every gradient, whatever the numbers and the options."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist

from clipscale.losses import Teacher, clip_loss, distill_loss, siglip_loss
from tests.dense import Case, Data, error, gradients, leaves, magnitudes, make, truth, usual

LOSSES = [("clip", 0.0), ("siglip", 0.0), ("distill", 0.7), ("distill", 1.0)]
DTYPES = ["float64", "float32", "bfloat16"]
GEOMETRIES = ["random", "correlated", "opposed", "duplicates", "clustered"]
FEATURES = ("image", "text", "extra")
CHOICES: dict[str, list[Any]] = {
    "tile": ["auto", 1000, (5, 7), (2, 13)],
    "cache_mb": [0, 0.0004, 64],
    "ids": ["", "", "image", "text", "both"],
    "extra": [0, 0, 4, 12],
    "smoothing": [0.0, 0.0, 0.1, 1.0],
    "needs": [
        ("image", "text", "scale", "bias", "extra"),
        ("image", "text", "scale", "bias", "extra"),
        ("text", "scale", "bias"),
        ("image", "scale"),
        ("text",),
        ("extra",),
        ("scale",),
    ],
    "factor": [1.0, -3.0],
    "scale_as": ["[1]", "0-d", "float"],
    "norm": [1.0, 1.0, 1.0, 3.0],
    "pairs": [24, 24, 4, 8],
    "dim": [16, 16, 2],
}


def draw(loss: str, weight: float, dtype: str, geometry: str, seed: int) -> Case:
    """One case of a cell of the matrix; siglip has no smoothing, and a number has no gradient."""
    pick = random.Random(f"{loss} {weight} {dtype} {geometry} {seed}")
    case = Case(loss, dtype, geometry, weight=weight, seed=seed, **{k: pick.choice(v) for k, v in CHOICES.items()})
    if case.norm > 1:
        case = replace(case, scale=min(case.multiplier, 60))  # beyond, float64 has not the range for all rows
    if loss == "siglip":
        case = replace(case, smoothing=0.0, cache_mb=0)
    if not case.extra and case.needs == ("extra",):
        case = replace(case, needs=("image",))
    if loss != "siglip" or case.scale_as == "float":
        gone = {"bias"} | ({"scale"} if case.scale_as == "float" else set())
        case = replace(case, needs=tuple(n for n in case.needs if n not in gone) or ("image",))
    return case


def ours(case: Case, data: Data, given: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """The product's loss of a rank's part."""
    scale, bias = given["scale"], given["bias"]
    forms = {"float": case.multiplier, "0-d": scale.reshape(()), "[1]": scale}
    both = None if data.image_ids is None and data.text_ids is None else (data.image_ids, data.text_ids)
    options |= {"pair_ids": both, "extra_text": given["extra"] if case.extra else None, "tile": case.tile}
    features = given["image"], given["text"], forms[case.scale_as]
    if case.loss == "siglip":
        return siglip_loss(*features, case.bias if case.scale_as == "float" else bias, **options)
    options |= {"cache_mb": case.cache_mb, "label_smoothing": case.smoothing}
    if case.loss == "clip":
        return clip_loss(*features, **options)
    return distill_loss(*features, [Teacher(*teacher) for teacher in data.teachers], weight=case.weight, **options)


def place() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_rank(cases: list[Case], options: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Loss and gradients of every case, and in which dtype its backward pass counts."""
    found = []
    for case in cases:
        data = make(case).part(*place())
        given = leaves(replace(case, extra=0), data, case.torch_dtype)
        loss = ours(case, data, given, **(options or {}))
        route = loss.grad_fn.saved_tensors[0]
        found.append(gradients(case, loss, given) | {"route": None if route is None else route.dtype})
    return found


def run(pools: dict[int, Any], world: int, function: Any, *arguments: Any) -> list[Any]:
    """By rank; a world of one is this process, which has no process group."""
    return pools[world].run(function, *arguments) if world > 1 else [function(*arguments)]


def errors(case: Case, expected: dict[str, Any], ranks: list[dict[str, Any]]) -> dict[str, float]:
    """Relative errors of the value and of each gradient's mean over ranks."""
    values = [result["loss"] for result in ranks]
    assert all(torch.equal(value, values[0]) for value in values), f"ranks differ: {values} in {case}"
    found = {"loss": error(values[0], expected["loss"])}
    for name in (*FEATURES, "scale", "bias"):
        there = expected[name] is not None and expected[name].numel() > 0
        parts = [result[name] for result in ranks]
        assert all((part is not None) == there for part in parts), f"gradient of {name} in {case}"
        if there:
            doubles = [part.double() for part in parts]
            # Features belong to one rank each; the others bring zeros to the mean.
            whole = torch.cat(doubles) if name in FEATURES else torch.stack(doubles).sum(0)
            found[name] = error(whole / len(ranks), expected[name])
    return found


def check(case: Case, ranks: list[dict[str, Any]]) -> dict[str, float]:
    """Hold a case against the truth, and where the dtype limits it, against the dense loss of the same dtype too."""
    data = make(case)
    exact, peer = truth(case, data), usual(case, data)
    found, sizes = errors(case, exact, ranks), magnitudes(case, data)
    for name, value in found.items():
        if case.dtype != "float64" and exact[name].norm() < 1e-30:
            continue  # no number of fp32
        bound = 1e-10 if case.dtype == "float64" else 1e-5
        if case.dtype == "bfloat16" and name in FEATURES:
            bound = 2**-8  # the gradient is rounded to it
        elif case.dtype != "float64" and (case.geometry != "random" or case.norm > 1):
            bound = min(max(2 * error(peer[name], exact[name]), bound), 1e-4)
        if case.dtype != "float64" and name in sizes:
            bound *= max(sizes[name] / exact[name].norm().item(), 1)
        assert value <= bound, f"{name}: {value:.3g} above {bound:.3g} in {case} on {len(ranks)} ranks"
    return found


def cells(draws: int, start: int = 0) -> Iterator[Case]:
    for (loss, weight), dtype, geometry in product(LOSSES, DTYPES, GEOMETRIES):
        for seed in range(start, start + draws):
            yield draw(loss, weight, dtype, geometry, seed)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_equals_the_dense_loss(pools: Any, world: int) -> None:
    cases = list(cells(4, start=100 * world))
    for case, *ranks in zip(cases, *run(pools, world, on_rank, cases), strict=True):
        check(case, ranks)


def test_the_matrix_meets_what_it_is_for() -> None:
    """Of a fallback to float64, of every kind of ids and of locked towers there are some cases of each loss."""
    for loss, weight in LOSSES:
        cases = [case for world in (1, 2, 4) for case in cells(4, 100 * world)]
        mine = [case for case in cases if (case.loss, case.weight) == (loss, weight)]
        for key, values in CHOICES.items():
            missing = {str(v) for v in values} - {str(getattr(case, key)) for case in mine}
            allowed = {"smoothing", "cache_mb"} if loss == "siglip" else set()
            assert not missing or key in allowed | {"needs"}, (loss, key, missing)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_texts_on_the_far_side_are_counted_in_float64(pools: Any, world: int) -> None:
    cases = [Case(loss, dtype, "opposed") for loss in ("clip", "distill") for dtype in ("float32", "bfloat16")]
    near = [replace(case, geometry="correlated") for case in cases]
    for case, *ranks in zip(cases + near, *run(pools, world, on_rank, cases + near), strict=True):
        expected = torch.float64 if case.geometry == "opposed" else torch.float32
        assert [result["route"] for result in ranks] == [expected] * world, case
        check(case, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("start", range(0, 100, 10))
def test_many_more(pools: Any, world: int, start: int) -> None:
    cases = list(cells(10, start=10_000 * world + start))
    for first in range(0, len(cases), 60):
        part = cases[first : first + 60]
        for case, *ranks in zip(part, *run(pools, world, on_rank, part), strict=True):
            check(case, ranks)
