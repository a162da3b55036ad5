"""Models of other libraries that clipscale's must equal: small ones of each kind, with weights that hide nothing."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch

from clipscale.config import load_group
from clipscale.config.model import Model
from clipscale.models import CLIP

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
    return CLIP(config).eval(), other


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


def assert_same_features(
    ours: CLIP, their_image: torch.Tensor, their_text: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """To 1e-5 of unit vectors."""
    with torch.no_grad():
        image, text = ours.encode_image(batch[0], normalize=True), ours.encode_text(batch[1], normalize=True)
    normalize = torch.nn.functional.normalize
    torch.testing.assert_close(image, normalize(their_image, dim=-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(text, normalize(their_text, dim=-1), atol=1e-5, rtol=0)
