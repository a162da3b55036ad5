"""``clipscale checkpoint``: what a run's checkpoints are, whether they are whole, and their mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import clipscale
import clipscale.errors
from clipscale.checkpoint import Checkpointer, Saved
from clipscale.checkpoint.places import PINNED
from clipscale.cli import app
from clipscale.config import compose, save_config
from clipscale.models import build_model
from tests.peers import scramble
from tests.unit.test_export import SMALL_TEXT


def clip(*arguments: Any) -> tuple[int, str]:
    """Exit code and output; an error's text is what would be printed in one line."""
    result = CliRunner().invoke(app, ["checkpoint", *map(str, arguments)], env={"COLUMNS": "200"})
    code = getattr(result.exception, "exit_code", result.exit_code)
    return code, result.output + str(result.exception or "")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints of a model whose weights are 1, 2 and 3 times the same."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    run.mkdir()
    config, _ = compose(["name=mine", "model=tiny", "model.vision.layers=1", *SMALL_TEXT])
    save_config(config, run / "config.yaml")
    model = build_model(config.model)
    scramble(model)
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saver = Checkpointer(run / "checkpoints", 3)
    for step in (1, 2, 3):
        model.load_state_dict({name: tensor * step for name, tensor in first.items()})
        saver.save(model, torch.optim.AdamW(model.parameters()), {}, Saved(step=step, samples_seen=step * 1000))
        saver.wait()
    return run


def test_ls_and_verify(run: Path) -> None:
    (run / "checkpoints" / "step_00000001" / PINNED).touch()
    (run / "checkpoints" / "step_00000004").mkdir()
    code, printed = clip("ls", run)
    lines = [line for line in printed.splitlines() if "step_" in line]
    assert code == 0 and "unfinished" in lines[0] and "3,000" in lines[1] and "pinned" in lines[3]
    (run / "checkpoints" / "step_00000004").rmdir()
    assert clip("verify", run)[0] == 0
    data = next((run / "checkpoints" / "step_00000002").glob("*.distcp"))
    whole = data.read_bytes()
    data.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    code, printed = clip("verify", run)
    assert code == 2 and "step_00000002: __0_0.distcp does not have its checksum" in printed
    assert clip("verify", run / "checkpoints" / "step_00000003")[0] == 0
    with pytest.raises(clipscale.errors.ClipscaleError, match="is damaged: __0_0"):
        clipscale.load(data.parent)
    data.write_bytes(whole)


def test_nothing_there_is_one_line(tmp_path: Path) -> None:
    code, printed = clip("ls", tmp_path)
    assert code == 2 and "is neither a run with checkpoints nor one" in printed


def test_average(run: Path, tmp_path: Path) -> None:
    parts = [run / "checkpoints" / f"step_{step:08d}" for step in (1, 3)]
    code, printed = clip("average", *parts, "--out", tmp_path / "mean")
    assert code == 0, printed
    mean, (second, _, _) = clipscale.load(tmp_path / "mean")[0], clipscale.load(run / "checkpoints" / "step_00000002")
    for name, tensor in second.state_dict().items():
        assert torch.allclose(mean.state_dict()[name], tensor, rtol=1e-6), name
    code, printed = clip("average", parts[0], "--out", tmp_path / "one")
    assert code == 2 and "name two or more" in printed
