"""Models of other libraries that clipscale's must equal: small ones of each kind, with weights that hide nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import open_clip
import pytest
import timm
import torch
from timm.models import register_model

from clipscale.config import load_group
from clipscale.config.model import Activation, ImageProjection, Model, ResizeMode, Text, Vision
from clipscale.models import CLIP, build_model
from clipscale.models.vision import TIMM_ACTIVATIONS

# Small ones of each kind of image tower, as open_clip says them and as we do.
SMALL: dict[str, dict[str, Any]] = {
    "tiny": dict(layers=4, width=128, head_width=32, patch_size=16, image_size=64),
    "tiny_quickgelu": dict(layers=4, width=128, head_width=32, patch_size=16, image_size=64),
    "rn50": dict(layers=[3, 4, 6, 3], width=64, image_size=64),
    "convnext_base": dict(timm_model_name="convnext_atto", timm_pool="", timm_proj="linear", image_size=64),
}


def scramble(model: torch.nn.Module) -> None:
    """Every weight and every statistic something of its own: zeros and ones would hide what was swapped."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator) * 0.02
            tensor.copy_(noise.abs() + 0.5 if "running_var" in name else tensor + noise)


def same_state(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def pair(size: int, context: int = 77) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    return images, open_clip.get_tokenizer("ViT-B-32", context_length=context)(["a red circle", "two blue stars left"])


def small(name: str) -> tuple[CLIP, Any]:
    """Our small model of a kind and open_clip's, whose weights are scrambled."""
    vision = SMALL[name]
    config = load_group("model", name, Model)
    config.vision.timm = str(vision.get("timm_model_name", config.vision.timm))
    config.vision.image_size, config.embed_dim, config.context_length = 64, 128, 32
    config.text.width, config.text.layers, config.text.heads = 128, 2, 4
    text = dict(context_length=32, vocab_size=49408, width=128, heads=4, layers=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        other = open_clip.CLIP(128, vision, text, quick_gelu=name.endswith("quickgelu")).eval()
    scramble(other)
    return build_model(config).eval(), other


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


@register_model
def vit_small_patch16_siglip_64(pretrained: bool = False, **options: Any) -> torch.nn.Module:
    """SigLIP's image tower in a small size: open_clip can be told of one by a name alone, and timm has none."""
    sizes = dict(img_size=64, embed_dim=128, depth=3, num_heads=4)
    return timm.create_model("vit_base_patch16_siglip_224", pretrained=pretrained, **sizes | options)


def siglip_config() -> Model:
    """Of a small SigLIP: it sees a caption both ways, with its padding, whose id is also that of the end."""
    return Model(
        name="siglip_small", embed_dim=128, context_length=16, mean=[0.5] * 3, std=[0.5] * 3,
        vision=Vision(
            timm="vit_small_patch16_siglip_64", image_size=64, proj=ImageProjection.none, resize_mode=ResizeMode.squash
        ),
        text=Text(
            width=128, layers=2, heads=4, vocab_size=300, eot_id=1, causal=False, pad_to_context=True, pad_id=1,
            proj_bias=True, norm_eps=1e-6,
        ),
    )  # fmt: skip


def open_clip_siglip(config: Model, **of_vision: Any) -> Any:
    """open_clip's SigLIP of the sizes of ours, with scrambled weights."""
    text = config.text
    act_kwargs = {"approximate": "tanh"} if (text.activation or config.activation) is Activation.gelu_tanh else None
    model = open_clip.CustomTextCLIP(
        config.embed_dim,
        dict(
            image_size=config.vision.image_size, timm_model_name=config.vision.timm, timm_pool="map", timm_proj="none",
        ) | of_vision,
        dict(
            context_length=config.context_length, vocab_size=text.vocab_size, width=text.width, heads=text.heads,
            layers=text.layers, mlp_ratio=text.mlp_ratio, no_causal_mask=True, proj_bias=True, pool_type="last",
            norm_kwargs={"eps": 1e-6}, act_kwargs=act_kwargs,
        ),
        init_logit_scale=math.log(10), init_logit_bias=-10.0,
    ).eval()  # fmt: skip
    scramble(model)
    _lean(model.visual.trunk.attn_pool.mlp.fc2.bias, model.text.text_projection.bias)
    return model


def hf_siglip(config: Model, layers: int = 3) -> Any:
    """Hugging Face's SiglipModel of the sizes of ours, with scrambled weights."""
    transformers = pytest.importorskip("transformers")
    text, image = config.text, TIMM_ACTIVATIONS[config.activation].replace("gelu_tanh", "gelu_pytorch_tanh")
    width = config.embed_dim
    sizes = dict(hidden_size=width, intermediate_size=4 * width, num_attention_heads=text.heads)
    there = transformers.SiglipConfig(
        text_config=dict(
            **sizes, vocab_size=text.vocab_size, num_hidden_layers=text.layers,
            max_position_embeddings=config.context_length, projection_size=config.embed_dim, hidden_act=image,
            bos_token_id=0, eos_token_id=text.eot_id, pad_token_id=text.pad_id,
        ),
        vision_config=dict(
            **sizes, num_hidden_layers=layers, image_size=config.vision.image_size, patch_size=16, hidden_act=image,
        ),
    )  # fmt: skip
    model = transformers.SiglipModel(there).eval()
    with torch.no_grad():
        model.logit_scale.fill_(math.log(10))
        model.logit_bias.fill_(-10)
    scramble(model)
    _lean(model.vision_model.head.mlp.fc2.bias, model.text_model.head.bias)
    return model


@torch.no_grad()
def _lean(image: torch.Tensor, text: torch.Tensor) -> None:
    """Turn the features of both towers into one direction: of similarities that are zero but for rounding, so would be
    the gradient of what multiplies them."""
    direction = torch.randn(image.shape, generator=torch.Generator().manual_seed(2))
    image += direction
    text += direction


def assert_same_features(
    ours: CLIP, their_image: torch.Tensor, their_text: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """To 1e-5 of unit vectors."""
    with torch.no_grad():
        image, text = ours.encode_image(batch[0], normalize=True), ours.encode_text(batch[1], normalize=True)
    normalize = torch.nn.functional.normalize
    torch.testing.assert_close(image, normalize(their_image, dim=-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(text, normalize(their_text, dim=-1), atol=1e-5, rtol=0)
