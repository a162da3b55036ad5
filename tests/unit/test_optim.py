"""Schedules, parameter groups, averages."""

from __future__ import annotations

import math
import re

import pytest
import torch

from clipscale.config import compose, validate
from clipscale.config.optim import Optim, Schedule, ScheduleName
from clipscale.errors import ConfigError
from clipscale.models import build_model
from clipscale.optim import Ema, build_optimizer, configure, learning_rate
from clipscale.parallel import heights


def test_cosine_equals_open_clips() -> None:
    from open_clip_train.scheduler import cosine_lr

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    theirs = cosine_lr(optimizer, 0.5, 10, 100)
    config = Schedule(name=ScheduleName.cosine, warmup_samples=10 * 32)
    for step in range(100):
        ours = learning_rate(config, 0.5, step * 32, (step + 1) * 32, 100 * 32)
        assert ours == pytest.approx(theirs(step)), step


def test_constant_and_wsd() -> None:
    constant = Schedule(name=ScheduleName.constant, warmup_samples=10)
    assert [learning_rate(constant, 2.0, s, s + 5, 100) for s in (0, 5, 10, 95)] == [1.0, 2.0, 2.0, 2.0]
    wsd = Schedule(name=ScheduleName.wsd, warmup_samples=0, decay_fraction=0.5, min_lr_ratio=0.1)
    assert learning_rate(wsd, 1.0, 50, 51, 100) == 1.0
    assert learning_rate(wsd, 1.0, 75, 76, 100) == pytest.approx(0.55)
    assert learning_rate(wsd, 1.0, 100, 101, 100) == pytest.approx(0.1)


def test_the_rate_does_not_depend_on_the_batch_size_after_the_warm_up() -> None:
    config = Schedule(name=ScheduleName.cosine, warmup_samples=64)
    assert learning_rate(config, 1.0, 512, 544, 1024) == learning_rate(config, 1.0, 512, 640, 1024)


def test_decay_groups_equal_open_clips() -> None:
    model = build_model("tiny")
    optimizer = build_optimizer(model, Optim(weight_decay=0.3))
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim < 2 or "norm" in name or "bias" in name or "cls_token" in name
        assert (id(parameter) not in decayed) == exempt, name


def test_layers_below_learn_more_slowly() -> None:
    model = build_model("tiny")
    config = Optim(lr=0.1, weight_decay=0.3, layer_decay=0.5)
    optimizer = build_optimizer(model, config, heights(model))
    place = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        group, block = place[id(parameter)], re.search(r"blocks\.(\d+)", name)
        layers = 4 if name.startswith("visual.") else 2
        if block:
            height = layers - int(block[1])
        elif ".norm." in name:
            height = 1  # with the last block
        else:
            height = 0 if re.search(r"temperature|\.proj\.weight$", name.replace("embed.proj", "")) else layers + 1
        assert group["lr"] == pytest.approx(0.1 * 0.5**height), name
        exempt = parameter.ndim < 2 or name.endswith("cls_token")
        assert group["weight_decay"] == (0.0 if exempt else 0.3), name
    configure(optimizer, Optim(lr=0.2, layer_decay=0.5))
    assert max(group["lr"] for group in optimizer.param_groups) == 0.2


@pytest.mark.parametrize("decay", [0.0, -1.0, 1.5])
def test_a_layer_decay_out_of_range_is_refused(decay: float) -> None:
    config, _ = compose([f"optim.layer_decay={decay}"])
    with pytest.raises(ConfigError, match=r"optim\.layer_decay"):
        validate(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lock.image=true", "lock.text=true"], "nothing is left to train"),
        (["lock.image=true"], "locks weights that nothing has trained"),
        (["lock.text_unlocked_groups=2"], "no effect without lock.text=true"),
        (["lock.image=true", "lock.image_unlocked_groups=-1"], "must be 0 or more"),
    ],
)
def test_locks_without_meaning_are_refused(overrides: list[str], message: str) -> None:
    config, _ = compose(overrides)
    with pytest.raises(ConfigError, match=message):
        validate(config)


def test_ema_moves_and_swaps() -> None:
    model = torch.nn.Linear(2, 2)
    ema = Ema(model, 0.75)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    ema.update(torch.zeros(()))
    with ema.applied():
        torch.testing.assert_close(model.weight.detach(), start + 0.25)
    torch.testing.assert_close(model.weight.detach(), start + 1)
    torch.testing.assert_close(ema.state_dict()["weight"], start + 0.25)


def test_temperature_starts_where_clip_does() -> None:
    assert math.exp(build_model("tiny").logit_scale.item()) == pytest.approx(1 / 0.07)
