"""What the losses promise in one process: invariances, the reach of their arithmetic, and refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from clipscale.losses import Teacher, clip_loss, distill_loss, siglip_loss
from tests.dense import Case, Data, dense, error, leaves, make, truth, unit
from tests.distributed.test_losses import errors, on_rank

KINDS = ["clip", "siglip", "distill"]
Loss = Any


def loss_of(name: str, **options: Any) -> Loss:
    """``loss(image, text, scale, bias)`` with options; two teachers of other dimensions in distillation."""

    def call(image: torch.Tensor, text: torch.Tensor, scale: Any = 20.0, bias: Any = -5.0, **more: Any) -> Any:
        if name == "clip":
            return clip_loss(image, text, scale, **options, **more)
        if name == "siglip":
            return siglip_loss(image, text, scale, bias, **options, **more)
        g = torch.Generator().manual_seed(9)
        teachers = [Teacher(unit(len(image), d, generator=g), unit(len(image), d, generator=g), 25.0) for d in (5, 9)]
        return distill_loss(image, text, scale, teachers, weight=0.7, **options, **more)

    return call


def features(n: int = 24, d: int = 16, dtype: torch.dtype = torch.float64, grad: bool = True) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return [unit(n, d, generator=g).to(dtype).requires_grad_(grad) for _ in range(2)]


def grads(loss: Loss, image: torch.Tensor, text: torch.Tensor, scale: float = 20.0, bias: float = -5.0) -> list[Any]:
    """Value and gradients by image, text, scale and bias."""
    leaves = [x.detach().clone().requires_grad_() for x in (image, text)]
    leaves += [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (scale, bias)]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves, allow_unused=True)]


def close(one: list[Any], other: list[Any], bound: float = 1e-12) -> None:
    for mine, theirs in zip(one, other, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or error(mine, theirs) <= bound


REACH = [
    # geometry, norm of the features, scale, whether fp32 has the range
    ("random", 1.0, 1000.0, False),
    ("correlated", 1.0, 150.0, True),
    ("opposed", 1.0, 1000.0, False),
    ("correlated", 1.0, 100.0, True),
    ("opposed", 1.0, 100.0, False),
    ("opposed", 3.0, 20.0, False),
    ("opposed", 3.0, 100.0, False),
    ("random", 3.0, 100.0, False),
    ("random", 3.0, 3.0, True),
    ("correlated", 3.0, 12.0, False),
    ("random", 0.1, 20.0, True),
    ("random", 1.0, -30.0, True),
    ("random", 1.0, 0.0, True),
]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("loss", KINDS)
@pytest.mark.parametrize(("geometry", "norm", "scale", "narrow"), REACH)
def test_any_scale_and_norm(geometry: str, norm: float, scale: float, narrow: bool, loss: str, dtype: str) -> None:
    case = Case(loss, dtype, geometry, norm=norm, scale=scale or 1e-30, tile=(7, 9))
    (found,), exact = on_rank([case]), truth(case, make(case))
    for name, value in errors(case, exact, [found]).items():
        assert value <= (1e-10 if dtype == "float64" else 2e-5), (name, value)
    if loss == "clip" and dtype == "float32":
        assert (found["route"] is torch.float32) == narrow


@pytest.mark.parametrize("loss", ["clip", "distill"])
def test_beyond_all_range_is_nan_and_not_a_number_that_is_wrong(loss: str) -> None:
    """Rows of +2000 and of -2000: no one shift holds both."""
    image, text = features(4, 4)
    with torch.no_grad():
        image[2:], text[:] = -image[:1], image[:1]
        image[:2] = text[:2]
    assert loss_of(loss)(image, text, 2000.0).isnan()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("loss", KINDS)
def test_features_that_are_not_finite_show(loss: str, bad: float) -> None:
    for place in range(2):
        pair = features(grad=False)
        pair[place][5, 3] = bad
        assert not loss_of(loss)(*pair).isfinite()
    assert not loss_of(loss)(*features(), torch.tensor(bad)).isfinite()


def test_labels_and_teachers_share_the_target() -> None:
    """(1 - weight) of the loss that smoothed labels give, and weight of the teachers', also where both are much."""
    case = Case("distill", ids="both", smoothing=0.8, weight=0.6, extra=12, tile=(5, 7))
    data = make(case)
    options = {"pair_ids": (data.image_ids, data.text_ids), "extra_text": data.extra, "label_smoothing": 0.8}
    teachers = [Teacher(*teacher) for teacher in data.teachers]
    parts = [distill_loss(data.image, data.text, 20.0, teachers, weight=w, **options) for w in (0.0, 0.6, 1.0)]
    torch.testing.assert_close(parts[1], 0.4 * parts[0] + 0.6 * parts[2])
    torch.testing.assert_close(parts[0], clip_loss(data.image, data.text, 20.0, **options))


