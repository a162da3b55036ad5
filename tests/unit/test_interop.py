"""Weights under other libraries' names: nothing is lost, no bit changes, and the features are those of that library."""

from __future__ import annotations

import re
from typing import Any

import open_clip
import pytest
import torch

from clipscale.checkpoint.covered import model_of_open_clip
from clipscale.checkpoint.interop import from_hf, from_open_clip, to_hf, to_open_clip
from clipscale.config import load_group
from clipscale.config.model import Model
from clipscale.data.tokenizer import Tokenizer
from clipscale.errors import ClipscaleError
from clipscale.models import CLIP
from tests.peers import SMALL, assert_same_features, hf_model, pair, same_state, scramble, small

# Of each family that open_clip has, the twin that it is.
TWINS = {
    "vit_s_16": "ViT-S-16",
    "vit_b_32": "ViT-B-32",
    "vit_b_32_quickgelu": "ViT-B-32-quickgelu",
    "vit_b_16": "ViT-B-16",
    "vit_b_16_quickgelu": "ViT-B-16-quickgelu",
    "vit_l_14": "ViT-L-14",
    "vit_l_14_336": "ViT-L-14-336",
    "vit_h_14": "ViT-H-14",
    "vit_g_14": "ViT-g-14",
    "vit_bigg_14": "ViT-bigG-14",
    "rn50": "RN50",
    "rn101": "RN101",
    "rn50x4": "RN50x4",
    "rn50x16": "RN50x16",
    "rn50x64": "RN50x64",
    "convnext_base": "convnext_base",
    "siglip_b_16": "ViT-B-16-SigLIP",
    "so400m_14": "ViT-SO400M-14-SigLIP",
}


def theirs(name: str) -> Any:
    config = open_clip.get_model_config(TWINS[name])
    config.pop("custom_text", None)
    return (open_clip.CustomTextCLIP if "SigLIP" in TWINS[name] else open_clip.CLIP)(**config)


@pytest.mark.parametrize("name", TWINS)
def test_every_models_weights_have_open_clips_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        other = theirs(name).state_dict()
        bias = -10.0 if "logit_bias" in other else None
        ours = CLIP(load_group("model", name, Model), logit_bias=bias).state_dict()
    there = to_open_clip(ours)
    assert {k: t.shape for k, t in there.items()} == {k: t.shape for k, t in other.items()}
    back = from_open_clip(other)
    assert {k: t.shape for k, t in back.items()} == {k: t.shape for k, t in ours.items()}


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_features_are_open_clips_and_no_bit_changes(name: str) -> None:
    ours, other = small(name)
    ours.load_state_dict(from_open_clip(other.state_dict()))
    same_state(to_open_clip(ours.state_dict()), other.state_dict())
    batch = pair(64, 32)
    assert_same_features(ours, other.encode_image(batch[0]), other.encode_text(batch[1]), batch)


@torch.no_grad()
def test_a_caption_ends_where_open_clips_does() -> None:
    ours, other = small("tiny")
    ours.load_state_dict(from_open_clip(other.state_dict()))
    captions = ["a red <end_of_text> circle", "<end_of_text>", "a red circle", ""]
    theirs = open_clip.get_tokenizer("ViT-B-32", context_length=32)(captions)
    for ids in (theirs, Tokenizer("clip", 32)(captions)):
        torch.testing.assert_close(ours.encode_text(ids), other.encode_text(theirs), atol=1e-6, rtol=1e-5)


def test_custom_text_and_bias() -> None:
    _, plain = small("tiny")
    vision, text = SMALL["tiny"], dict(context_length=32, vocab_size=49408, width=128, heads=4, layers=2)
    custom = open_clip.CustomTextCLIP(128, vision, text, init_logit_bias=-10.0)
    state = {**plain.state_dict(), "logit_bias": torch.tensor(-10.0)}
    in_custom = {
        name if name.startswith(("visual.", "logit_")) else f"text.{name}": tensor for name, tensor in state.items()
    }
    custom.load_state_dict(in_custom)
    found = from_open_clip(custom.state_dict())
    assert found["temperature.logit_bias"].shape == found["temperature.logit_scale"].shape == (1,)
    same_state(to_open_clip(found), state)


def test_openais_archives_hold_more_than_weights_in_half_precision() -> None:
    state = {name: tensor.half() for name, tensor in small("tiny")[1].state_dict().items()}
    extras = {"input_resolution": torch.tensor(224), "context_length": torch.tensor(77), "vocab_size": torch.tensor(9)}
    found = from_open_clip(state | extras)
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}
    same_state(to_open_clip(found), state)


