"""A model as a directory that another library loads: open_clip, Hugging Face transformers, ONNX runtimes, or
clipscale itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from clipscale.checkpoint.interop import State, is_clip_resnet, is_clip_vit, to_hf, to_open_clip
from clipscale.checkpoint.loading import EXPORTED
from clipscale.checkpoint.onnx import write_graphs
from clipscale.checkpoint.pretrained import HF_CONFIG, HF_IMAGES, OPEN_CLIP_CONFIG, tell
from clipscale.config import Config, save_config
from clipscale.config.data import Builtin, Data
from clipscale.config.data import Tokenizer as TokenizerConfig
from clipscale.config.model import Activation, ResizeMode
from clipscale.data.tokenizer import Tokenizer, byte_pairs
from clipscale.errors import ClipscaleError
from clipscale.models import CLIP

ONNX_CONFIG = "clipscale.json"
START, END = "<|startoftext|>", "<|endoftext|>"  # as Hugging Face writes the tokens that open_clip names otherwise


def write_open_clip(model: CLIP, tokenizer: Tokenizer, out: Path) -> None:
    """Files that ``open_clip.create_model_and_transforms("local-dir:OUT")`` loads.

    Raises ClipscaleError for what open_clip cannot be told: another tokenizer, or a changed timm ViT.
    """
    config, state = model.config, model.state_dict()
    _only_byte_pairs(tokenizer)
    text: dict[str, Any] = dict(
        context_length=config.context_length,
        vocab_size=config.text.vocab_size,
        width=config.text.width,
        heads=config.text.heads,
        layers=config.text.layers,
        mlp_ratio=config.text.mlp_ratio,
    )
    content: dict[str, Any] = {"embed_dim": config.embed_dim, "vision_cfg": _open_clip_tower(model), "text_cfg": text}
    if config.activation is Activation.quickgelu:
        content["quick_gelu"] = True
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


def _open_clip_tower(model: CLIP) -> dict[str, Any]:
    vision, trunk, state = model.config.vision, model.visual.trunk, model.state_dict()
    if is_clip_vit(state):
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
        )
    if is_clip_resnet(state):
        return dict(
            image_size=vision.image_size,
            layers=[len(stage) for stage in trunk.stages],
            width=2 * trunk.stem.conv1.conv.out_channels,
            head_width=trunk.head.head_dim,
        )
    if vision.timm.startswith("vit_") and (
        model.config.activation is Activation.quickgelu or vision.patch_size or vision.width or vision.layers
    ):
        raise ClipscaleError(
            f"open_clip cannot be told of another size or activation of model.vision.timm={vision.timm}; use --to "
            "safetensors"
        )
    return dict(image_size=vision.image_size, timm_model_name=vision.timm, timm_pool="", timm_proj="linear")


def write_hf(model: CLIP, tokenizer: Tokenizer, out: Path) -> None:
    """Files that transformers' ``CLIPModel``, ``CLIPImageProcessor`` and ``CLIPTokenizer`` load from ``out``.

    Raises ClipscaleError for another image tower than CLIP's ViT, a sigmoid loss's bias, another tokenizer, or images
    made square by adding white.
    """
    config = model.config
    _only_byte_pairs(tokenizer)
    state = to_hf(model.state_dict())
    if config.vision.resize_mode is ResizeMode.longest:
        raise ClipscaleError(
            "CLIPImageProcessor cannot add white (model.vision.resize_mode=longest); use --to open_clip"
        )
    trunk, side = model.visual.trunk, config.vision.image_size
    activation = "quick_gelu" if config.activation is Activation.quickgelu else "gelu"
    text = dict(
        model_type="clip_text_model", hidden_size=config.text.width, num_hidden_layers=config.text.layers,
        intermediate_size=int(config.text.width * config.text.mlp_ratio), num_attention_heads=config.text.heads,
        max_position_embeddings=config.context_length, vocab_size=config.text.vocab_size, hidden_act=activation,
        bos_token_id=tokenizer.eot_id - 1, eos_token_id=tokenizer.eot_id, pad_token_id=tokenizer.eot_id,
        projection_dim=config.embed_dim,
    )  # fmt: skip
    vision = dict(
        model_type="clip_vision_model", hidden_size=trunk.embed_dim, num_hidden_layers=len(trunk.blocks),
        intermediate_size=trunk.blocks[0].mlp.fc1.out_features, num_attention_heads=tell(model)["vision.heads"],
        image_size=side, patch_size=trunk.patch_embed.patch_size[0], hidden_act=activation,
        projection_dim=config.embed_dim,
    )  # fmt: skip
    whole = config.vision.resize_mode is ResizeMode.shortest
    square = {"height": side, "width": side}
    images = dict(
        image_processor_type="CLIPImageProcessor", do_convert_rgb=True, do_resize=True, resample=3,
        size={"shortest_edge": side} if whole else square, do_center_crop=whole, crop_size=square,
        do_rescale=True, rescale_factor=1 / 255, do_normalize=True,
        image_mean=list(config.mean), image_std=list(config.std),
    )  # fmt: skip
    content = dict(
        architectures=["CLIPModel"], model_type="clip", projection_dim=config.embed_dim, dtype="float32",
        text_config=text, vision_config=vision,
    )  # fmt: skip
    _write_weights(state, out / EXPORTED)
    _write_json(content, out / HF_CONFIG)
    _write_json(images, out / HF_IMAGES)
    _write_byte_pairs(config.context_length, out)


def write_safetensors(model: CLIP, config: Config, out: Path) -> None:
    """Our own names and the configuration of model, tokenizer and loss: what ``clipscale.load(OUT)`` loads.

    Nothing of where data lie goes with it.
    """
    # Data that need no place: an evaluation names its own.
    kept = Config(
        data=Data(builtin=Builtin.synthetic),
        model=config.model,
        tokenizer=config.tokenizer,
        loss=replace(config.loss, teachers=[]),
    )
    _write_weights(model.state_dict(), out / EXPORTED)
    save_config(kept, out / "config.yaml")


def write_onnx(model: CLIP, config: Config, out: Path) -> None:
    """``image.onnx`` and ``text.onnx``, and in ``clipscale.json`` what their inputs must be and the temperature.

    Raises as :func:`clipscale.checkpoint.onnx.write_graphs` does.
    """
    differences = write_graphs(model, out)
    scale, bias = (None if value is None else float(value.detach()) for value in model.temperature())
    content = dict(
        model=config.model.name,
        embed_dim=config.model.embed_dim,
        image_size=config.model.vision.image_size,
        resize_mode=config.model.vision.resize_mode.value,
        context_length=config.model.context_length,
        tokenizer=config.tokenizer.name,
        logit_scale=scale,
        logit_bias=bias,
        largest_difference=differences,
    )
    _write_json(content, out / ONNX_CONFIG)
    if (tokenizer := _tokenizer(config)).is_bpe:
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
    "open_clip": lambda model, config, out: write_open_clip(model, _tokenizer(config), out),
    "hf": lambda model, config, out: write_hf(model, _tokenizer(config), out),
    "safetensors": write_safetensors,
    "onnx": write_onnx,
}


def _tokenizer(config: Config) -> Tokenizer:
    tokenizer: TokenizerConfig = config.tokenizer
    return Tokenizer(tokenizer.name, tokenizer.context_length or config.model.context_length)
