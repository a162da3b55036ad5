"""What is locked stays as it is, bit for bit, costs the backward pass nothing, and changes no other gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clipscale.checkpoint import Checkpointer, Saved
from clipscale.checkpoint.interop import to_open_clip
from clipscale.config import compose
from clipscale.config.schema import Config
from clipscale.distributed.collectives import whole
from clipscale.errors import ConfigError
from clipscale.models import build_model
from clipscale.parallel import layer_groups, lock
from clipscale.trainer.step import TrainStep
from tests.distributed.test_parallel import B, advance, build, small
from tests.peers import small as small_peers

Tensors = dict[str, torch.Tensor]
LIT = ["lock.image=true"]
TOP = ["lock.image=true", "lock.image_unlocked_groups=2", "lock.text=true", "lock.text_unlocked_groups=3"]
TEXT = ["lock.text=true", "optim.layer_decay=0.5"]


def configured(overrides: list[str], tower: str = "vit") -> Config:
    config, _ = compose([f"global_batch_size={B}", *overrides])
    config.model = small(tower)
    return config


def state(step: TrainStep) -> Tensors:
    return {name: whole(t.detach()).clone() for name, t in step.model.state_dict().items()}


def trained(step: TrainStep) -> set[str]:
    return {name for name, p in step.model.named_parameters() if p.requires_grad}


def steps(overrides: list[str], tower: str = "vit", count: int = 3) -> dict[str, Any]:
    """What three steps make of a model: its state before and after, the average, losses and first gradients."""
    step = build(configured(overrides, tower))
    before = state(step)
    step.model.train()
    losses = advance(step, 0, 1)
    gradients = {n: whole(p.grad).clone() for n, p in step.model.named_parameters() if p.grad is not None}
    losses += advance(step, 1, count - 1)
    assert step.ema is not None
    average = {name: whole(t).clone() for name, t in step.ema.state_dict().items()}
    return {
        "before": before, "after": state(step), "average": average, "losses": losses, "grads": gradients,
        "trained": trained(step),
    }  # fmt: skip


def assert_locked(found: dict[str, Any]) -> None:
    """Only what is trained moves, and only that has a gradient."""
    assert found["trained"] and found["grads"].keys() == found["trained"]
    for name, tensor in found["before"].items():
        unmoved = torch.equal(tensor, found["after"][name])
        assert unmoved == (name not in found["trained"]), name
        if name in found["average"]:
            assert torch.equal(tensor, found["average"][name]) == unmoved, f"average of {name}"


def assert_gradients(found: Tensors, truth: Tensors, bound: float) -> None:
    scale = max(gradient.norm() for gradient in truth.values())
    for name, gradient in found.items():
        error = (gradient - truth[name]).norm()
        assert error <= bound * max(truth[name].norm(), 1e-2 * scale), f"gradient of {name}: {error}"


@pytest.mark.parametrize("overrides", [LIT, TOP, TEXT, ["loss=siglip", *LIT]], ids=str)
def test_locked_weights_stay_and_the_others_have_their_gradient(overrides: list[str]) -> None:
    found = steps(overrides)
    assert_locked(found)
    assert_gradients(found["grads"], steps(overrides[:1] if "loss" in overrides[0] else [])["grads"], 1e-6)


TABLE = [
    ("ddp", TOP, 4),
    ("fsdp", LIT, 4),
    pytest.param("ddp", LIT, 1, marks=pytest.mark.slow),
    pytest.param("fsdp", TOP, 1, marks=pytest.mark.slow),
    pytest.param("fsdp", TEXT, 4, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("layout", "overrides", "microbatches"), TABLE, ids=str)
def test_two_ranks_equal_one(pool2: Any, layout: str, overrides: list[str], microbatches: int) -> None:
    alone = steps(overrides)
    for found in pool2.run(steps, [f"parallel={layout}", f"optim.microbatches={microbatches}", *overrides]):
        assert_locked(found)
        assert found["trained"] == alone["trained"]
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert_gradients(found["grads"], alone["grads"], 1e-4)


def save(directory: Path, overrides: list[str]) -> Tensors:
    step = build(configured(overrides))
    advance(step, 0, 2)
    assert step.ema is not None
    saver = Checkpointer(directory, keep_last=1)
    saver.save(step.model, step.optimizer, step.ema.state_dict(), Saved(step=2))
    saver.wait()
    advance(step, 2, 2)
    return state(step)


def go_on(directory: Path, overrides: list[str]) -> tuple[Tensors, set[str], list[float]]:
    step = build(configured(["seed=7", *overrides]))
    saver = Checkpointer(directory, keep_last=1)
    newest = saver.newest()
    assert newest is not None and step.ema is not None
    saver.restore(newest, step.model, step.optimizer, step.ema.state_dict())
    step.config.seed = 0
    advance(step, 2, 2)
    return state(step), trained(step), [group["lr"] for group in step.optimizer.param_groups]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_locked_run_goes_on_anywhere(pool2: Any, tmp_path: Path, before: int, after: int) -> None:
    overrides = ["parallel=fsdp", "optim.layer_decay=0.5", *TOP]

    def run(world: int, function: Any) -> Any:
        return pool2.run(function, tmp_path, overrides)[0] if world == 2 else function(tmp_path, overrides)

    undisturbed = run(before, save)
    found, moved, rates = run(after, go_on)
    assert rates == [1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4]
    for name, tensor in undisturbed.items():
        if name in moved:
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
        else:
            assert torch.equal(found[name], tensor), name


def kept_bytes(overrides: list[str]) -> int:
    """Bytes that the towers' forward pass keeps for the backward pass, weights left out."""
    step = build(configured(overrides))
    owned = {p.untyped_storage().data_ptr() for p in step.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in owned:
            kept[place] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = step.model.visual(torch.zeros(8, 3, 32, 32, dtype=torch.uint8))
    return sum(kept.values()) if features.requires_grad else 0


def test_a_locked_prefix_keeps_no_activations() -> None:
    whole_tower = kept_bytes([])
    by_unlocked = [kept_bytes(["lock.image=true", f"lock.image_unlocked_groups={n}"]) for n in range(4)]
    assert by_unlocked[0] == 0
    assert by_unlocked == sorted(set(by_unlocked)), "every group that is trained keeps something"
    assert by_unlocked[1] < 0.05 * whole_tower and by_unlocked[3] < whole_tower


def test_locked_batchnorm_is_as_in_evaluation() -> None:
    found = steps(LIT, "resnet18")
    assert any("running_var" in name for name in found["before"])
    assert_locked(found)
    build(configured(["optim.microbatches=2", *LIT], "resnet18"))  # it takes no statistics that parts would change
    gone_on = steps([*LIT, "lock.batchnorm=false"], "resnet18")
    moved = {name for name, tensor in gone_on["before"].items() if not torch.equal(tensor, gone_on["after"][name])}
    assert {name.rpartition(".")[2] for name in moved - gone_on["trained"]} == {
        "running_mean", "running_var", "num_batches_tracked"
    }  # fmt: skip
    with pytest.raises(ConfigError, match="BatchNorm"):
        build(configured(["optim.microbatches=2", *LIT, "lock.batchnorm=false"], "resnet18"))


@pytest.mark.parametrize("tower", ["vit", "resnet18", "convnext_atto", "resnet50_clip", "vgg11"])
def test_groups_hold_every_parameter_once(tower: str) -> None:
    with torch.device("meta"):
        model = build_model(small(tower))
    groups = layer_groups(model)
    names = [name for tower_groups in groups.values() for group in tower_groups for name in group]
    towers = [name for name, _ in model.named_parameters() if not name.startswith("temperature.")]
    assert sorted(names) == sorted(towers)
    assert groups["text"][-1] == ["text.proj.weight"]
    projection = "visual.trunk.head." if tower == "resnet50_clip" else "visual.proj.weight"
    assert all(name.startswith(projection) for name in groups["visual"][-1])
    depths = {"vit": 4, "resnet18": 10, "convnext_atto": 14, "resnet50_clip": 18, "vgg11": 2}
    assert len(groups["visual"]) == depths[tower]


@pytest.mark.parametrize("unlocked", [0, 1, 2, 4])
def test_groups_are_those_of_open_clip(unlocked: int) -> None:
    ours, theirs = small_peers("tiny")
    theirs.lock_image_tower(unlocked_groups=unlocked)
    theirs.lock_text_tower(unlocked_layers=min(unlocked, 3))
    config, _ = compose(["lock.image=true", f"lock.image_unlocked_groups={unlocked}", "lock.text=true"])
    config.lock.text_unlocked_groups = min(unlocked, 3)
    lock(ours, config.lock)
    marked = {name: torch.full_like(p, p.requires_grad) for name, p in ours.named_parameters()}
    trained_there = {name for name, p in theirs.named_parameters() if p.requires_grad}
    assert {name for name, mark in to_open_clip(marked).items() if mark.any()} == trained_there


def test_nothing_to_lock_is_an_error() -> None:
    with pytest.raises(ConfigError, match="image tower has 4 groups"):
        build(configured(["lock.image=true", "lock.image_unlocked_groups=4"]))
