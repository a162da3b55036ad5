"""Any model that a command takes: of other libraries, without a run of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import clipscale
from clipscale.apps.asking import ask
from clipscale.checkpoint.covered import model_of_hf
from clipscale.checkpoint.loading import load_model
from clipscale.config.model import Activation, ResizeMode
from clipscale.errors import ClipscaleError
from clipscale.models import build_model
from tests.asked import open_clip_directory
from tests.peers import assert_same_features, hf_model, hf_siglip, pair, siglip_config, small


@pytest.fixture(scope="module")
def of_open_clip() -> Any:
    return small("tiny_quickgelu")[1]


@torch.no_grad()
def test_a_directory_of_open_clip(of_open_clip: Any, tmp_path: Path) -> None:
    where = open_clip_directory(tmp_path / "peer", of_open_clip, mean=[0.5] * 3, resize_mode="squash")
    model, _, tokenizer = clipscale.load(where)
    vision = model.config.vision
    assert model.config.name == "peer" and model.config.mean == [0.5] * 3 and vision.resize_mode is ResizeMode.squash
    assert model.config.activation is Activation.quickgelu and model.config.text.activation is None
    images, _ = pair(64)
    ids = tokenizer(["a red circle", "two"])
    assert_same_features(model, of_open_clip.encode_image(images), of_open_clip.encode_text(ids), (images, ids))
    context = ask(str(where), "cpu", 3)
    assert context.batch_size == 3 and context.encode_captions(["a", "b"]).shape == (2, 128)


@torch.no_grad()
def test_a_directory_of_hugging_face(tmp_path: Path) -> None:
    there = hf_model()
    there.save_pretrained(tmp_path)
    images = {"do_center_crop": True, "image_mean": [0.1] * 3, "image_std": [0.2] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    model, _, tokenizer = clipscale.load(tmp_path)
    pixels, _ = pair(64)
    ids = tokenizer(["a red circle", "two blue stars left"])
    out = there(pixel_values=pixels, input_ids=ids)
    assert_same_features(model, out.image_embeds, out.text_embeds, (pixels, ids))
    assert model.config.mean == [0.1] * 3 and model.config.vision.image_size == 64


def test_siglip_of_hugging_face() -> None:
    """Its architecture by its configuration; the tokens are another file's."""
    own = siglip_config()
    config = json.loads(hf_siglip(own).config.to_json_string())
    found = model_of_hf(config, "siglip")
    shapes = {name: tensor.shape for name, tensor in build_model(own).state_dict().items()}
    found.vision.timm = own.vision.timm  # the small one is the tests' own
    assert {name: tensor.shape for name, tensor in build_model(found).state_dict().items()} == shapes


def test_a_file_is_the_option_of_its_shapes(of_open_clip: Any, tmp_path: Path) -> None:
    torch.save(of_open_clip.state_dict(), tmp_path / "bare.pt")
    _, config = load_model(tmp_path / "bare.pt")
    assert config.model.name == "tiny" and config.tokenizer.name == "clip"
    odd = {name: tensor for name, tensor in of_open_clip.state_dict().items() if ".resblocks.3." not in name}
    torch.save(odd, tmp_path / "odd.pt")
    with pytest.raises(ClipscaleError, match="does not say its architecture, and has shapes that no option of model"):
        load_model(tmp_path / "odd.pt")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nowhere", "nowhere does not exist; name a run, a checkpoint, open_clip:NAME/TAG, hf:NAME, or the path"),
        ("open_clip:ViT-B-33/x", "^open_clip:ViT-B-33/x: open_clip has no model"),
        ("timm:resnet50", "^timm:resnet50 is an image tower alone"),
    ],
)
def test_what_is_not_there_is_one_line(where: str, message: str) -> None:
    with pytest.raises(ClipscaleError, match=message) as caught:
        clipscale.load(where)
    assert "\n" not in str(caught.value) and "init.weights" not in str(caught.value)
