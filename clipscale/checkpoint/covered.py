"""Model configurations of open_clip and Hugging Face as clipscale's, or why not."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from clipscale.checkpoint.told import of_part
from clipscale.config.model import Activation, ImageProjection, Model, Text, TextPool, Vision
from clipscale.errors import ClipscaleError
from clipscale.models.parts import RESNETS, VITS
from clipscale.models.vision import trunk_activation, trunk_pool

_ATTENTION = {
    "qk_norm": "norms of queries and keys",
    "scaled_cosine_attn": "attention by scaled cosines",
    "scale_heads": "scaled heads",
    "scale_attn_inner": "a norm before the projection of its attention",
    "scale_attn": "a norm after its attention",
    "scale_fc": "a norm inside its MLPs",
}
# Configuration keys of towers that clipscale's do not have, when they are set, and what they say.
_VISION = {
    "attentional_pool": "an image tower pooled by attention of CoCa's kind",
    "ls_init_value": "layer scale in its image tower",
    "no_ln_pre": "an image tower without a norm before its blocks",
    "output_tokens": "an image tower that gives all its tokens",
    **{key: f"{meaning} in its image tower" for key, meaning in _ATTENTION.items()},
}
_TEXT = {
    "embed_cls": "a class token of its own in its text tower",
    "ls_init_value": "layer scale in its text tower",
    "output_tokens": "a text tower that gives all its tokens",
    **{key: f"{meaning} in its text tower" for key, meaning in _ATTENTION.items()},
}
# Values of further keys of an image tower, the only ones that clipscale's has, where they are set.
_VISION_ALONE = {"pool_type": "tok", "pos_embed_type": "learnable"}
# Those of timm whose MLPs have a width of their own, and one for the others.
_SIGLIPS = {"base": "vit_base_patch16_siglip_224", "so400m": "vit_so400m_patch14_siglip_224"}
NORM_EPS = 1e-5  # of timm's vit_*_clip_*


def model_of_open_clip(config: Mapping[str, Any], name: str = "model") -> Model:
    """The configuration of the model that open_clip makes of ``config``, what its JSON files hold; not how it
    normalises images.

    Raises ClipscaleError that says what clipscale's towers cannot be.
    """
    _check_parts(config)
    if "multimodal_cfg" in config:
        raise ClipscaleError("it writes captions (CoCa): clipscale's models have no decoder")
    quick = bool(config.get("quick_gelu"))
    text = _text(config["text_cfg"], quick)
    vision, activation = _vision(config["vision_cfg"], quick)
    context = config["text_cfg"].get("context_length", 77)
    model = Model(name, config["embed_dim"], context, activation, vision, text)
    if text.activation is activation:
        text.activation = None
    return model


def model_of_hf(config: Mapping[str, Any], name: str) -> Model:
    """The architecture of Hugging Face's CLIPModel or SiglipModel by its ``config.json``, without what
    :func:`clipscale.checkpoint.told.told_by_hf` tells. Raises ClipscaleError for one that clipscale's towers cannot be.
    """
    text, vision = of_part(config, "text_config"), of_part(config, "vision_config")
    siglip = config.get("model_type") == "siglip"
    widths = (768, 768) if siglip else (512, 768)
    width, wide = text.get("hidden_size", widths[0]), vision.get("hidden_size", widths[1])
    dim = text.get("projection_size", width) if siglip else config.get("projection_dim", 512)
    inner, deep = text.get("intermediate_size", 4 * widths[0]), vision.get("intermediate_size", 4 * widths[1])
    tower = Text(
        width=width, layers=text.get("num_hidden_layers", 12), heads=text.get("num_attention_heads", width // 64),
        mlp_ratio=(inner + 0.5) / width,  # which is rounded down, and half a unit more survives the division
        vocab_size=text.get("vocab_size", 32000 if siglip else 49408), proj_bias=siglip,
    )  # fmt: skip
    images = Vision(
        timm=_timm_of(wide, deep, siglip), image_size=vision.get("image_size", 224),
        patch_size=vision.get("patch_size", 16 if siglip else 32), width=wide,
        layers=vision.get("num_hidden_layers", 12), heads=vision.get("num_attention_heads", 12),
        proj=ImageProjection.none if siglip else ImageProjection.linear,
    )  # fmt: skip
    context = text.get("max_position_embeddings", 64 if siglip else 77)
    return Model(name, dim, context, vision=images, text=tower)


def _timm_of(width: int, mlp: int, siglip: bool) -> str:
    """A ViT of timm whose MLPs are ``mlp`` wide at this width; patches, depth and heads are set beside it."""
    kinds = [kind for kind, (own, _, _, inner) in VITS.items() if (own, inner) == (width, mlp)]
    if not kinds and mlp != 4 * width:
        raise ClipscaleError(f"it has a ViT of width={width} whose MLPs are {mlp} wide, which timm does not have")
    if siglip:
        return _SIGLIPS.get(kinds[0] if kinds else "base", _SIGLIPS["base"])
    patch = 14 if kinds and kinds[0] in ("giant", "gigantic") else 16
    return f"vit_{kinds[0] if patch == 14 else 'base'}_patch{patch}_clip_224"


def with_told(model: Model, told: Mapping[str, Any]) -> Model:
    """The same model with values of its keys, as :mod:`clipscale.checkpoint.told` has them."""
    for key, value in told.items():
        place, _, name = key.rpartition(".")
        part: Any = getattr(model, place) if place else model
        # An activation that a text tower shares with the images has no value of its own, and no type.
        kind = Activation if name == "activation" else type(getattr(part, name))
        setattr(part, name, kind(value) if issubclass(kind, Enum) else value)
    if model.text.activation is model.activation:
        model.text.activation = None
    return model


def _check_parts(config: Mapping[str, Any]) -> None:
    for key, inner in (("text_cfg", None), ("vision_cfg", "image_size")):
        if not isinstance(config.get(key), Mapping) or (inner and inner not in config[key]):
            raise ClipscaleError(f"its configuration of a model has no {key}{f' with {inner}' if inner else ''}")
    if "embed_dim" not in config:
        raise ClipscaleError("its configuration of a model has no embed_dim")


def _refuse_keys(tower: Mapping[str, Any], refused: Mapping[str, str]) -> None:
    for key, meaning in refused.items():
        if tower.get(key) not in (None, False):
            raise ClipscaleError(f"it has {meaning} ({key}={tower[key]}), which clipscale's do not have")


def _of_gelu(tower: Mapping[str, Any], quick: bool) -> Activation:
    if quick:
        return Activation.quickgelu
    tanh = (tower.get("act_kwargs") or {}).get("approximate") == "tanh"
    return Activation.gelu_tanh if tanh else Activation.gelu


def _text(tower: Mapping[str, Any], quick: bool) -> Text:
    if hf := tower.get("hf_model_name"):
        raise ClipscaleError(f"its text tower is Hugging Face's {hf}, whose weights open_clip names otherwise")
    _refuse_keys(tower, _TEXT)
    if other := (tower.get("norm_kwargs") or {}).keys() - {"eps"}:
        raise ClipscaleError(f"the norms of its text tower have {min(other)}, which clipscale's do not have")
    both_ways, pool = bool(tower.get("no_causal_mask")), tower.get("pool_type", "argmax")
    if pool not in ("last", "argmax", "eos") or (both_ways and pool != "last"):
        raise ClipscaleError(
            f"its text tower sees captions {'both ways' if both_ways else 'causally'}, padding too, and is pooled by "
            f"pool_type={pool}; clipscale's by last, or, if causal, by argmax or eos"
        )
    if tower.get("proj_type", "linear") != "linear":
        raise ClipscaleError(f"its text tower has proj_type={tower['proj_type']}; clipscale's has a linear projection")
    vocabulary = tower.get("vocab_size", 49408)
    return Text(
        width=tower.get("width", 512), layers=tower.get("layers", 12), heads=tower.get("heads", 8),
        mlp_ratio=tower.get("mlp_ratio", 4.0), vocab_size=vocabulary,
        eot_id=tower["eos_id"] if pool == "eos" else vocabulary - 1, causal=not both_ways, pool=TextPool.last,
        pad_to_context=pool == "last", proj_bias=bool(tower.get("proj_bias")),
        norm_eps=(tower.get("norm_kwargs") or {}).get("eps", 1e-5), activation=_of_gelu(tower, quick),
    )  # fmt: skip


def _vision(tower: Mapping[str, Any], quick: bool) -> tuple[Vision, Activation]:
    size = tower["image_size"]
    if timm_name := tower.get("timm_model_name"):
        trunk = _of_timm(timm_name, tower)
        own = trunk_activation(timm_name)
        return trunk, Activation(own) if own else Activation.gelu
    _refuse_keys(tower, _VISION)
    for key, only in _VISION_ALONE.items():
        if tower.get(key, only) != only:
            raise ClipscaleError(f"its image tower has {key}={tower[key]}; clipscale's of CLIP have {only}")
    if (norms := tower.get("norm_kwargs") or {}) not in ({}, {"eps": NORM_EPS}):
        raise ClipscaleError(f"its image tower has norm_kwargs={dict(norms)}; clipscale's of CLIP have eps={NORM_EPS}")
    width, layers = tower.get("width", 768), tower.get("layers", 12)
    if isinstance(layers, list):
        found = [name for name, sizes in RESNETS.items() if sizes == (tuple(layers), width)]
        if not found:
            raise ClipscaleError(f"it has a ResNet of layers={layers}, width={width}, which timm does not have")
        if tower.get("head_width", 64) != 64:
            raise ClipscaleError(f"its ResNet has head_width={tower['head_width']}; timm's have 64")
        return Vision(timm=found[0], image_size=size), Activation.quickgelu if quick else Activation.gelu
    hidden = int(width * tower.get("mlp_ratio", 4.0))
    vision = Vision(
        timm=_timm_of(width, hidden, siglip=False), image_size=size,
        patch_size=tower.get("patch_size", 16), width=width, layers=layers, heads=width // tower.get("head_width", 64),
    )  # fmt: skip
    return vision, _of_gelu(tower, quick)


def _of_timm(name: str, tower: Mapping[str, Any]) -> Vision:
    proj, pool = tower.get("timm_proj", "linear"), tower.get("timm_pool", "avg")
    if proj is None:
        raise ClipscaleError(f"its image tower {name} projects by its own head; clipscale's by a linear layer or none")
    if proj not in ("linear", "none"):
        raise ClipscaleError(f"its image tower {name} has timm_proj={proj}; clipscale's has linear or none")
    if pool not in ("", None, trunk_pool(name)):
        raise ClipscaleError(f"its image tower {name} is pooled by timm_pool={pool}; clipscale's as timm makes it")
    return Vision(timm=name, image_size=tower["image_size"], proj=ImageProjection(proj))
