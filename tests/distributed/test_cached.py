"""A step in microbatches has the gradient of the whole batch, whatever the layout, in fp64 to rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

from clipscale.config import compose
from clipscale.config.schema import Config
from clipscale.data.loader import Batch, step_seed
from clipscale.distributed.collectives import average, rank, whole, world_size
from clipscale.errors import ConfigError
from clipscale.losses import clip_loss
from clipscale.models import CLIP, build_model
from clipscale.trainer.step import TrainStep
from tests.distributed.test_parallel import B, build, make_batch, small

Gradients = dict[str, torch.Tensor]
STEPS = 3


def configured(overrides: list[str], tower: str = "vit") -> Config:
    config, _ = compose([f"global_batch_size={B}", *overrides])
    drops = {key: getattr(config.model.vision, key) for key in ("drop_path", "patch_dropout")}
    config.model = small(tower)
    config.model.vision = replace(config.model.vision, **drops)
    return config


def double(config: Config) -> CLIP:
    return build_model(config.model, logit_bias=config.loss.first_bias).double()


def my_batch(number: int) -> Batch:
    pairs = B // world_size()
    return make_batch(number, slice(rank() * pairs, (rank() + 1) * pairs))


def train(step: TrainStep) -> list[tuple[float, Gradients]]:
    """Loss and gradients of several steps: a reducer that is left in a bad state shows at the second one."""
    results = []
    for number in range(STEPS):
        step.zero_grad()
        loss = step(my_batch(number), number * B, 1e-3).item()
        results.append((loss, {n: whole(p.grad).clone() for n, p in step.model.named_parameters()}))
    return results


def trained(overrides: list[str]) -> list[tuple[float, Gradients]]:
    config = configured(overrides)
    return train(build(config, double(config)))


def worst(ours: Gradients, truth: Gradients) -> tuple[float, str]:
    """The largest relative error of a parameter's gradient; a vanishing one is held against the others' size."""
    scale = max(gradient.norm() for gradient in truth.values())
    errors = ((float((ours[n] - g).norm() / max(g.norm(), 1e-3 * scale)), n) for n, g in truth.items())
    return max(errors)


def assert_equal(ours: list[tuple[float, Gradients]], truth: list[tuple[float, Gradients]], bound: float) -> None:
    for number, ((loss, gradients), (true_loss, true_gradients)) in enumerate(zip(ours, truth, strict=True)):
        assert loss == pytest.approx(true_loss, rel=bound), f"step {number}"
        error, name = worst(gradients, true_gradients)
        assert error <= bound, f"step {number}: gradient of {name}: {error}"


LOSS = ["loss=clip", "loss=siglip"]


@pytest.fixture(scope="module")
def alone() -> dict[str, list[tuple[float, Gradients]]]:
    """One process on the whole batch at once."""
    return {loss: trained([loss]) for loss in LOSS}


@pytest.mark.parametrize("loss", LOSS)
@pytest.mark.parametrize("count", [2, 3, 4, 16])  # 3 does not divide 16
def test_one_process(alone: Any, loss: str, count: int) -> None:
    assert_equal(trained([loss, f"optim.microbatches={count}"]), alone[loss], 1e-12)


TABLE = [
    # world, layout, loss, microbatches of each rank
    pytest.param(2, "ddp", "loss=clip", 1, marks=pytest.mark.slow),
    pytest.param(2, "ddp", "loss=clip", 2, marks=pytest.mark.slow),
    (2, "ddp", "loss=clip", 3),
    (2, "ddp", "loss=clip", 4),
    (2, "ddp", "loss=siglip", 4),
    pytest.param(2, "fsdp", "loss=clip", 1, marks=pytest.mark.slow),
    pytest.param(2, "fsdp", "loss=clip", 2, marks=pytest.mark.slow),
    (2, "fsdp", "loss=clip", 4),
    (2, "fsdp", "loss=siglip", 4),
    (4, "ddp", "loss=clip", 4),
]


@pytest.mark.parametrize(("world", "layout", "loss", "count"), TABLE)
def test_ranks(pools: Any, alone: Any, world: int, layout: str, loss: str, count: int) -> None:
    for result in pools[world].run(trained, [f"parallel={layout}", loss, f"optim.microbatches={count}"]):
        assert_equal(result, alone[loss], 1e-12)


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_ranks_with_checkpointed_blocks(pool2: Any, alone: Any, layout: str) -> None:
    overrides = [f"parallel={layout}", "optim.microbatches=4", "parallel.activation_checkpointing=full"]
    for result in pool2.run(trained, overrides):
        assert_equal(result, alone["loss=clip"], 1e-12)


# ---- what is random in the model --------------------------------------------------------------------------------

RANDOM = ["model.vision.drop_path=0.4", "model.vision.patch_dropout=0.5"]


@pytest.fixture(scope="module")
def dropped() -> list[tuple[float, Gradients]]:
    """One process on the whole batch at once, with stochastic depth and half of the patches."""
    return trained(RANDOM)


def test_something_is_dropped(alone: Any, dropped: Any) -> None:
    assert worst(dropped[0][1], alone["loss=clip"][0][1])[0] > 0.01


RECOMPUTED = "parallel.activation_checkpointing=full"
DROPS = [
    # world, overrides
    (1, ["optim.microbatches=3"]),
    (1, ["optim.microbatches=4", RECOMPUTED]),
    (1, [RECOMPUTED]),
    (2, ["parallel=ddp"]),
    (2, ["parallel=fsdp", RECOMPUTED]),
    (2, ["parallel=ddp", "optim.microbatches=4", RECOMPUTED]),
    (2, ["parallel=fsdp", "optim.microbatches=3"]),
    pytest.param(4, ["parallel=ddp", "optim.microbatches=2"], marks=pytest.mark.slow),
    pytest.param(4, ["parallel=fsdp"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("world", "overrides"), DROPS, ids=str)
def test_what_is_dropped_is_each_samples_own(pools: Any, dropped: Any, world: int, overrides: list[str]) -> None:
    arguments = [*RANDOM, *overrides]
    for result in [trained(arguments)] if world == 1 else pools[world].run(trained, arguments):
        assert_equal(result, dropped, 1e-12)


def with_dropout(config: Config) -> CLIP:
    """A model in which something else is random too: dropout, which torch's own generator draws."""
    model = double(config)
    trunk: Any = model.visual.trunk
    for block in trunk.blocks:
        block.attn.proj_drop = torch.nn.Dropout(0.3)
    return model


