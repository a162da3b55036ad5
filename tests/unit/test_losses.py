"""What the losses promise in one process: invariances, the reach of their arithmetic, and refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from clipscale.losses import Teacher, clip_loss, distill_loss, siglip_loss
from tests.dense import Case, Data, dense, error, gradients, leaves, make, truth, unit
from tests.distributed.test_losses import errors, on_rank, ours

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


@pytest.mark.parametrize("loss", KINDS)
def test_the_order_of_the_pairs_does_not_matter(loss: str) -> None:
    image, text = features()
    order = torch.randperm(len(image), generator=torch.Generator().manual_seed(3))
    ids = torch.arange(len(image)) // 3
    if loss == "distill":  # its teachers stay where they are
        order = torch.arange(len(image))
    one = grads(loss_of(loss, pair_ids=(ids, None)), image, text)
    other = grads(loss_of(loss, pair_ids=(ids[order], None)), image[order], text[order])
    close([other[0], *other[1:3]], [one[0], one[1][order], one[2][order]])
    close(other[3:], one[3:])


def test_images_and_texts_are_alike_to_clip() -> None:
    image, text = features()
    one, other = (grads(loss_of("clip", label_smoothing=0.2), *pair) for pair in ((image, text), (text, image)))
    close([one[0], one[1], one[2], one[3]], [other[0], other[2], other[1], other[3]])


@pytest.mark.parametrize("loss", KINDS)
def test_tiles_and_memory_layout_do_not_matter(loss: str) -> None:
    image, text = features()
    whole = grads(loss_of(loss), image, text)
    for tile in (1, 5, (3, 24), (24, 1), (100, 7)):
        close(grads(loss_of(loss, tile=tile), image, text), whole)
    strided = image.detach().T.contiguous().T, text.detach().repeat(1, 2)[:, : text.shape[1]]
    close(grads(loss_of(loss), *strided), whole)
    assert all(map(torch.equal, grads(loss_of(loss), image, text)[:3], whole[:3])), "not the same bits twice"


@pytest.mark.parametrize("cache_mb", [0, 64])
@pytest.mark.parametrize("loss", KINDS)
def test_backward_twice_gives_the_same(loss: str, cache_mb: float) -> None:
    options = {} if loss == "siglip" else {"cache_mb": cache_mb}
    image, text = features(dtype=torch.float32)
    value = loss_of(loss, **options)(image, text)
    first = torch.autograd.grad(value, (image, text), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(value, (image, text))))


@pytest.mark.parametrize("loss", KINDS)
def test_a_second_derivative_is_refused(loss: str) -> None:
    """Also where autograd would take the first one for a constant: in a penalty on the gradient."""
    image, text = features()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss_of(loss)(image, text), image, create_graph=True)


@pytest.mark.parametrize("options", [{}, {"ids": "both", "extra": 3, "smoothing": 0.1, "tile": (2, 3)}], ids=str)
@pytest.mark.parametrize("loss", KINDS)
def test_finite_differences(loss: str, options: dict[str, Any]) -> None:
    case = Case(
        loss, pairs=5, dim=4, scale=5.0, **({k: v for k, v in options.items() if (loss, k) != ("siglip", "smoothing")})
    )
    data = make(case)
    data.extra = unit(case.extra, case.dim, generator=torch.Generator().manual_seed(4))  # absence has no derivative
    given = leaves(case, data, torch.float64)

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return ours(case, data, dict(zip(given, tensors, strict=True)))

    assert torch.autograd.gradcheck(call, tuple(given.values()))


class Towers(torch.nn.Module):
    def __init__(self, loss: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = torch.nn.Linear(16, 8), torch.nn.Linear(16, 8)
        self.scale = torch.nn.Parameter(torch.tensor([3.0]))
        self.loss = loss_of(loss)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        towers = (F.normalize(tower(x), dim=-1) for tower, x in ((self.image, image), (self.text, text)))
        return self.loss(*towers, self.scale.exp())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("loss", KINDS)
def test_a_compiled_model_may_end_in_it(loss: str, backend: str) -> None:
    inputs = features(dtype=torch.float32, grad=False)
    plain, compiled = Towers(loss), Towers(loss)
    expected, found = plain(*inputs), torch.compile(compiled, backend=backend)(*inputs)
    expected.backward()
    found.backward()
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", KINDS)
def test_autocast_changes_nothing(loss: str, dtype: torch.dtype) -> None:
    """Neither around the loss nor around its backward pass."""
    image, text = features(dtype=torch.float32)
    outside = grads(loss_of(loss), image, text, 50.0)
    with torch.autocast("cpu", dtype=dtype):
        inside = grads(loss_of(loss), image, text, 50.0)
    assert inside[0].dtype == torch.float32
    assert all(mine is theirs or torch.equal(mine, theirs) for mine, theirs in zip(inside, outside, strict=True))


@pytest.mark.parametrize("loss", KINDS)
def test_one_tensor_may_be_both(loss: str) -> None:
    case = Case(loss, needs=("image", "text"))
    data = make(case)
    data.text = data.image
    given = leaves(case, data, torch.float64)
    given["text"] = given["image"]
    expected = torch.autograd.grad(dense(case, data, given), given["image"])[0]
    found = torch.autograd.grad(ours(case, data, given), given["image"])[0]
    assert error(found, expected) < 1e-10


@pytest.mark.parametrize("loss", KINDS)
def test_features_changed_before_the_backward_pass_are_noticed(loss: str) -> None:
    image, text = features()
    expected = torch.autograd.grad(loss_of(loss)(image * 1, text), image)[0]
    features_of_a_tower = image * 1
    value = loss_of(loss)(features_of_a_tower, text)
    with torch.no_grad():
        features_of_a_tower.add_(1)
    if loss == "siglip":  # has formed its gradients already
        assert torch.equal(torch.autograd.grad(value, image)[0], expected)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


@pytest.mark.parametrize("loss", KINDS)
def test_without_gradients(loss: str) -> None:
    expected = loss_of(loss)(*features()).detach()
    with torch.no_grad():
        value = loss_of(loss)(*features())
    assert torch.equal(value, expected) and not value.requires_grad
    assert not loss_of(loss)(*features(grad=False)).requires_grad
    only_bias = torch.tensor(-5.0, requires_grad=True)
    assert loss_of(loss)(*features(grad=False), 20.0, only_bias).requires_grad == (loss == "siglip")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", KINDS)
def test_mixed_dtypes(loss: str, dtype: torch.dtype) -> None:
    """Each tensor gets a gradient of its own dtype; the loss is in fp32."""
    image, text = features()
    image, text = image.detach().to(dtype).requires_grad_(), text.detach().float().requires_grad_()
    scale = torch.tensor(20.0, dtype=dtype, requires_grad=True)
    value = loss_of(loss)(image, text, scale)
    value.backward()
    assert value.dtype == torch.float32
    assert (image.grad.dtype, text.grad.dtype, scale.grad.dtype) == (dtype, torch.float32, dtype)
    assert scale.grad.shape == ()
    exact = grads(loss_of(loss), image.double(), text.double())
    close([value.detach(), text.grad], [exact[0], exact[2]], 1e-5)
    close([image.grad, scale.grad], [exact[1], exact[3].squeeze()], 4e-3)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_agrees_with_open_clip(loss: str) -> None:
    from open_clip.loss import ClipLoss, SigLipLoss

    def theirs(image: Any, text: Any, scale: Any, bias: Any) -> torch.Tensor:
        scale, bias = scale.squeeze(), bias.squeeze()
        return ClipLoss()(image, text, scale) if loss == "clip" else SigLipLoss()(image, text, scale, bias)

    close(grads(loss_of(loss), *features()), grads(theirs, *features()), 1e-10)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("sign", "scale"), [(-1, 100.0), (-1, 1000.0), (1, 1000.0), (1, 0.0), (1, -40.0)])
def test_teachers_of_any_range(sign: int, scale: float, dtype: str) -> None:
    """Theirs is another than the student's; and no gradient goes to them."""
    case = Case("distill", dtype, ids="text", extra=6, tile=(5, 7))
    data = make(case)
    far = make(replace(case, geometry="opposed"))
    data.teachers = [(far.image, -sign * far.text, scale), data.teachers[0]]
    given, mine = leaves(case, data, torch.float64), leaves(case, data, case.torch_dtype)
    for image, text, _ in data.teachers:
        image.requires_grad_()
        text.requires_grad_()
    exact, found = (gradients(case, f(case, data, x), x) for f, x in ((detached, given), (ours, mine)))
    for name, value in errors(case, exact, [found]).items():
        assert value <= (1e-10 if dtype == "float64" else 1e-5), name
    assert all(x.grad is None for image, text, _ in data.teachers for x in (image, text))


def detached(case: Case, data: Data, given: dict[str, torch.Tensor]) -> torch.Tensor:
    teachers = [(image.detach(), text.detach(), scale) for image, text, scale in data.teachers]
    return dense(case, replace(data, teachers=teachers), given)


@pytest.mark.parametrize("loss", KINDS)
def test_settings_of_torch_change_nothing(loss: str) -> None:
    image, text = features(dtype=torch.float32)
    expected = grads(loss_of(loss), image, text)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.set_detect_anomaly(True):
            found = grads(loss_of(loss), image, text)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
    assert all(mine is theirs or torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    with torch.inference_mode():
        assert torch.equal(loss_of(loss)(image.detach().clone(), text.detach().clone()), expected[0])
