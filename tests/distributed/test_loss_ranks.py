"""What only several ranks can get wrong: sizes that differ, groups, what is sent, one rank's numbers out of range."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from clipscale.distributed.collectives import ALONE
from clipscale.losses import Teacher, clip_loss, distill_loss, siglip_loss
from tests.dense import Case, dense, error, gradients, leaves, make, truth
from tests.distributed.test_losses import check, errors, on_rank, ours, place, run

KINDS = ["clip", "siglip", "distill"]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_few_pairs_and_many(pools: Any, world: int) -> None:
    """One pair, one pair a rank, and far more pairs than dimensions."""
    cases = [
        Case(loss, dtype, geometry, pairs=pairs, dim=dim, extra=extra, smoothing=0.0 if loss == "siglip" else smoothing)
        for loss in KINDS
        for dtype in ("float64", "float32")
        for geometry in ("random", "opposed")
        for pairs, dim, extra, smoothing in ((world, 16, 0, 0.0), (world, 3, 2 * world, 0.2), (32 * world, 2, 0, 0.0))
    ]
    for case, *ranks in zip(cases, *run(pools, world, on_rank, cases), strict=True):
        check(case, ranks)


@pytest.mark.parametrize("loss", KINDS)
def test_one_rank_out_of_range_takes_all_along(pool2: Any, loss: str) -> None:
    """Rank 0's images are far from all texts but their scale is the others' too."""
    case = Case(loss, "float32", scale=100.0, seed=5)
    ranks = pool2.run(_half_opposed, case)
    assert {result["route"] for result in ranks} == {torch.float32 if loss == "siglip" else torch.float64}
    given = leaves(case, _half(case), torch.float64)
    exact = gradients(case, dense(case, _half(case), given), given)
    assert max(errors(case, exact, ranks).values()) < 1e-5


def _half(case: Case) -> Any:
    near, far = make(replace(case, geometry="clustered")), make(replace(case, geometry="opposed"))
    near.image = torch.cat([far.image[: case.pairs // 2], near.image[case.pairs // 2 :]])
    near.text = -far.text
    near.image[: case.pairs // 2].neg_()
    near.text.neg_()
    near.image.neg_()
    return near


def _half_opposed(case: Case) -> dict[str, Any]:
    data = _half(case).part(*place())
    given = leaves(replace(case, extra=0), data, torch.float32)
    loss = ours(case, data, given)
    route = loss.grad_fn.saved_tensors[0].dtype
    return gradients(case, loss, given) | {"route": route}


@pytest.mark.parametrize("loss", KINDS)
@pytest.mark.parametrize("world", [2, 4])
def test_what_is_sent_in_bfloat16(pools: Any, world: int, loss: str) -> None:
    """Texts are rounded once; their gradients by each rank before, and at each step of, the sum over ranks."""
    case = Case(loss, "float32", extra=4, tile=(5, 7))
    (ranks,) = zip(*run(pools, world, on_rank, [case], {"comm_dtype": torch.bfloat16}), strict=True)
    data = make(case)
    data.text, data.extra = data.text.bfloat16().float(), data.extra.bfloat16().float()
    found = errors(case, truth(case, data), list(ranks))
    sent = {name: found.pop(name) for name in ("text", "extra")}
    assert max(found.values()) < 1e-5, found
    assert 1e-4 < max(sent.values()) < world * 2**-8, sent
    for name, value in errors(case, truth(case, make(case)), list(ranks)).items():
        assert value < 0.01, (name, value)


def _in_groups(case: Case) -> dict[str, Any]:
    """Ranks 0 and 2 have one global batch, 1 and 3 another."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    rank = dist.get_rank()
    data = make(replace(case, seed=rank % 2)).part(rank // 2, 2)
    given = leaves(replace(case, extra=0), data, case.torch_dtype)
    result = gradients(case, ours(case, data, given, group=groups[rank % 2]), given)
    alone = ours(case, data, leaves(case, data, case.torch_dtype), group=ALONE).detach()
    for group in groups:
        dist.destroy_process_group(group) if group is not dist.GroupMember.NON_GROUP_MEMBER else None
    return result | {"alone": alone}


@pytest.mark.parametrize("loss", KINDS)
def test_the_global_batch_of_a_group(pool4: Any, loss: str) -> None:
    case = Case(loss, extra=4, ids="both", tile=(5, 7))
    ranks = pool4.run(_in_groups, case)
    for number in range(2):
        mine = replace(case, seed=number)
        found = errors(mine, truth(mine, make(mine)), ranks[number::2])
        assert max(found.values()) < 1e-10
    for rank, result in enumerate(ranks):
        part = make(replace(case, seed=rank % 2)).part(rank // 2, 2)
        single = replace(case, pairs=case.pairs // 2, extra=case.extra // 2)
        assert error(result["alone"], dense(single, part, leaves(single, part, torch.float64)).detach()) < 1e-10


UNEQUAL: dict[str, Callable[[int], dict[str, Any]]] = {
    "pairs": lambda rank: {"image": torch.randn(3 + rank, 4), "text": torch.randn(3 + rank, 4)},
    "dimensions": lambda rank: {"image": torch.randn(3, 4 + rank), "text": torch.randn(3, 4 + rank)},
    "extra texts": lambda rank: {"extra_text": torch.randn(1 + rank, 4)},
    "no extra texts": lambda rank: {"extra_text": torch.randn(2, 4) if rank else None},
    "image ids": lambda rank: {"pair_ids": (torch.arange(3) if rank else None, torch.arange(3))},
    "text ids": lambda rank: {"pair_ids": (None, torch.arange(3)) if rank else None},
    "dtypes": lambda rank: {"image": torch.randn(3, 4, dtype=torch.float64 if rank else torch.float32)},
    "no pairs": lambda rank: {"image": torch.randn(0, 4), "text": torch.randn(0, 4)} if rank == 2 else {},
    "wrong ids": lambda rank: {"pair_ids": (None, torch.arange(3 + (rank == 1)))},
}
OPTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "smoothing": lambda rank: {"label_smoothing": 0.1 * rank},
    "teachers": lambda rank: {"teachers": [Teacher(torch.randn(3, 4), torch.randn(3, 4), 1.0)] * (1 + rank)},
}


def _refusal(loss: str, name: str) -> str:
    rank = dist.get_rank()
    given = {"image": torch.randn(3, 4), "text": torch.randn(3, 4), "logit_scale": 1.0} | (UNEQUAL | OPTIONS)[name](
        rank
    )
    if loss == "siglip":
        given["logit_bias"] = 0.0
    elif loss == "distill" and "teachers" not in given:
        given["teachers"] = [Teacher(given["image"], given["text"], 1.0)]
    try:
        {"clip": clip_loss, "siglip": siglip_loss, "distill": distill_loss}[loss](**given)
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("loss", "name"),
    [*((loss, name) for loss in KINDS for name in UNEQUAL), *(("distill", name) for name in OPTIONS)],
)
def test_ranks_that_differ_are_told_so(pools: Any, loss: str, name: str) -> None:
    for message in pools[4].run(_refusal, loss, name):
        assert re.search(r"ranks bring different things: 0 .* 1 |image and text must both|pair_ids must be", message)
    # All of them left before the next collective: the same ranks can go on.
    case = Case(loss)
    (ranks,) = zip(*pools[4].run(on_rank, [case]), strict=True)
    check(case, list(ranks))


def _no_extra() -> bool:
    pair = torch.randn(2, 3, 4)
    return torch.equal(
        clip_loss(*pair, 1.0, extra_text=torch.zeros(0, 4) if dist.get_rank() else None), clip_loss(*pair, 1.0)
    )


def test_no_extra_texts_are_none(pool2: Any) -> None:
    assert pool2.run(_no_extra)


def _poisoned(loss: str, value: float, which: str) -> bool:
    case = Case(loss, "float32")
    data = make(case).part(*place())
    if dist.get_rank() == 1:
        getattr(data, which)[2, 1] = value
    return bool(ours(case, data, leaves(case, data, torch.float32)).isfinite())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("loss", KINDS)
def test_one_number_of_one_rank_shows_on_all(pools: Any, loss: str, value: float) -> None:
    for which in ("image", "text"):
        assert pools[4].run(_poisoned, loss, value, which) == [False] * 4


def _twice(case: Case) -> bool:
    """Two losses in one step, the first one's gradients taken twice."""
    data = make(case).part(*place())
    given = leaves(replace(case, extra=0), data, torch.float64)
    losses = [ours(replace(case, tile=tile), data, given) for tile in ("auto", (3, 5))]
    features = given["image"], given["text"]
    first = torch.autograd.grad(losses[0], features, retain_graph=True)
    second = torch.autograd.grad(losses[0], features)
    (losses[0].detach() + 2 * losses[1]).backward()
    same = all(map(torch.equal, first, second))
    return same and all(error(x.grad, 2 * y) < 1e-12 for x, y in zip(features, first, strict=True))


@pytest.mark.parametrize("loss", KINDS)
def test_gradients_twice(pool2: Any, loss: str) -> None:
    assert all(pool2.run(_twice, Case(loss)))


class Towers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (torch.nn.Linear(16, 8).double() for _ in range(2))
        self.scale = torch.nn.Parameter(torch.tensor([3.0]).double())

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return F.normalize(self.image(image), dim=-1), F.normalize(self.text(text), dim=-1), self.scale.exp()


def _distilled(case: Case) -> dict[str, torch.Tensor]:
    data = make(case).part(*place())
    model = Towers()
    module = DistributedDataParallel(model) if dist.is_initialized() else model
    teachers = [Teacher(*teacher) for teacher in data.teachers]
    distill_loss(*module(data.image, data.text), teachers, weight=case.weight).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("weight", [0.7, 1.0])
def test_distilled_parameters_under_ddp(pools: Any, weight: float) -> None:
    case = Case("distill", weight=weight)
    model, data = Towers(), make(case)
    names = ("image", "text", "scale")
    given = dict(zip(names, model(data.image, data.text), strict=True)) | {"extra": torch.zeros(0, 8).double()}
    dense(case, data, given).backward()
    for world in (2, 4):
        for result in pools[world].run(_distilled, case):
            for name, parameter in model.named_parameters():
                assert error(result[name], parameter.grad) < 1e-10, name


def _beside_open_clip(name: str) -> list[float]:
    """Errors of value and gradients against open_clip in the mode that is exact, with gradients through the gather."""
    from open_clip.loss import ClipLoss, SigLipLoss

    rank, world = place()
    case = Case(name, "float64")
    data = make(case).part(rank, world)
    mine, theirs = (leaves(replace(case, extra=0), data, torch.float64) for _ in range(2))
    ours(case, data, mine).backward()
    given = theirs["image"], theirs["text"], theirs["scale"].squeeze()
    if name == "clip":
        loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)(*given)
    else:
        loss = SigLipLoss(rank=rank, world_size=world)(*given, theirs["bias"].squeeze())
    loss.backward()
    value = loss.detach().clone()
    dist.all_reduce(value)
    found = [error(mine[key].grad, theirs[key].grad) for key in ("image", "text")]
    for key in ("scale", "bias")[: 1 + (name == "siglip")]:
        both = torch.stack([mine[key].grad, theirs[key].grad])
        dist.all_reduce(both)
        found.append(error(both[0], both[1]))
    return [*found, error(ours(case, data, mine).detach(), value / world)]


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_agrees_with_open_clip(pool2: Any, name: str) -> None:
    for found in pool2.run(_beside_open_clip, name):
        assert max(found) < 1e-10
