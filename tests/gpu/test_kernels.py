"""Triton's kernels on a GPU. Written without one at hand: these have not run yet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from clipscale.losses import clip_loss, siglip_loss
from tests.kernels import CASES, Case, inputs, measure, outcome, too_far

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

# Where everything is nearly the same, weights that are rounded to halves leave less of the scale's gradient, which
# cancels, than those of tiles in float64 do: 0.05 of it was computed for such rounding.
CANCELS = 0.1
FAST = 3e-5  # fp32: of logits near 100, the fast exponential loses as much as their own rounding, 4e-6 each
ALONE = {name: case for name, case in CASES.items() if case.world == 1}
# Of several super-tiles, each of many blocks, and neither a whole number of them.
LARGE = {
    f"{loss}, {dtype}": Case(
        5001, 520, loss, scale=50, dtype=dtype, geometry="trained", tile=(2000, 3000), ids=1, extra=37
    )
    for loss in ("clip", "siglip")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}


@pytest.fixture(autouse=True)
def waiting_allowed() -> Iterator[None]:
    """Waiting for the device is no error in the next test."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALONE)
def test_equal_the_tiles(name: str, dtype: torch.dtype) -> None:
    case = replace(ALONE[name], dtype=dtype)
    if dtype is torch.float32:
        case = replace(case, bound=max(case.bound, FAST))
    elif case.geometry in ("opposed", "lonely", "long"):
        case = replace(case, bound=CANCELS)
    errors = measure(case, "cuda")
    assert errors and not too_far(case, errors)


@pytest.mark.parametrize("name", LARGE)
def test_large_batches_equal_the_tiles(name: str) -> None:
    assert not too_far(LARGE[name], measure(LARGE[name], "cuda"))


@pytest.mark.parametrize("name", LARGE)
def test_two_runs_are_equal(name: str) -> None:
    first, second = (outcome(LARGE[name], "triton", LARGE[name].dtype, "cuda", 0) for _ in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("geometry", ["trained", "opposed"])
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_nothing_waits_for_the_device(loss: str, geometry: str) -> None:
    given = inputs(Case(600, 64, loss, geometry=geometry, extra=20))
    image, text, extra = (given[key].to("cuda", torch.bfloat16).requires_grad_() for key in ("image", "text", "extra"))
    scale, bias = (torch.tensor([value], device="cuda", requires_grad=True) for value in (100.0, -5.0))
    ids = given["ids"].cuda()

    def step() -> None:
        options = dict(pair_ids=(ids[0], ids[1]), extra_text=extra, backend="triton")
        if loss == "clip":
            clip_loss(image, text, scale, **options).backward()
        else:
            siglip_loss(image, text, scale, bias, **options).backward()

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    step()