def cached(overrides: list[str], device: str = "cpu") -> Gradients:
    config = configured([*RANDOM, "optim.microbatches=4", *overrides])
    step = build(config, with_dropout(config), device=device)
    step(my_batch(0), 5 * B, 1e-3)
    return {n: whole(p.grad).clone() for n, p in step.model.named_parameters()}


def kept(seed: int, device: str = "cpu") -> Gradients:
    """The same, with the graphs of all microbatches kept."""
    model = with_dropout(configured(RANDOM)).to(device)
    parts = []
    for i, part in enumerate(my_batch(0).cut(4)):
        torch.manual_seed(step_seed(seed, 5 * B, rank(), i))
        images, ids, lengths, seeds = (
            t.to(device) for t in (part.images, part.text_ids, part.text_lengths, part.seeds)
        )
        parts.append(model(images, ids, lengths, seeds=seeds))
    image, text = (torch.cat(tensors) for tensors in list(zip(*parts, strict=True))[:2])
    clip_loss(image, text, parts[0].logit_scale).backward()
    return {n: average(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def test_a_repeated_pass_draws_as_the_first_one() -> None:
    truth = kept(seed=0)
    assert worst(cached([]), truth)[0] <= 1e-12
    assert worst(cached([RECOMPUTED]), truth)[0] <= 1e-12
    assert worst(kept(seed=1), truth)[0] > 0.01, "dropout was not random"


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_a_repeated_pass_draws_as_the_first_one_on_each_rank(pool2: Any, layout: str) -> None:
    truth = pool2.run(kept, 0)[0]
    for gradients in pool2.run(cached, [f"parallel={layout}"]):
        assert worst(gradients, truth)[0] <= 1e-12


# ---- precision --------------------------------------------------------------------------------------------------


def scaled(overrides: list[str], scale: float) -> list[tuple[float, Gradients]]:
    config = configured(overrides)
    return train(build(config, double(config), scaler=torch.amp.GradScaler("cpu", init_scale=scale)))


@pytest.mark.parametrize("scale", [2.0**10, 2.0**-3])
def test_the_loss_is_scaled_once(alone: Any, scale: float) -> None:
    assert_equal(scaled(["optim.microbatches=4"], scale), alone["loss=clip"], 1e-12)


def test_the_loss_is_scaled_once_on_ranks(pool2: Any, alone: Any) -> None:
    for result in pool2.run(scaled, ["parallel=ddp", "optim.microbatches=4"], 2.0**10):
        assert_equal(result, alone["loss=clip"], 1e-12)


def in_precision(name: str, count: int, device: str = "cpu") -> tuple[float, Gradients]:
    config = configured([f"precision={name}", f"optim.microbatches={count}"])
    return train(build(config, build_model(config.model), device=device))[0]


PRECISIONS = [("fp32", 1e-5), ("amp_bf16", 0.05), ("amp_fp16", 0.01)]


@pytest.mark.parametrize(("name", "bound"), PRECISIONS)
def test_precisions(name: str, bound: float) -> None:
    assert_equal([in_precision(name, 4)], [in_precision(name, 1)], bound)


# ---- what it costs ----------------------------------------------------------------------------------------------


def reductions(layout: str, count: int) -> dict[str, int]:
    config = configured([f"parallel={layout}", f"optim.microbatches={count}"])
    step = build(config, build_model(config.model))
    train(step)  # DDP lays its buckets out anew after the first step
    step.zero_grad()
    with CommDebugMode() as counted:
        step(my_batch(0), 0, 1e-3)
    return {str(op): n for op, n in counted.get_comm_counts().items() if "reduce" in str(op)}


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_gradients_are_reduced_once(pool2: Any, layout: str) -> None:
    once, cached = pool2.run(reductions, layout, 1), pool2.run(reductions, layout, 4)
    assert once == cached
    assert all(once)


class _Saved:
    """A tensor that a graph keeps, counted while it does."""

    alive = peak = 0

    def __init__(self, tensor: torch.Tensor, owned: set[int]) -> None:
        self.tensor = tensor
        self.bytes = 0 if tensor.untyped_storage().data_ptr() in owned else tensor.nbytes
        _Saved.alive += self.bytes
        _Saved.peak = max(_Saved.peak, _Saved.alive)

    def __del__(self) -> None:
        _Saved.alive -= self.bytes


def peak_bytes(count: int) -> int:
    config = configured([f"optim.microbatches={count}"])
    step = build(config, build_model(config.model))
    owned = {p.untyped_storage().data_ptr() for p in step.model.parameters()}
    _Saved.alive = _Saved.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(lambda t: _Saved(t, owned), lambda saved: saved.tensor):
        step(my_batch(0), 0, 1e-3)
    return _Saved.peak


def test_one_graph_is_kept_at_a_time() -> None:
    assert peak_bytes(4) < 0.3 * peak_bytes(1)


# ---- what is refused --------------------------------------------------------------------------------------------


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        make()
    return str(caught.value)


def test_batchnorm_is_refused() -> None:
    config = configured(["optim.microbatches=2"], "resnet18")
    text = refusal(lambda: build(config, build_model(config.model)))
    assert "BatchNorm" in text and "optim.microbatches=1" in text
    config.optim.microbatches = 1
    build(config, build_model(config.model))


def test_more_microbatches_than_pairs_are_refused() -> None:
    config = configured([f"optim.microbatches={B + 1}"])
    assert f"use optim.microbatches={B} or less" in refusal(lambda: build(config, build_model(config.model)))
