"""Only finished checkpoints count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import clipscale
from clipscale.checkpoint import Checkpointer, Saved
from clipscale.checkpoint.checkpointer import MANIFEST, finished_checkpoints
from clipscale.errors import ClipscaleError


def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(4, 3)
    return model, torch.optim.AdamW(model.parameters())


def save(directory: Path, step: int, keep_last: int = 9) -> Path:
    return Checkpointer(directory, keep_last).save(*make(), {}, Saved(step=step, samples_seen=step * 10))


def test_newest_is_the_newest_finished(tmp_path: Path) -> None:
    assert Checkpointer(tmp_path, 1).newest() is None
    first, second, third = (save(tmp_path, step) for step in (1, 2, 3))
    (third / MANIFEST).unlink()
    data = next(second.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    assert finished_checkpoints(tmp_path) == [first]
    Checkpointer(tmp_path, 1).clean()
    assert list(tmp_path.iterdir()) == [first]


def test_retention(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep_last=2)
    assert [path.name for path in finished_checkpoints(tmp_path)] == ["step_00000004", "step_00000003"]


def test_restore_brings_everything_back(tmp_path: Path) -> None:
    model, optimizer = make()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    saved = Saved(step=5, samples_seen=50, positions=[1, 2], fingerprint="f", bad_samples=3, scaler={"scale": 2.0})
    path = Checkpointer(tmp_path, 1).save(model, optimizer, {"w": torch.ones(2)}, saved)
    other, other_optimizer = make()
    average = {"w": torch.zeros(2)}
    assert Checkpointer(tmp_path, 1).restore(path, other, other_optimizer, average) == saved
    assert torch.equal(other.weight, model.weight) and torch.equal(average["w"], torch.ones(2))
    ours, theirs = optimizer.state_dict()["state"][0], other_optimizer.state_dict()["state"][0]
    assert torch.equal(ours["exp_avg"], theirs["exp_avg"]) and ours["step"] == theirs["step"]


def test_a_checkpoint_of_another_model_is_one_line(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    other = torch.nn.Linear(5, 3)
    with pytest.raises(ClipscaleError, match="cannot be loaded") as caught:
        Checkpointer(tmp_path, 1).restore(path, other, torch.optim.AdamW(other.parameters()), {})
    assert "\n" not in str(caught.value)


def test_load_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ClipscaleError, match="neither a run directory nor a checkpoint"):
        clipscale.load(tmp_path / "nothing")
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ClipscaleError, match="no finished checkpoint"):
        clipscale.load(tmp_path)
