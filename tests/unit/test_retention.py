"""Which checkpoints stay."""

from __future__ import annotations

from pathlib import Path

import torch

from clipscale.checkpoint import Checkpointer, Saved
from clipscale.checkpoint.places import PINNED
from clipscale.distributed.runtime import Runtime
from clipscale.trainer.keeping import mark_best, mark_kept

ALONE = Runtime(0, 1, 0, torch.device("cpu"))


def steps(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in directory.iterdir())


def test_the_last_the_best_every_so_many_samples_and_pinned_ones_stay(tmp_path: Path) -> None:
    saver, saved = Checkpointer(tmp_path, 2), Saved()
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    losses = {3: 0.5, 5: 0.2, 9: 0.9}
    for step in range(1, 13):
        saved.step, saved.samples_seen = step, step * 10
        mark_kept(saved, 45)
        if step in losses:
            mark_best(saved, "val/loss", {"val/loss": losses[step]}, ALONE)
        saver.save(model, optimizer, {}, saved)
        saver.wait()
        if step == 2:
            (tmp_path / "step_00000002" / PINNED).touch()
    # 2 is pinned; 5 has the lowest loss and is, as 9 for 90, the first at or past a multiple of 45.
    assert steps(tmp_path) == [2, 5, 9, 11, 12]
    assert saved.best_step == 5 and saved.kept_at == 90


def test_what_is_best_is_told_by_the_name() -> None:
    saved = Saved(step=1)
    assert not mark_best(saved, None, {}, ALONE)
    assert mark_best(saved, "val/zeroshot/top1", {"val/zeroshot/top1": 0.5}, ALONE)
    saved.step = 2
    assert not mark_best(saved, "val/zeroshot/top1", {"val/zeroshot/top1": 0.4}, ALONE)
    assert mark_best(saved, "val/zeroshot/top1", {"val/zeroshot/top1": 0.6}, ALONE) and saved.best_step == 2


def test_one_to_go_back_to_stays(tmp_path: Path) -> None:
    """Where the last ones are all younger than a run may have to go back."""
    saver = Checkpointer(tmp_path, 2, behind=5)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(1, 20):
        saver.save(model, optimizer, {}, Saved(step=step))
        saver.wait()
        there = steps(tmp_path)
        assert len(there) <= 4 and there[-2:] == [step - 1, step][-step:]
        assert there[0] <= max(1, step - 5)


def test_what_is_known_later_is_written_to_the_checkpoint_that_is_there(tmp_path: Path) -> None:
    saver, saved = Checkpointer(tmp_path, 2), Saved(step=7)
    saver.amend(saved)
    assert steps(tmp_path) == []
    model = torch.nn.Linear(2, 2)
    saver.save(model, torch.optim.AdamW(model.parameters()), {}, saved)
    saver.wait()
    assert mark_best(saved, "val/loss", {"val/loss": 0.5}, ALONE)
    saver.amend(saved)
    newest = Checkpointer(tmp_path, 2).newest()
    assert newest is not None and newest.manifest().saved.best_step == 7