def test_teachers_keep_the_digits_they_have() -> None:
    """Students in bfloat16 may have teachers in fp32."""
    case = Case("distill", "bfloat16", weight=1.0)
    data = make(case)
    fine = replace(case, dtype="float64")
    exact = Data(data.image, data.text, data.extra, None, None, make(fine).teachers)
    teachers = [Teacher(image.float(), text.float(), scale) for image, text, scale in exact.teachers]
    loss = distill_loss(data.image, data.text, 20.0, teachers)
    assert error(loss, dense(case, exact, leaves(case, exact, torch.float64)).detach()) < 1e-5


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tile": 0}, "tile=0"),
    ({"tile": (4, -1)}, "tile="),
    ({"tile": "large"}, "tile="),
    ({"cache_mb": -1}, "cache_mb"),
    ({"cache_mb": math.nan}, "cache_mb"),
    ({"label_smoothing": 1.1}, "label_smoothing"),
    ({"label_smoothing": -0.1}, "label_smoothing"),
    ({"label_smoothing": math.nan}, "label_smoothing"),
    ({"weight": 1.5}, "weight"),
    ({"weight": -0.5}, "weight"),
    ({"pair_ids": (torch.arange(23), None)}, "pair_ids"),
    ({"pair_ids": (torch.arange(24).int(), None)}, "pair_ids"),
    ({"pair_ids": (None, torch.arange(24.0))}, "pair_ids"),
    ({"pair_ids": (torch.arange(24),)}, "pair_ids"),
    ({"pair_ids": torch.arange(24)}, "pair_ids"),
    ({"extra_text": torch.zeros(3, 15)}, "extra_text"),
    ({"extra_text": torch.zeros(16)}, "extra_text"),
    ({"extra_text": torch.zeros(3, 16).int()}, "extra_text"),
    ({"image": torch.zeros(24, 16).int()}, "image"),
    ({"text": torch.zeros(24, 16, dtype=torch.bool)}, "text"),
    ({"image": torch.zeros(23, 16)}, r"Float\[n, D\]"),
    ({"image": torch.zeros(24, 4, 4), "text": torch.zeros(24, 4, 4)}, r"Float\[n, D\]"),
    ({"image": torch.zeros(0, 16), "text": torch.zeros(0, 16)}, r"Float\[n, D\]"),
    ({"logit_scale": torch.ones(2)}, "logit_scale"),
    ({"teachers": []}, "teacher"),
    ({"teachers": [Teacher(torch.zeros(23, 5), torch.zeros(23, 5), 1.0)]}, "teacher"),
    ({"teachers": [Teacher(torch.zeros(24, 5), torch.zeros(24, 6), 1.0)]}, "teacher"),
    ({"teachers": [Teacher(torch.zeros(24, 5).int(), torch.zeros(24, 5).int(), 1.0)]}, "teacher"),
]


@pytest.mark.parametrize(("wrong", "match"), WRONG, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_mistakes_are_named(wrong: dict[str, Any], match: str) -> None:
    image, text = features(dtype=torch.float32)
    given = {"image": image, "text": text, "logit_scale": 20.0, **wrong}
    teachers = [Teacher(image, text, 20.0)]
    if not wrong.keys() & {"weight", "teachers"}:
        with pytest.raises(ValueError, match=match):
            clip_loss(**given)
    if not wrong.keys() & {"weight", "teachers", "label_smoothing", "cache_mb"}:
        with pytest.raises(ValueError, match=match):
            siglip_loss(**given, logit_bias=0.0)
    with pytest.raises(ValueError, match=match):
        distill_loss(**{"teachers": teachers} | given)
