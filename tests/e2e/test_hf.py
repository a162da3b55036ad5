"""A run with a text tower of Hugging Face's, from its start to what is loaded of it, without any hub."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path

import pytest
import torch

import clipscale
from clipscale.apps.export import export
from clipscale.checkpoint.loading import load_model
from clipscale.config import compose, load_config, validate
from clipscale.errors import ClipscaleError, ExitCode
from clipscale.train import main
from tests.hf import save_hf
from tests.runs import losses

pytest.importorskip("transformers")
BATCH = 32
CAPTIONS = ["a small red circle", "the blue star above a large green square"]


def medical(place: Path, weights: Path, *overrides: str) -> list[str]:
    """The recipe with a small model for the one that it downloads, on the built-in scenes."""
    return [
        "experiment=medical_finetune", "data=shapes", f"runs_dir={place}", "name=medical", "device=cpu",
        "precision=fp32", f"model.text.hf={weights}", "init.weights=null", "model.context_length=24",
        "model.vision.image_size=32", "model.vision.width=32", "model.vision.layers=2", "model.vision.heads=4",
        f"global_batch_size={BATCH}", "optim.max_microbatch=8", "schedule.warmup_samples=0", "tracking=disabled",
        "tracking.log_every_steps=1", "data.shapes.train=96", "data.shapes.val=32", "data.shapes.classes=24",
        "data.shapes.image_size=32", "data.zeroshot.shards=null", "data.caption_key=json:captions", *overrides,
    ]  # fmt: skip


def test_the_recipe_is_what_it_says() -> None:
    config, _ = compose(["experiment=medical_finetune", "cluster=node8", "cluster.processes_per_node=2"])
    validate(config)
    assert config.tokenizer.name == f"hf:{config.model.text.hf}" and config.model.context_length == 256
    assert config.data.crop_scale == [0.9, 1.0] and config.data.color_jitter is None
    assert config.optim.count_microbatches(config.global_batch_size // 2) == 8


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The recipe's run of two steps, whose pretrained text model is gone since; and the command that made it."""
    place = tmp_path_factory.mktemp("medical")
    weights = save_hf(place / "weights")
    command = medical(place, weights, "data.workers=1")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main([*command, f"total_samples={2 * BATCH}"]) is ExitCode.DONE
    assert f"starting from {weights} (text)" in output.getvalue() and "4 microbatches" in output.getvalue()
    shutil.rmtree(weights)
    return place / "medical", command


def test_the_recipe_trains_from_pretrained_weights(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    path, _ = trained
    config = load_config(path / "config.yaml")
    assert config.model.text.hf_config["model_type"] == "bert"
    assert sorted(losses(path)) == [BATCH, 2 * BATCH]
    original = save_hf(tmp_path)
    tower = load_model(path)[0].text.transformer
    from transformers import AutoModel

    theirs = AutoModel.from_pretrained(original).state_dict()
    for name, tensor in tower.state_dict().items():
        assert (tensor - theirs[name]).abs().max() < 1e-3, f"{name}: two small steps lead from the pretrained weights"


def test_what_is_trained_needs_no_hub(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    path, _ = trained
    model, _, tokenizer = clipscale.load(path)
    with torch.no_grad():
        expected = model.encode_text(tokenizer(CAPTIONS))
        assert expected.shape == (2, 512) and not torch.allclose(expected[0], expected[1])
        export(path, "safetensors", tmp_path / "exported")
        again, _, others = clipscale.load(tmp_path / "exported")
        assert torch.equal(again.encode_text(others(CAPTIONS)), expected)
    for name in ("config.yaml", "README.md"):
        text = (tmp_path / "exported" / name).read_text()
        assert "hf:weights" in text and str(path.parent) not in text, "it tells no place of this machine"
    for to in ("open_clip", "hf"):
        with pytest.raises(ClipscaleError, match=r"cannot be given the text tower model\.text\.hf=.*--to safetensors"):
            export(path, to, tmp_path / to)


def test_it_goes_on_and_teaches(
    trained: tuple[Path, list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, command = trained
    shutil.copytree(path, tmp_path / "medical")
    here = [*command, f"runs_dir={tmp_path}", "data.workers=0"]
    assert main([*here, f"total_samples={3 * BATCH}"]) is ExitCode.DONE
    assert "resuming at 64" in capfd.readouterr().out
    student = [*here, "name=student", f"loss.teachers=[{path}]", "model.text.hf_pretrained=false"]
    assert main([*student, f"total_samples={BATCH}"]) is ExitCode.USER_ERROR
    assert "it is neither a directory here" in capfd.readouterr().err, "the student's own architecture is gone"
    again = save_hf(Path(next(o for o in command if o.startswith("model.text.hf=")).partition("=")[2]))
    assert main([*student, f"total_samples={BATCH}"]) is ExitCode.DONE
    shutil.rmtree(again)


def test_mistakes_are_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = save_hf(tmp_path / "weights")
    for wrong, message in (
        ("model.context_length=48", "use model.context_length=24"),
        ("model.text.eot_id=102", "use model.text.eot_id=3"),
        ("model.text.hf=not/here/at-all", "it is neither a directory here nor ORGANISATION/NAME"),
    ):
        assert main(medical(tmp_path, weights, "data.workers=0", wrong)) is ExitCode.USER_ERROR
        error = capfd.readouterr().err.strip().splitlines()
        assert len(error) == 1 and error[0].startswith("error: ") and message in error[0]
