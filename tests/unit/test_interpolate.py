"""``clipscale interpolate``: only whole models have weights between them, and what is written needs no hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import clipscale
from clipscale.apps.interpolate import interpolate
from clipscale.checkpoint.export import write_safetensors
from clipscale.config import compose
from clipscale.config.schema import Config
from clipscale.data.tokenizer import build_tokenizer
from clipscale.errors import ClipscaleError
from clipscale.models import build_model
from tests.hf import hf_model, word_pieces

SMALL = ["model=tiny", "model.vision.layers=1", "model.text.layers=1"]


def written(place: Path, config: Config, seed: int) -> Path:
    place.mkdir()
    write_safetensors(build_model(config.model, seed=seed), config, place)
    return place


def test_a_tokenizer_goes_with_the_weights(tmp_path: Path) -> None:
    word_pieces().save_pretrained(tmp_path / "hub")
    config, _ = compose(SMALL)
    config.model, config.tokenizer.name = hf_model("bert"), f"hf:{tmp_path / 'hub'}"
    first, second = (written(tmp_path / name, config, seed) for seed, name in enumerate(("first", "second")))
    tokenizer = build_tokenizer(config.tokenizer, config.model)
    for end in (first, second):
        tokenizer.save(end / "tokenizer")
    shutil.rmtree(tmp_path / "hub")
    interpolate(str(first), str(second), [0.5], tmp_path / "out", None, "cpu")
    assert torch.equal(clipscale.load(tmp_path / "out")[2](["a red circle"]), tokenizer(["a red circle"]))

    clip, _ = compose([*SMALL, "model.vision.layers=2", "model.vision.image_size=32", "model.embed_dim=16"])
    towers = build_model(clip.model).state_dict()
    save_file(towers, tmp_path / "clip.safetensors")
    with pytest.raises(ClipscaleError, match=r"clip\.safetensors holds a part of the model alone, without text\."):
        interpolate(str(tmp_path / "clip.safetensors"), str(first), [0.5], tmp_path / "part", None, "cpu")


def test_what_would_be_one_end_twice_is_refused(tmp_path: Path) -> None:
    config, _ = compose(SMALL)
    whole = written(tmp_path / "whole", config, 0)
    state = build_model(config.model, seed=1).state_dict()
    trunk = {name: tensor for name, tensor in state.items() if name.startswith("visual.trunk.")}
    save_file({"temperature.logit_scale": state["temperature.logit_scale"]} | trunk, tmp_path / "trunk.safetensors")
    with pytest.raises(ClipscaleError, match="is missing"):
        interpolate(str(tmp_path / "trunk.safetensors"), str(whole), [0.5], tmp_path / "a", None, "cpu")
    with pytest.raises(ClipscaleError, match=r"two models would be .*alpha_0\.5"):
        interpolate(str(whole), str(whole), [0.5, 0.50000001], tmp_path / "b", None, "cpu")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.vision.image_size=32"],
            "has another shape than the other end: visual.trunk.pos_embed interpolated from",
        ),
        (["model.context_length=16"], "has another shape than the other end: text.positional_embedding"),
        (["model.vision.resize_mode=squash"], "sees pictures resized by shortest, the other end by squash"),
    ],
)
def test_ends_are_not_made_to_fit(overrides: list[str], message: str, tmp_path: Path) -> None:
    first, _ = compose(SMALL)
    second, _ = compose([*SMALL, *overrides])
    ends = [str(written(tmp_path / name, config, 0)) for name, config in (("first", first), ("second", second))]
    with pytest.raises(ClipscaleError, match=message):
        interpolate(*ends, [0.0], tmp_path / "out", None, "cpu")
