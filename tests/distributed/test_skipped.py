"""A step whose loss or gradient is not finite leaves every bit where it was, on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from clipscale.config import compose
from clipscale.distributed.collectives import rank, whole, world_size
from clipscale.models import Features
from clipscale.trainer.step import TrainStep
from tests.distributed.test_parallel import B, build, make_batch, small
from tests.pool import Pool


def state(step: TrainStep) -> dict[str, torch.Tensor]:
    """Copies of all that a step moves."""
    assert step.ema is not None
    found = dict(step.model.state_dict())
    found |= {f"ema/{name}": tensor for name, tensor in step.ema.state_dict().items()}
    moments = step.optimizer.state
    for i, parameter in enumerate(step.model.parameters()):
        found |= {f"optim/{i}/{name}": tensor for name, tensor in moments[parameter].items()}
    return {name: whole(tensor.detach()).clone() for name, tensor in found.items()}


class Poisoned:
    """Inside, the towers of one rank give images that are no numbers."""

    def __init__(self, step: TrainStep) -> None:
        self._step, self._features = step, step._features

    def __enter__(self) -> None:
        def features(*arguments: Any) -> Features:
            found = self._features(*arguments)
            return found._replace(image=found.image * float("nan")) if rank() == world_size() - 1 else found

        self._step._features = features  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        self._step._features = self._features  # type: ignore[method-assign]


def one(step: TrainStep, number: int) -> torch.Tensor:
    n = B // world_size()
    step.zero_grad()
    return step(make_batch(number, slice(rank() * n, (rank() + 1) * n)), number * B, 1e-3)


def skip_one(strategy: str, precision: str, model: str, options: list[str]) -> list[str]:
    """Names of what a bad step between two good ones moved; and of what the good one behind it did not move."""
    config, _ = compose([f"parallel={strategy}", f"precision={precision}", *options])
    config.model = small(model)
    step = build(config)
    step.model.train()
    one(step, 0)
    before = state(step)
    with Poisoned(step):
        loss = one(step, 1)
    assert step.verdict is not None and not torch.isfinite(loss)
    assert (step.verdict.skipped.item(), step.verdict.bad.item(), step.verdict.loss.item()) == (1, 1, float("inf"))
    between = state(step)
    moved = [name for name in before if not torch.equal(before[name], between[name])]
    one(step, 2)
    after = state(step)
    assert step.verdict.skipped.item() == 0
    weights = [name for name, _ in step.model.named_parameters()]
    return moved + [f"not {name}" for name in weights if torch.equal(between[name], after[name])]


CASES = [("ddp", "fp32", "vit"), ("fsdp", "fp32", "vit"), ("fsdp", "amp_bf16", "vit"), ("ddp", "fp32", "resnet10t")]


@pytest.mark.parametrize(("strategy", "precision", "model"), CASES)
def test_a_bad_step_moves_nothing(pool2: Pool, strategy: str, precision: str, model: str) -> None:
    assert pool2.run(skip_one, strategy, precision, model, []) == [[], []]


@pytest.mark.parametrize("options", [["precision=amp_fp16"], ["optim.clip_grad_norm=1.0", "optim.microbatches=4"]])
def test_a_bad_step_moves_nothing_alone(options: list[str]) -> None:
    assert skip_one("ddp", "fp32", "vit", options) == []


@pytest.fixture
def overflowing() -> Iterator[TrainStep]:
    config, _ = compose(["precision=amp_fp16"])
    config.model = small("vit")
    yield build(config, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=10_000))


def test_fp16s_search_for_its_scale_is_not_divergence(overflowing: TrainStep) -> None:
    step = overflowing
    one(step, 0)
    before = state(step)
    assert step.verdict is not None and step.verdict.skipped.item() == 1 and step.verdict.bad.item() == 0
    for number in range(1, 50):
        one(step, number)
        if not step.verdict.skipped.item():
            break
        assert all(torch.equal(before[name], value) for name, value in state(step).items())
    assert any(not torch.equal(before[name], value) for name, value in state(step).items()), "it never found its scale"
