"""What weights do not show of a model, as values of ``model.*`` keys without that prefix: by itself, by open_clip's
configuration, by Hugging Face's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipscale.config.model import Activation, Model, ResizeMode, TextPool, text_activation
from clipscale.errors import ClipscaleError
from clipscale.models import CLIP
from clipscale.models.hf import HFTextTower
from clipscale.models.vision import trunk_activation

# Our activations, as Hugging Face calls them.
HF_ACTIVATIONS = {"gelu": "gelu", "quickgelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def tell(model: CLIP) -> dict[str, Any]:
    """By the model itself."""
    config = model.config
    told: dict[str, Any] = {
        "activation": config.activation.value,
        "mean": list(config.mean),
        "std": list(config.std),
    }
    if isinstance(model.text, HFTextTower):
        told["text.hf_pool"] = model.text.pool.value
    else:
        told |= _tell_text(config)
    blocks = getattr(model.visual.trunk, "blocks", None)
    if blocks is not None and hasattr(blocks[0], "attn"):
        told["vision.heads"] = blocks[0].attn.num_heads
    return told


def _tell_text(config: Model) -> dict[str, Any]:
    text = config.text
    told = {
        "text.heads": text.heads,
        "text.activation": text_activation(config).value,
        "text.causal": text.causal,
        "text.pool": text.pool.value,
        "text.pad_to_context": text.pad_to_context,
        "text.norm_eps": text.norm_eps,
        "text.eot_id": text.eot_id,
    }
    return told | ({"text.pad_id": text.pad_id} if text.pad_to_context else {})


def activation_of(name: str, tag: str) -> str:
    """What open_clip's weights ``tag`` of the model ``name`` were trained with.

    The tag tells it: open_clip also puts OpenAI's weights into its model of another activation, with a warning.
    """
    from open_clip import get_pretrained_cfg

    return _open_clip_activation({}, bool(get_pretrained_cfg(name, tag).get("quick_gelu")))


def told_by_open_clip(config: Mapping[str, Any]) -> dict[str, Any]:
    """By an ``open_clip_config.json``. Raises ClipscaleError for a text tower that clipscale's cannot be."""
    model, images = config.get("model_cfg") or {}, config.get("preprocess_cfg") or {}
    text, vision, quick = model.get("text_cfg", {}), model.get("vision_cfg", {}), bool(model.get("quick_gelu"))
    of_text = _open_clip_activation(text, quick)
    timm_name = vision.get("timm_model_name")
    vit = not timm_name and not isinstance(vision.get("layers"), list)  # CLIP's own
    told = {
        # timm's ViTs have their own, whatever open_clip says; ResNets and timm's others take none.
        "activation": trunk_activation(timm_name)
        if timm_name
        else (_open_clip_activation(vision, quick) if vit else None),
        "mean": of_channels(images.get("mean")),
        "std": of_channels(images.get("std")),
        "vision.resize_mode": images.get("resize_mode"),
        "text.heads": text.get("heads"),
        "text.activation": of_text,
        "text.norm_eps": (text.get("norm_kwargs") or {}).get("eps", 1e-5),
    }
    if vit:
        told["vision.heads"] = vision.get("width", 768) // vision.get("head_width", 64)
    return {key: value for key, value in told.items() if value is not None} | _pool_of_open_clip(text)


def of_channels(value: Any) -> list[float] | None:
    """One number for each of three channels, or one for all. Raises ValueError for anything else."""
    if value is None:
        return None
    each = [float(one) for one in (value if isinstance(value, list | tuple) else [value] * 3)]
    if len(each) != 3:
        raise ValueError(f"{value} are not three numbers")
    return each


def _open_clip_activation(tower: Mapping[str, Any], quick: bool) -> str:
    if quick:
        return Activation.quickgelu.value
    approximate = (tower.get("act_kwargs") or {}).get("approximate", "none")
    return (Activation.gelu_tanh if approximate == "tanh" else Activation.gelu).value


