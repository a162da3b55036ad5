"""The numbers beside the loss are those of the global batch, and asking for them does not move the loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.dense import Case, hidden, leaves, make
from tests.distributed.test_losses import ours, place, run

NAMES = ["i2t_top1", "t2i_top1", "positive_logit", "negative_logit", "duplicate_fraction"]


def by_hand(case: Case) -> list[float]:
    """From all logits: an image is right if no other text stands above its own, and a text likewise."""
    data = make(case)
    given = leaves(case, data, torch.float64)
    n, hide = case.pairs, hidden(case, data)
    with torch.no_grad():
        logits = given["scale"] * given["image"] @ torch.cat([given["text"], given["extra"]]).T
        if case.loss == "siglip":
            logits = logits + given["bias"]
    own, open_ = logits.diagonal(), logits.masked_fill(hide, -torch.inf)
    slack = 1e-6 * abs(case.multiplier)  # equal logits may differ in their last digits
    image_right = (open_ <= own[:, None] + slack).all(1)
    text_right = (open_[:, :n] <= own + slack).all(0)
    beside = logits[:, :n][~torch.eye(n, dtype=torch.bool)]
    shares = []
    for ids in (data.image_ids, data.text_ids):
        if ids is not None:
            everyone = ids.tolist()
            shares.append(sum(everyone.count(one) > 1 for one in everyone) / n)
    return [
        image_right.double().mean().item(),
        text_right.double().mean().item(),
        own.mean().item(),
        beside.mean().item() if n > 1 else 0.0,
        max(shares) if shares else float("nan"),
    ]


def _stats(cases: list[Case]) -> list[tuple[list[float], bool, bool]]:
    found = []
    for case in cases:
        data = make(case).part(*place())
        results = []
        for stats in (False, True):
            given = leaves(replace(case, extra=0), data, case.torch_dtype)
            value = ours(case, data, given, stats=stats)
            loss = value[0] if stats else value
            loss.backward()
            results.append([loss.detach(), *(x.grad for x in given.values() if x.grad is not None)])
        assert not any(number.requires_grad for number in value[1])
        same = all(map(torch.equal, *results))
        found.append(([number.item() for number in value[1]], same, value[1]._fields == tuple(NAMES)))
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
def test_each_number_is_the_dense_one(pools: Any, world: int) -> None:
    cases = [
        Case(loss, dtype, geometry, ids=ids, extra=extra, pairs=pairs, tile=(5, 7), seed=seed, norm=norm)
        for loss in ("clip", "siglip", "distill")
        for dtype in ("float64", "float32", "bfloat16")
        for seed, (geometry, ids, extra, pairs, norm) in enumerate(
            [
                ("random", "", 0, 24, 1.0),
                ("random", "", 0, world, 1.0),
                ("duplicates", "", 0, 24, 1.0),  # equal texts tie, and neither surpasses the other
                ("duplicates", "image", 8, 24, 1.0),
                ("duplicates", "text", 0, 24, 1.0),
                ("duplicates", "both", 12, 24, 2.0),
                ("opposed", "", 4, 24, 1.0),
                ("correlated", "both", 0, 24, 1.0),
                ("clustered", "", 12, 24, 1.0),
            ]
        )
    ]
    cases = cases if world == 2 else cases[world % 3 :: 3]
    for case, *ranks in zip(cases, *run(pools, world, _stats, cases), strict=True):
        expected = by_hand(case)
        for numbers, same, named in ranks:
            assert same and named, case
            assert numbers == pytest.approx(expected, rel=1e-5, abs=1e-6 * case.multiplier, nan_ok=True), case
