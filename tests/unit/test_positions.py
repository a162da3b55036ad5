"""Weights of another image size or context length: their position embeddings are brought to the model's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import resize_pos_embed, resize_text_pos_embed

from clipscale.checkpoint.interop import from_open_clip
from clipscale.checkpoint.pretrained import Pretrained, load_pretrained
from clipscale.config import load_group
from clipscale.config.model import Model
from clipscale.errors import ClipscaleError
from clipscale.models import CLIP, build_model
from tests.peers import assert_same_features, pair, small


def resized(image_size: int, context: int, timm: str | None = None) -> Model:
    config: Model = load_group("model", "tiny", Model)
    vision = replace(config.vision, image_size=image_size)
    if timm is not None:
        vision = replace(vision, timm=timm, patch_size=None, width=64, layers=2)
    return replace(config, vision=vision, context_length=context)


def load(config: Model, state: dict[str, torch.Tensor], **told: Any) -> tuple[CLIP, list[str]]:
    model = CLIP(config).eval()
    return model, load_pretrained(model, Pretrained("weights.pt", state, told))


@pytest.mark.parametrize(("image_size", "context"), [(128, 32), (32, 32), (80, 32), (64, 77)])
def test_the_numbers_are_open_clips(image_size: int, context: int) -> None:
    _, other = small("tiny")
    state = other.state_dict()
    theirs = open_clip.CLIP(
        128,
        dict(layers=4, width=128, head_width=32, patch_size=16, image_size=image_size),
        dict(context_length=context, vocab_size=49408, width=128, heads=4, layers=2),
    ).eval()
    ours, said = load(resized(image_size, context), from_open_clip(state))
    resize_pos_embed(state, theirs)
    resize_text_pos_embed(state, theirs)
    theirs.load_state_dict(state)
    for name, tensor in from_open_clip(theirs.state_dict()).items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, atol=1e-6, rtol=0, msg=name)
    patches = (image_size // 16) ** 2 + 1
    assert said == [
        *([f"visual.trunk.pos_embed interpolated from 17 to {patches} positions"] if image_size != 64 else []),
        *([f"text.positional_embedding interpolated from 32 to {context} positions"] if context != 32 else []),
    ]
    images, captions = pair(image_size, context)
    with torch.no_grad():
        assert_same_features(ours, theirs.encode_image(images), theirs.encode_text(captions), (images, captions))


def test_a_shorter_context_keeps_the_features_of_what_fits() -> None:
    before = build_model("tiny").eval()
    after, said = load(resized(64, 8), before.state_dict())
    assert said == ["text.positional_embedding cut from 32 to 8 positions"]
    ids, lengths = torch.tensor([49406, 320, 736, 49407, 49406, 49407]), torch.tensor([4, 2])
    with torch.no_grad():
        assert torch.equal(after.encode_text(ids, lengths), before.encode_text(ids, lengths))


def test_a_shorter_context_that_is_filled_up_is_squeezed_as_open_clip_does() -> None:
    config = resized(64, 8)
    config.text.pad_to_context = True
    found = small("tiny")[1].state_dict()
    after, said = load(config, from_open_clip(found))
    assert said == ["text.positional_embedding interpolated from 32 to 8 positions"]
    theirs = open_clip.CLIP(
        128,
        dict(layers=4, width=128, head_width=32, patch_size=16, image_size=64),
        dict(context_length=8, vocab_size=49408, width=128, heads=4, layers=2),
    )
    resize_text_pos_embed(found, theirs)
    torch.testing.assert_close(after.text.positional_embedding.data, found["positional_embedding"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("timm", "prefix", "name"),
    [
        ("resnet50_clip", 1, "head.pos_embed"),
        ("vit_small_patch14_reg4_dinov2", 0, "pos_embed"),  # class and register tokens have no position
        ("vit_base_patch16_siglip_224", 0, "pos_embed"),
    ],
)
def test_other_towers(timm: str, prefix: int, name: str) -> None:
    """A function of place that bicubic interpolation keeps: a linear one, away from the borders."""
    size = {"resnet50_clip": 256, "vit_small_patch14_reg4_dinov2": 8 * 14}.get(timm, 8 * 16)
    configs = [resized(side, 32, None if timm == "resnet50_clip" else timm) for side in (size, 2 * size)]
    for config in configs:
        if timm == "resnet50_clip":
            config.vision = replace(config.vision, timm=timm, patch_size=None, width=None, layers=None, heads=None)
    before = CLIP(configs[0])
    embeddings = before.state_dict()[f"visual.trunk.{name}"]
    rows = torch.arange(8.0)[:, None].expand(8, 8).reshape(-1, 1).expand(64, embeddings.shape[-1])
    embeddings.view(-1, embeddings.shape[-1])[prefix:] = rows
    after, said = load(configs[1], before.state_dict())
    assert said == [f"visual.trunk.{name} interpolated from {64 + prefix} to {256 + prefix} positions"]
    found = after.state_dict()[f"visual.trunk.{name}"].reshape(-1, embeddings.shape[-1])
    assert torch.equal(found[:prefix], embeddings.view(-1, embeddings.shape[-1])[:prefix])
    grid = found[prefix:].view(16, 16, -1)
    expected = (torch.arange(16.0) - 0.5) / 2
    torch.testing.assert_close(grid[4:-4, :, 0], expected[4:-4, None].expand(8, 16), atol=1e-5, rtol=0)


def test_a_grid_that_is_not_square_is_refused() -> None:
    state = build_model("tiny").state_dict()
    state["visual.trunk.pos_embed"] = torch.zeros(1, 16, 128)  # 15 patches
    with pytest.raises(
        ClipscaleError, match=r"visual.trunk.pos_embed is \[1, 16, 128\], the model's is \[1, 17, 128\]"
    ):
        load(resized(64, 32), state)


def test_weights_in_half_precision() -> None:
    state = {name: tensor.half() for name, tensor in build_model("tiny").state_dict().items()}
    model, said = load(resized(96, 40), state)
    assert len(said) == 2 and model.visual.trunk.pos_embed.dtype == torch.float32
