"""A model as a directory that another library loads: open_clip, Hugging Face transformers, ONNX runtimes, or
clipscale itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from clipscale.checkpoint.interop import State, is_clip_resnet, is_clip_vit, is_siglip, to_hf, to_open_clip
from clipscale.checkpoint.onnx import write_graphs
from clipscale.checkpoint.own import EXPORTED, TOKENIZER
from clipscale.checkpoint.pretrained import HF_CONFIG, HF_IMAGES, OPEN_CLIP_CONFIG
from clipscale.checkpoint.told import HF_ACTIVATIONS, tell
from clipscale.config import Config, save_config
from clipscale.config.data import Builtin, Data
from clipscale.config.data import Tokenizer as TokenizerConfig
from clipscale.config.hub import shareable
from clipscale.config.model import Activation, ImageProjection, Model, ResizeMode, TextPool, text_activation
from clipscale.data.tokenizer import Tokenizer, byte_pairs, shareable_name
from clipscale.errors import ClipscaleError
from clipscale.models import CLIP
from clipscale.models.vision import trunk_activation, trunk_pool

ONNX_CONFIG = "clipscale.json"
START, END = "<|startoftext|>", "<|endoftext|>"  # as Hugging Face writes the tokens that open_clip names otherwise


def write_open_clip(model: CLIP, tokenizer: Tokenizer, out: Path) -> None:
    """Files that ``open_clip.create_model_and_transforms("local-dir:OUT")`` loads.

    Raises ClipscaleError for what open_clip cannot be told: a changed timm ViT, or a text tower that is pooled as none
    of open_clip's, or sees another padding than the tokenizer's.
    """
    config, state = model.config, model.state_dict()
    vision, text = _open_clip_vision(model), _open_clip_text(config, tokenizer)
    text |= tokenizer.write_for_open_clip(out)
    content: dict[str, Any] = {"embed_dim": config.embed_dim, "vision_cfg": vision, "text_cfg": text}
    if text_activation(config) is Activation.quickgelu:
        content["quick_gelu"] = True
    if "text.proj.bias" in state:
        content["custom_text"] = True
    if model.temperature.logit_bias is not None:
        content["init_logit_bias"] = 0.0  # the weights hold its value; this makes a place for it
    images = {
        "mean": list(config.mean),
        "std": list(config.std),
        "interpolation": "bicubic",
        "resize_mode": config.vision.resize_mode.value,
        "fill_color": 255,
    }
    _write_weights(to_open_clip(state), out / "open_clip_model.safetensors")
    _write_json({"model_cfg": content, "preprocess_cfg": images}, out / OPEN_CLIP_CONFIG)


def _open_clip_text(config: Model, tokenizer: Tokenizer) -> dict[str, Any]:
    text = config.text
    # open_clip's towers see the padding that its tokenizer makes.
    last = text.pad_to_context and text.pad_id == tokenizer.pad_id
    if text.pool is not TextPool.last or not (last or (text.causal and not text.pad_to_context)):
        raise ClipscaleError(
            f"open_clip has no text tower with model.text.pool={text.pool.value}, causal={text.causal}, "
            f"pad_to_context={text.pad_to_context}, pad_id={text.pad_id}; use --to safetensors"
        )
    told: dict[str, Any] = dict(
        context_length=config.context_length,
        vocab_size=text.vocab_size,
        width=text.width,
        heads=text.heads,
        layers=text.layers,
        mlp_ratio=text.mlp_ratio,
        norm_kwargs={"eps": text.norm_eps},
        no_causal_mask=not text.causal,
        proj_bias=text.proj_bias,
        # The end of a caption is the largest id of CLIP's.
        pool_type="last" if last else "argmax" if tokenizer.is_bpe else "eos",
        eos_id=text.eot_id,
    )
    return told | _tanh(text_activation(config))


def _tanh(activation: Activation) -> dict[str, Any]:
    return {"act_kwargs": {"approximate": "tanh"}} if activation is Activation.gelu_tanh else {}


def _open_clip_vision(model: CLIP) -> dict[str, Any]:
    config, vision, trunk, state = model.config, model.config.vision, model.visual.trunk, model.state_dict()
    if is_clip_vit(state):
        activations = {config.activation, text_activation(config)}
        if len(activations) > 1 and Activation.quickgelu in activations:
            raise ClipscaleError("open_clip cannot be told of quickgelu in one tower alone; use --to safetensors")
        block = trunk.blocks[0]
        width = trunk.embed_dim
        return dict(
            image_size=vision.image_size,
            patch_size=trunk.patch_embed.patch_size[0],
            width=width,
            layers=len(trunk.blocks),
            head_width=width // block.attn.num_heads,
            # open_clip rounds the product down: half a unit more survives the division.
            mlp_ratio=(block.mlp.fc1.out_features + 0.5) / width,
            **_tanh(config.activation),
        )
    if is_clip_resnet(state):
        return dict(
            image_size=vision.image_size,
            layers=[len(stage) for stage in trunk.stages],
            width=2 * trunk.stem.conv1.conv.out_channels,
            head_width=trunk.head.head_dim,
        )
    if vision.pool is not None:
        raise ClipscaleError(
            f"open_clip cannot be told of model.vision.pool={vision.pool.value} with model.vision.timm={vision.timm}; "
            "use --to safetensors"
        )
    if vision.timm.startswith("vit_") and not _is_timms_own(model):
        raise ClipscaleError(
            f"open_clip cannot be told of another size or activation of model.vision.timm={vision.timm}; use --to "
            "safetensors"
        )
    tower = dict(image_size=vision.image_size, timm_model_name=vision.timm)
    if vision.proj is ImageProjection.none:
        return tower | dict(timm_pool=trunk_pool(vision.timm) or "avg", timm_proj="none")
    return tower | dict(timm_pool="", timm_proj="linear")


def _is_timms_own(model: CLIP) -> bool:
    """Whether the ViT is the one that timm makes of its name alone."""
    name, prefix = model.config.vision.timm, "visual.trunk."
    with torch.device("meta"):
        trunk: Any = timm.create_model(name, num_classes=0)
    plain = trunk.state_dict()
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items() if key.startswith(prefix)}
    same = shapes == {prefix + key: tensor.shape for key, tensor in plain.items()}
    same = same and trunk.blocks[0].attn.num_heads == tell(model)["vision.heads"]
    return same and trunk_activation(name) == model.config.activation.value


def write_hf(model: CLIP, tokenizer: Tokenizer, out: Path) -> None:
    """Files that transformers' ``CLIPModel``, ``CLIPImageProcessor`` and ``CLIPTokenizer`` load from ``out``; of a
    SigLIP, its ``SiglipModel``.

    Raises ClipscaleError for other towers than CLIP's and SigLIP's, a sigmoid loss's bias with CLIP's or none with
    SigLIP's, another tokenizer, or images made square by adding white.
    """
    config = model.config
    _only_byte_pairs(tokenizer)
    state = to_hf(model.state_dict())
    siglip = is_siglip(model.state_dict())
    _check_hf_text(config, tokenizer, siglip)
    if config.vision.resize_mode is ResizeMode.longest:
        raise ClipscaleError(
            "CLIPImageProcessor cannot add white (model.vision.resize_mode=longest); use --to open_clip"
        )
    kind, name = ("siglip", "SiglipModel") if siglip else ("clip", "CLIPModel")
    text, vision = _hf_text(config, tokenizer), _hf_vision(model)
    content = dict(
        architectures=[name], model_type=kind, dtype="float32",
        text_config={"model_type": f"{kind}_text_model", **text},
        vision_config={"model_type": f"{kind}_vision_model", **vision},
    ) | ({} if siglip else {"projection_dim": config.embed_dim})  # fmt: skip
    _write_weights(state, out / EXPORTED)
    _write_json(content, out / HF_CONFIG)
    _write_json(_hf_images(config), out / HF_IMAGES)
    _write_byte_pairs(config.context_length, out)


def _hf_text(config: Model, tokenizer: Tokenizer) -> dict[str, Any]:
    text, end = config.text, tokenizer.eot_id
    return dict(
        hidden_size=text.width, num_hidden_layers=text.layers, intermediate_size=int(text.width * text.mlp_ratio),
        num_attention_heads=text.heads, max_position_embeddings=config.context_length, vocab_size=text.vocab_size,
        hidden_act=HF_ACTIVATIONS[text_activation(config).value], layer_norm_eps=text.norm_eps,
        bos_token_id=end - 1, eos_token_id=end, pad_token_id=end,
        **{"projection_dim" if text.causal else "projection_size": config.embed_dim},
    )  # fmt: skip


def _hf_vision(model: CLIP) -> dict[str, Any]:
    config, trunk = model.config, model.visual.trunk
    return dict(
        hidden_size=trunk.embed_dim, num_hidden_layers=len(trunk.blocks),
        intermediate_size=trunk.blocks[0].mlp.fc1.out_features, num_attention_heads=tell(model)["vision.heads"],
        image_size=config.vision.image_size, patch_size=trunk.patch_embed.patch_size[0],
        hidden_act=HF_ACTIVATIONS[config.activation.value], layer_norm_eps=trunk.norm.eps,
        **({"projection_dim": config.embed_dim} if config.text.causal else {}),
    )  # fmt: skip


def _check_hf_text(config: Model, tokenizer: Tokenizer, siglip: bool) -> None:
    text, name = config.text, "SiglipModel" if siglip else "CLIPModel"
    differing = {
        "pool": (text.pool, TextPool.last),
        "causal": (text.causal, not siglip),
        "pad_to_context": (text.pad_to_context, siglip),
        "pad_id": (text.pad_id, tokenizer.eot_id if siglip else text.pad_id),  # with which CLIPTokenizer pads
    }
    for key, (own, theirs) in differing.items():
        if own != theirs:
            raise ClipscaleError(
                f"Hugging Face's {name} has no text tower with model.text.{key}={getattr(own, 'value', own)}, but "
                f"{getattr(theirs, 'value', theirs)}; use --to safetensors"
            )


def _hf_images(config: Model) -> dict[str, Any]:
    whole, side = config.vision.resize_mode is ResizeMode.shortest, config.vision.image_size
    square = {"height": side, "width": side}
    return dict(
        image_processor_type="CLIPImageProcessor", do_convert_rgb=True, do_resize=True, resample=3,
        size={"shortest_edge": side} if whole else square, do_center_crop=whole, crop_size=square,
        do_rescale=True, rescale_factor=1 / 255, do_normalize=True,
        image_mean=list(config.mean), image_std=list(config.std),
    )  # fmt: skip


def write_safetensors(model: CLIP, config: Config, out: Path) -> None:
    """Our own names and the configuration of model, tokenizer and loss: what ``clipscale.load(OUT)`` loads.

    Nothing of where data or other models lie goes with it.
    """
    model_config, tokenizer = config.model, config.tokenizer
    if model_config.text.hf is not None:
        text = replace(model_config.text, hf=shareable(model_config.text.hf))
        model_config = replace(model_config, text=text)
    tokenizer = replace(tokenizer, name=shareable_name(tokenizer.name))
    # Data that need no place: an evaluation names its own.
    kept = Config(
        data=Data(builtin=Builtin.synthetic),
        model=model_config,
        tokenizer=tokenizer,
        loss=replace(config.loss, teachers=[]),
    )
    _write_weights(model.state_dict(), out / EXPORTED)
    save_config(kept, out / "config.yaml")


def write_onnx(model: CLIP, config: Config, out: Path) -> None:
    """``image.onnx`` and ``text.onnx``, and in ``clipscale.json`` what their inputs must be and the temperature.

    A tokenizer that is not CLIP's goes with them. Raises as :func:`clipscale.checkpoint.onnx.write_graphs` does.
    """
    tokenizer = _tokenizer(config, "ONNX")  # first: what it cannot be is known in a moment
    differences = write_graphs(model, out)
    scale, bias = (None if value is None else float(value.detach()) for value in model.temperature())
    content = dict(
        model=config.model.name,
        embed_dim=config.model.embed_dim,
        image_size=config.model.vision.image_size,
        resize_mode=config.model.vision.resize_mode.value,
        context_length=config.model.context_length,
        tokenizer=shareable_name(config.tokenizer.name),
        logit_scale=scale,
        logit_bias=bias,
        largest_difference=differences,
    )
    _write_json(content, out / ONNX_CONFIG)
    tokenizer.save(out / TOKENIZER)
    if tokenizer.is_bpe:
        _write_byte_pairs(tokenizer.context_length, out)


def _only_byte_pairs(tokenizer: Tokenizer) -> None:
    if not tokenizer.is_bpe:
        raise ClipscaleError(
            f"tokenizer.name={tokenizer.name} is not CLIP's, the only one that this format can be given; use --to "
            "safetensors"
        )


def _write_weights(state: Mapping[str, torch.Tensor], path: Path) -> None:
    # Cloned, because safetensors refuses tensors that share memory, as parts of one matrix do.
    plain: State = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    path.touch()
    mode = path.stat().st_mode  # safetensors would leave the file to its owner alone
    save_file(plain, path, metadata={"format": "pt"})
    path.chmod(mode)


def _write_json(content: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_byte_pairs(context_length: int, out: Path) -> None:
    vocabulary, merges = byte_pairs()
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)
    vocabulary = {word: number for number, word in enumerate([*ordered[:-2], START, END])}
    (out / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (out / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    tokens = dict(bos_token=START, eos_token=END, pad_token=END, unk_token=END)
    content = dict(tokenizer_class="CLIPTokenizer", model_max_length=context_length, do_lower_case=True, **tokens)
    _write_json(content, out / "tokenizer_config.json")
    _write_json(tokens, out / "special_tokens_map.json")


WRITERS: dict[str, Callable[[CLIP, Config, Path], None]] = {
    "open_clip": lambda model, config, out: write_open_clip(model, _tokenizer(config, "open_clip"), out),
    "hf": lambda model, config, out: write_hf(model, _tokenizer(config, "CLIPModel"), out),
    "safetensors": write_safetensors,
    "onnx": write_onnx,
}


def _tokenizer(config: Config, format: str) -> Tokenizer:
    tokenizer: TokenizerConfig = config.tokenizer
    if config.model.text.hf is not None:
        raise ClipscaleError(
            f"{format} cannot be given the text tower model.text.hf={config.model.text.hf} without the hub; use --to "
            "safetensors"
        )
    return Tokenizer(tokenizer.name, tokenizer.context_length or config.model.context_length)
