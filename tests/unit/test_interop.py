"""Weights under other libraries' names: nothing is lost, no bit changes, and the features are those of that library."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch

from clipscale.checkpoint.interop import from_hf, from_open_clip, to_hf, to_open_clip
from clipscale.config import load_group
from clipscale.config.model import Model
from clipscale.errors import ClipscaleError
from clipscale.models import CLIP, build_model

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
}
# Small ones of each kind of image tower, as open_clip says them and as we do.
SMALL: dict[str, dict[str, Any]] = {
    "tiny": dict(layers=4, width=128, head_width=32, patch_size=16, image_size=64),
    "tiny_quickgelu": dict(layers=4, width=128, head_width=32, patch_size=16, image_size=64),
    "rn50": dict(layers=[3, 4, 6, 3], width=64, image_size=64),
    "convnext_base": dict(timm_model_name="convnext_atto", timm_pool="", timm_proj="linear", image_size=64),
}


def small(name: str) -> tuple[CLIP, Any]:
    """Our small model of a kind and open_clip's, whose weights are scrambled."""
    vision = SMALL[name]
    config = load_group("model", name, Model)
    config.vision.timm = str(vision.get("timm_model_name", config.vision.timm))
    config.vision.image_size, config.embed_dim, config.context_length = 64, 128, 32
    config.text.width, config.text.layers, config.text.heads = 128, 2, 4
    text = dict(context_length=32, vocab_size=49408, width=128, heads=4, layers=2)
    other = open_clip.CLIP(128, vision, text, quick_gelu=name.endswith("quickgelu")).eval()
    scramble(other)
    return CLIP(config).eval(), other


def theirs(name: str) -> Any:
    config = open_clip.get_model_config(TWINS[name])
    config.pop("custom_text", None)
    return open_clip.CLIP(**config)


def scramble(model: torch.nn.Module) -> None:
    """Every weight and every statistic something of its own: zeros and ones would hide what was swapped."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator) * 0.02
            tensor.copy_(noise.abs() + 0.5 if "running_var" in name else tensor + noise)


def pair(size: int, context: int = 77) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    return images, open_clip.get_tokenizer("ViT-B-32", context_length=context)(["a red circle", "two blue stars left"])


def same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def assert_same_features(
    ours: CLIP, their_image: torch.Tensor, their_text: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """To 1e-5 of unit vectors."""
    with torch.no_grad():
        image, text = ours.encode_image(batch[0], normalize=True), ours.encode_text(batch[1], normalize=True)
    normalize = torch.nn.functional.normalize
    torch.testing.assert_close(image, normalize(their_image, dim=-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(text, normalize(their_text, dim=-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", TWINS)
def test_every_models_weights_have_open_clips_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        ours = CLIP(load_group("model", name, Model)).state_dict()
        other = theirs(name).state_dict()
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
    with torch.device("meta"), pytest.raises(ClipscaleError, match="no image tower but CLIP's ViT"):
        to_hf(CLIP(load_group("model", "rn50", Model)).state_dict())
    with pytest.raises(ClipscaleError, match="another architecture"):
        from_hf(state)


def build_state(name: str) -> dict[str, torch.Tensor]:
    return to_open_clip(CLIP(load_group("model", name, Model)).state_dict())


def hf_model(activation: str = "quick_gelu") -> Any:
    """Hugging Face's CLIPModel of the sizes of our `tiny`, with scrambled weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig(
        text_config=dict(
            hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=32, hidden_act=activation,
        ),
        vision_config=dict(
            hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
            image_size=64, patch_size=16, hidden_act=activation,
        ),
        projection_dim=128,
    )  # fmt: skip
    model = transformers.CLIPModel(config).eval()
    scramble(model)
    return model


@torch.no_grad()
def test_features_are_hugging_faces_and_no_bit_changes() -> None:
    other = hf_model()
    ours = build_model("tiny_quickgelu").eval()
    ours.load_state_dict(from_hf(other.state_dict()))
    same_state(to_hf(ours.state_dict()), other.state_dict())
    batch = pair(64, 32)
    out = other(pixel_values=batch[0], input_ids=batch[1])
    assert_same_features(ours, out.image_embeds, out.text_embeds, batch)
