"""Only finished checkpoints count, and only those that are as they were written."""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import clipscale
from clipscale.checkpoint import Checkpointer, Saved
from clipscale.checkpoint.manifest import MANIFEST
from clipscale.checkpoint.places import local
from clipscale.errors import ClipscaleError, SaveError


def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(4, 3)
    return model, torch.optim.AdamW(model.parameters())


def save(directory: Path, step: int, keep_last: int = 9) -> Path:
    saver = Checkpointer(directory, keep_last)
    saver.save(*make(), {}, Saved(step=step, samples_seen=step * 10))
    saver.wait()
    return directory / f"step_{step:08d}"


def newest(directory: Path) -> Path | None:
    found = Checkpointer(directory, 1).newest()
    return found and Path(found.location)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_unfinished_ones_are_passed_over_and_removed(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    first, second, third = (save(tmp_path, step) for step in (1, 2, 3))
    (third / MANIFEST).unlink()
    assert newest(tmp_path) == second
    assert Checkpointer(tmp_path, 1).clean() == [third.name]
    assert names(tmp_path) == [first.name, second.name]


def test_retention(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep_last=2)
    assert names(tmp_path) == ["step_00000003", "step_00000004"]


def tensors_of(checkpoint: Path) -> Path:
    return next(checkpoint.glob("*.distcp"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewrite(checkpoint: Path, old: str, new: str) -> None:
    text = (checkpoint / MANIFEST).read_text()
    assert old in text
    (checkpoint / MANIFEST).write_text(text.replace(old, new))


DAMAGE = {
    "flipped": (lambda c: flip(tensors_of(c)), "__0_0.distcp does not have its checksum"),
    "flipped contents": (lambda c: flip(c / ".metadata"), ".metadata does not have its checksum"),
    "truncated": (lambda c: tensors_of(c).write_bytes(tensors_of(c).read_bytes()[:-1]), "bytes instead of"),
    "missing": (lambda c: tensors_of(c).unlink(), "cannot be read"),
    "cut manifest": (lambda c: (c / MANIFEST).write_text((c / MANIFEST).read_text()[:50]), "is not a manifest"),
    "empty manifest": (lambda c: (c / MANIFEST).write_text("{}"), "is not a manifest"),
    "changed number": (lambda c: rewrite(c, '"step": 2', '"step": 3'), "does not have its own checksum"),
    "wrong kind": (lambda c: rewrite(c, '"step": 2', '"step": "2"'), "is not a manifest"),
    "above": (lambda c: rewrite(c, "__0_0", "../__0_0"), "'../__0_0.distcp', which is no file of this checkpoint"),
    "absolute": (lambda c: rewrite(c, "__0_0", "/tmp/__0_0"), "no file of this checkpoint"),
    "huge": (lambda c: rewrite(c, '"bytes": ', '"bytes": 1000000000000'), "bytes instead of|own checksum"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_gives_way_to_the_one_before(tmp_path: Path, kind: str) -> None:
    damage, says = DAMAGE[kind]
    first, second = (save(tmp_path, step) for step in (1, 2))
    damage(second)
    saver = Checkpointer(tmp_path, 2)
    found = saver.newest()
    assert found is not None and found.name == first.name
    assert list(saver.damaged) == [second.name]
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(saver.damaged[second.name])
    # It is never counted among those to be kept, and goes when there is a newer one.
    assert saver.clean() == [] and second.is_dir()
    assert newest(tmp_path) == first
    save(tmp_path, 3, keep_last=2)
    assert names(tmp_path) == [first.name, "step_00000003"]


def test_all_damaged_is_refused_in_one_line(tmp_path: Path) -> None:
    for step in (1, 2):
        flip(tensors_of(save(tmp_path, step)))
    for _ in range(2):  # and again: nothing was removed
        with pytest.raises(ClipscaleError, match=r"is whole in .* \(step_00000002: .*; step_00000001: ") as caught:
            newest(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_step_is_saved_again_over_its_damaged_checkpoint(tmp_path: Path) -> None:
    first, second = (save(tmp_path, step) for step in (1, 2))
    flip(tensors_of(second))
    assert newest(tmp_path) == first
    assert save(tmp_path, 2) == second == newest(tmp_path)


def test_restore_brings_everything_back(tmp_path: Path) -> None:
    model, optimizer = make()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    saved = Saved(step=5, samples_seen=50, positions=[1, 2], fingerprint="f", bad_samples=3, scaler={"scale": 2.0})
    average = {"w": torch.ones(2)}
    saver = Checkpointer(tmp_path, 1)
    saver.save(model, optimizer, average, saved)
    weight = model.weight.detach().clone()
    moments = optimizer.state_dict()["state"][0]
    moment = moments["exp_avg"].clone()
    # What changes from here on is not what is written.
    average["w"].zero_()
    moments["exp_avg"].zero_()
    with torch.no_grad():
        model.weight.zero_()
    before, saved = Saved(**vars(saved)), Saved()
    saver.wait()
    other, other_optimizer = make()
    found = saver.newest()
    assert found is not None
    assert saver.restore(found, other, other_optimizer, average) == before != saved
    assert torch.equal(other.weight, weight) and torch.equal(average["w"], torch.ones(2))
    assert torch.equal(other_optimizer.state_dict()["state"][0]["exp_avg"], moment)
    assert other_optimizer.state_dict()["state"][0]["step"] == 1


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_save_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    first = save(tmp_path, 1)
    saver = Checkpointer(tmp_path, 1)
    with disk_of(1000), pytest.raises(SaveError, match=r"cannot be written: .*File too large") as caught:
        saver.save(*make(), {}, Saved(step=2))
        saver.wait()
    assert "\n" not in str(caught.value) and "MiB are left" in str(caught.value)
    assert names(tmp_path) == [first.name]
    with disk_of(1000):
        saver.save(*make(), {}, Saved(step=3))
        while not (told := saver.failure()):
            pass
    assert "File too large" in told and saver.failure() == ""
    saver.save(*make(), {}, Saved(step=4))
    saver.wait()
    assert names(tmp_path) == ["step_00000004"]


def test_a_checkpoint_of_another_model_is_one_line(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    other = torch.nn.Linear(5, 3)
    with pytest.raises(ClipscaleError, match="cannot be loaded") as caught:
        Checkpointer(tmp_path, 1).restore(local(path), other, torch.optim.AdamW(other.parameters()), {})
    assert "\n" not in str(caught.value)


def test_load_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ClipscaleError, match="nothing does not exist; name a run, a checkpoint, open_clip:NAME/TAG"):
        clipscale.load(tmp_path / "nothing")
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ClipscaleError, match="no finished checkpoint"):
        clipscale.load(tmp_path)


def test_the_manifest_sums_up_every_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    files = json.loads((path / MANIFEST).read_text())["files"]
    assert set(files) == {file.name for file in path.iterdir()} - {MANIFEST}
    moved = tmp_path / "elsewhere"
    shutil.copytree(path, moved)
    assert local(moved).damage(local(moved).manifest()) == ""


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], {})
    assert capsys.readouterr().out == "step_00000001 256\n"