def _pool_of_open_clip(text: Mapping[str, Any]) -> dict[str, Any]:
    """What a text tower of open_clip sees and pools: it attends to padding, and its ``last`` token may be one."""
    both_ways, pool = bool(text.get("no_causal_mask")), text.get("pool_type", "argmax")
    if pool not in ("last", "argmax", "eos") or (both_ways and pool != "last"):
        raise ClipscaleError(
            f"its text tower is pooled by pool_type={pool}{', no_causal_mask' if both_ways else ''}; clipscale's can "
            "be by last, or, if causal, by argmax or eos"
        )
    told = {"text.causal": not both_ways, "text.pool": TextPool.last.value, "text.pad_to_context": pool == "last"}
    if pool == "eos":
        return told | {"text.eot_id": text.get("eos_id", 2)}
    # The largest id ends a caption, as CLIP's does, and 0 fills it; other tokenizers are asked themselves.
    own = pool == "argmax" or not text.get("hf_tokenizer_name")
    ids = {"text.eot_id": text.get("vocab_size", 49408) - 1} | ({"text.pad_id": 0} if pool == "last" else {})
    return told | (ids if own else {})


def told_by_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """By a ``config.json``. Raises ClipscaleError for another model than a CLIPModel or a SiglipModel."""
    kind = config.get("model_type")
    if kind not in ("clip", "siglip"):
        raise ClipscaleError(f"config.json says model_type={kind}; only clip and siglip can be loaded")
    text, vision = (of_part(config, name) for name in ("text_config", "vision_config"))
    # Values that Hugging Face leaves out of old files are those of CLIP, or of SigLIP.
    heads, activation, eps = (8, "quick_gelu", 1e-5) if kind == "clip" else (12, "gelu_pytorch_tanh", 1e-6)
    if vision.get("layer_norm_eps", eps) != eps:
        raise ClipscaleError(f"its image tower has layer_norm_eps={vision['layer_norm_eps']}; clipscale's has {eps}")
    told = {
        "activation": _activation(vision.get("hidden_act", activation)),
        "text.activation": _activation(text.get("hidden_act", activation)),
        "text.heads": text.get("num_attention_heads", heads),
        "vision.heads": vision.get("num_attention_heads", 12),
        "text.norm_eps": text.get("layer_norm_eps", eps),
        "text.causal": kind == "clip",
        "text.pool": TextPool.last.value,
        "text.pad_to_context": kind == "siglip",
    }
    if kind == "siglip":  # pooled at the last position, whatever stands there
        return told | {"text.pad_id": text.get("pad_token_id", 1)}
    end = text.get("eos_token_id", 49407)  # 2 stands for the largest id, in old files
    return told | {"text.eot_id": text.get("vocab_size", 49408) - 1 if end == 2 else end}


def resize_by_hf(images: Mapping[str, Any]) -> dict[str, Any]:
    """How images become square, by a ``preprocessor_config.json``, as far as that says it."""
    size = images.get("size")
    if images.get("do_center_crop") or (isinstance(size, Mapping) and "shortest_edge" in size):
        return {"vision.resize_mode": ResizeMode.shortest.value}
    return {"vision.resize_mode": ResizeMode.squash.value} if isinstance(size, Mapping) and "height" in size else {}


def of_part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A tower's part. Old files of CLIP have it twice, and transformers takes the second, and its own defaults."""
    older = config.get(f"{name}_dict") if config.get("model_type") == "clip" else None
    return (config.get(name) or {}) if older is None else older


def _activation(name: str) -> str:
    if name not in HF_ACTIVATIONS.values():
        raise ClipscaleError(f"it has the activation {name}; clipscale's towers have {', '.join(HF_ACTIVATIONS)}")
    return next(own for own, theirs in HF_ACTIVATIONS.items() if theirs == name)