def test_another_architecture_is_one_line() -> None:
    with torch.device("meta"):
        state = build_state("vit_b_32")
    with pytest.raises(
        ClipscaleError, match=r"1 of 303 weights have no place in clipscale's towers: visual.attn_pool.q"
    ):
        from_open_clip(state | {"visual.attn_pool.q": torch.zeros(1)})
    with pytest.raises(ClipscaleError, match="no logit_bias"):
        to_hf(from_open_clip(state | {"logit_bias": torch.zeros(())}))
    with torch.device("meta"), pytest.raises(ClipscaleError, match="no image tower but CLIP's ViT and SigLIP's"):
        to_hf(CLIP(load_group("model", "rn50", Model)).state_dict())
    with pytest.raises(ClipscaleError, match="another architecture"):
        from_hf(state)


def build_state(name: str) -> dict[str, torch.Tensor]:
    return to_open_clip(CLIP(load_group("model", name, Model)).state_dict())


@torch.no_grad()
def test_features_are_hugging_faces_and_no_bit_changes() -> None:
    other = hf_model()
    ours = CLIP(load_group("model", "tiny_quickgelu", Model)).eval()
    ours.load_state_dict(from_hf(other.state_dict()))
    same_state(to_hf(ours.state_dict()), other.state_dict())
    batch = pair(64, 32)
    out = other(pixel_values=batch[0], input_ids=batch[1])
    assert_same_features(ours, out.image_embeds, out.text_embeds, batch)


@pytest.mark.slow
@torch.no_grad()
def test_hugging_faces_model_of_the_real_size() -> None:
    transformers = pytest.importorskip("transformers")
    other = transformers.CLIPModel(transformers.CLIPConfig()).eval()  # ViT-B/32
    scramble(other)
    ours = CLIP(load_group("model", "vit_b_32_quickgelu", Model)).eval()
    ours.load_state_dict(from_hf(other.state_dict()))
    same_state(to_hf(ours.state_dict()), other.state_dict())
    batch = pair(224)
    out = other(pixel_values=batch[0], input_ids=batch[1])
    assert_same_features(ours, out.image_embeds, out.text_embeds, batch)


def covered(name: str) -> str | None:
    """Why clipscale cannot be open_clip's model ``name``; None where its weights keep their names and shapes."""
    config = open_clip.get_model_config(name)
    try:
        own = model_of_open_clip(config, name)
    except ClipscaleError as error:
        return str(error)
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    with torch.device("meta"):
        other = kind(**config).state_dict()
        ours = CLIP(own, logit_bias=0.0 if "init_logit_bias" in config else None).state_dict()
    found = from_open_clip(other)
    assert {k: t.shape for k, t in found.items()} == {k: t.shape for k, t in ours.items()}, name
    names = {key.removeprefix("text.") for key in other}  # a custom text tower has a prefix
    assert {key.removeprefix("text.") for key in to_open_clip(ours)} == names, name
    return None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ViT-B-32-256", None),
        ("RN50-quickgelu", None),
        ("vit_relpos_medium_patch16_cls_224", None),
        ("ViT-M-16-alt", "layer scale in its image tower"),
        ("ViT-L-14-CLIPA", "an image tower without a norm before its blocks|pooled by"),
        ("EVA02-B-16", "projects by its own head"),
        ("convnext_large_d", "timm_proj=mlp"),
        ("MobileCLIP-S1", "sees captions both ways"),
        ("roberta-ViT-B-32", "Hugging Face's roberta-base"),
        ("coca_ViT-B-32", "no decoder"),
        ("ViT-SO400M-16-SigLIP-i18n-256", "proj_type=none"),
    ],
)
def test_which_models_of_open_clip_are_covered(name: str, reason: str | None) -> None:
    found = covered(name)
    assert found is None if reason is None else found is not None and re.search(reason, found), found


@pytest.mark.slow
def test_every_model_of_open_clip_is_covered_or_says_why() -> None:
    found = {name: covered(name) for name in open_clip.list_models()}
    refused = {name: reason for name, reason in found.items() if reason is not None}
    print("\n", len(found) - len(refused), "of", len(found), "covered", *refused.items(), sep="\n")
    assert all("\n" not in reason for reason in refused.values())
