"""A text tower of Hugging Face's on many ranks and in microbatches moves the weights as on one; checkpoints of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clipscale.checkpoint import Checkpointer, Saved
from clipscale.config import compose
from clipscale.distributed.collectives import whole
from clipscale.trainer.step import TrainStep
from tests.distributed.test_parallel import B, advance, assert_close, build
from tests.hf import hf_model

pytest.importorskip("transformers")


def step_of(kind: str, overrides: list[str]) -> TrainStep:
    config, _ = compose(["optim.clip_grad_norm=1.0", f"global_batch_size={B}", *overrides])
    config.model = hf_model(kind, eot_id=63)
    return build(config)


def steps(kind: str, overrides: list[str]) -> dict[str, Any]:
    step = step_of(kind, overrides)
    losses = advance(step, 0, 1)
    found: dict[str, Any] = {"grads": {n: whole(p.grad).clone() for n, p in step.model.named_parameters()}}
    found["norm"] = step.grad_norm()
    found["losses"] = losses + advance(step, 1, 2)
    found["weights"] = {n: whole(p.detach()).clone() for n, p in step.model.named_parameters()}
    found["ema"] = {n: whole(t).clone() for n, t in step.ema.state_dict().items()} if step.ema else {}
    found["buffers"] = {}
    return found


TABLE = [
    ("bert", ["parallel=ddp", "optim.microbatches=4"]),
    ("bert", ["parallel=fsdp", "parallel.activation_checkpointing=full", "optim.microbatches=2"]),
    ("t5", ["parallel=fsdp", "parallel.activation_checkpointing=full"]),
    pytest.param("gpt2", ["parallel=ddp", "parallel.activation_checkpointing=full"], marks=pytest.mark.slow),
    pytest.param("roberta", ["parallel=fsdp"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "overrides"), TABLE, ids=lambda v: "-".join(v) if isinstance(v, list) else v)
def test_equals_one_process(pool2: Any, kind: str, overrides: list[str]) -> None:
    """Also in microbatches: there is no dropout, so the gradient is that of the batch."""
    alone = steps(kind, [])
    for result in pool2.run(steps, kind, overrides):
        assert_close(result, alone, 1e-5)


def save_at(directory: Path, overrides: list[str]) -> list[float]:
    step = step_of("bert", overrides)
    advance(step, 0, 2)
    ema = step.ema.state_dict() if step.ema else {}
    saver = Checkpointer(directory, keep_last=1)
    saver.save(step.model, step.optimizer, ema, Saved(samples_seen=2 * B, step=2))
    saver.wait()
    return advance(step, 2, 2)


def go_on(directory: Path, overrides: list[str]) -> list[float]:
    step = step_of("bert", [*overrides, "seed=7"])
    saver = Checkpointer(directory, keep_last=1)
    newest = saver.newest()
    assert newest is not None
    saver.restore(newest, step.model, step.optimizer, step.ema.state_dict() if step.ema else {})
    step.config.seed = 0
    return advance(step, 2, 2)


def test_one_rank_and_two_load_each_others_checkpoints(pool2: Any, tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    expected = save_at(alone, [])
    assert pool2.run(save_at, shared, ["parallel=fsdp"])[0] == pytest.approx(expected, rel=1e-5)
    for layout in ("parallel=ddp", "parallel=fsdp"):
        assert pool2.run(go_on, alone, [layout])[0] == pytest.approx(expected, rel=1e-5)
    assert go_on(shared, []) == pytest.approx(expected, rel=1e-5)
