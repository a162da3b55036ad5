"""Weights under the names of other libraries: OpenCLIP and OpenAI (which share theirs), Hugging Face's CLIPModel and
SiglipModel.

State dict in, state dict out, of the same dtype, with no arithmetic: there and back gives the same bits. Weights do not
tell the activation that they were trained with, nor how images were normalised; who loads them must know.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from clipscale.errors import ClipscaleError

State = dict[str, torch.Tensor]

TRUNK = "visual.trunk."

# What OpenAI's archives hold beside weights.
OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")


class _Pair(NamedTuple):
    """A name in another library and in ours. ``#`` is a number, ``*`` the last part, ``**`` any rest.

    ``shape`` says how the tensor lies there: transposed, without our leading axes of one, or as a scalar.
    """

    theirs: str
    ours: str
    shape: str = "same"


def from_open_clip(state: Mapping[str, torch.Tensor]) -> State:
    """Weights of an open_clip ``CLIP``, of a ``CustomTextCLIP`` with the same text tower, or of OpenAI's.

    CLIP's ViTs and ResNets, and timm towers with a linear projection or none, as SigLIP's. Raises ClipscaleError for
    names that have no place in clipscale's towers, as those of a Hugging Face text tower.
    """
    plain = {name: tensor for name, tensor in state.items() if name not in OPENAI_EXTRAS}
    if "text.token_embedding.weight" in plain:  # CustomTextCLIP
        plain = {name.removeprefix("text."): tensor for name, tensor in plain.items()}
    plain.pop("attn_mask", None)  # a buffer that older versions stored
    projection = _OPEN_CLIP_BIASED if "text_projection.bias" in plain else _OPEN_CLIP_PLAIN
    if "visual.class_embedding" in plain:
        tower = _OPEN_CLIP_VIT
    elif any(name.startswith("visual.attnpool.") for name in plain):
        tower = _OPEN_CLIP_RESNET
    else:
        tower = _OPEN_CLIP_TIMM
    return _rename(plain, (*_OPEN_CLIP, *projection, *tower), to_ours=True)


def to_open_clip(state: Mapping[str, torch.Tensor]) -> State:
    """Weights of a clipscale model under the names of open_clip's ``CLIP``; OpenAI's are the same.

    Where the text projection has a bias, as in SigLIP, they are those of its ``CustomTextCLIP``.

    Raises ClipscaleError for names that are not those of a clipscale model.
    """
    if is_clip_vit(state):
        tower = _OPEN_CLIP_VIT
    elif is_clip_resnet(state):
        tower = _OPEN_CLIP_RESNET
    else:
        tower = _OPEN_CLIP_TIMM
    if "text.proj.bias" not in state:
        return _rename(state, (*_OPEN_CLIP, *_OPEN_CLIP_PLAIN, *tower), to_ours=False)
    custom = _rename(state, (*_OPEN_CLIP, *_OPEN_CLIP_BIASED, *tower), to_ours=False)
    return {name if name.startswith(("visual.", "logit_")) else f"text.{name}": t for name, t in custom.items()}


def from_hf(state: Mapping[str, torch.Tensor]) -> State:
    """Weights of a Hugging Face ``CLIPModel`` or ``SiglipModel``.

    Raises ClipscaleError for names of another architecture.
    """
    plain = {name: tensor for name, tensor in state.items() if not name.endswith(".position_ids")}
    if "vision_model.head.probe" in plain:
        return _rename(_part_probe(_fuse(plain)), (*_HF, *_HF_SIGLIP), to_ours=True)
    return _rename(_fuse(plain), (*_HF, *_HF_CLIP), to_ours=True)


def to_hf(state: Mapping[str, torch.Tensor]) -> State:
    """Weights of a clipscale model under the names of Hugging Face's ``CLIPModel``, or of its ``SiglipModel``, for a
    ViT that pools by attention.

    Raises ClipscaleError for other image towers, and for a model with a bias on its logits, which CLIPModel lacks, or
    without one, which SiglipModel has.
    """
    biased = "temperature.logit_bias" in state
    if is_siglip(state):
        if not biased:
            raise ClipscaleError(
                "Hugging Face's SiglipModel has a logit_bias, which this model has not: it was not trained with "
                "loss=siglip; use open_clip's format"
            )
        return _join_probe(_split(_rename(state, (*_HF, *_HF_SIGLIP), to_ours=False)))
    if biased:
        raise ClipscaleError("Hugging Face's CLIPModel has no logit_bias, which this model has; use open_clip's format")
    if not is_clip_vit(state):
        raise ClipscaleError(
            "Hugging Face's CLIPModel and SiglipModel have no image tower but CLIP's ViT and SigLIP's, and this is "
            "another; use open_clip's format"
        )
    return _split(_rename(state, (*_HF, *_HF_CLIP), to_ours=False))


def from_timm(state: Mapping[str, torch.Tensor]) -> State:
    """Weights of a timm model without a classifier: an image tower's, of which nothing is said about texts."""
    return {f"{TRUNK}{name}": tensor for name, tensor in state.items()}


def to_timm(state: Mapping[str, torch.Tensor]) -> State:
    """The image tower of a clipscale model as timm's model of ``model.vision.timm`` has it, with ``num_classes=0``; for
    CLIP's ResNets ``num_classes=model.embed_dim``. The projection of other towers is left out.

    Raises ClipscaleError where there is no image tower.
    """
    trunk = {name.removeprefix(TRUNK): tensor for name, tensor in state.items() if name.startswith(TRUNK)}
    if not trunk:
        raise ClipscaleError(f"there are no weights of an image tower, of names {TRUNK}…, among the {len(state)}")
    return trunk


def is_siglip(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether a clipscale state dict has SigLIP's towers: a ViT that pools by attention, whose result is not projected,
    and a text projection with a bias."""
    return {"visual.trunk.attn_pool.latent", "text.proj.bias"} <= state.keys() and "visual.proj.weight" not in state


def is_clip_vit(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether a clipscale state dict has CLIP's own ViT, which other libraries name differently from timm's others."""
    trunk = "visual.trunk."
    needed = {f"{trunk}cls_token", f"{trunk}norm_pre.weight", f"{trunk}norm.weight"}
    return needed <= state.keys() and f"{trunk}patch_embed.proj.bias" not in state


def is_clip_resnet(state: Mapping[str, torch.Tensor]) -> bool:
    """Whether a clipscale state dict has one of CLIP's own ResNets."""
    return {"visual.trunk.stem.conv1.conv.weight", "visual.trunk.head.pos_embed"} <= state.keys()


# ---- names ----------------------------------------------------------------------------------------------------------


def _blocks(theirs: str, ours: str, names: Sequence[tuple[str, str]]) -> Iterator[_Pair]:
    for there, here in names:
        yield _Pair(f"{theirs}.#.{there}", f"{ours}.blocks.#.{here}")


_OPEN_CLIP_BLOCK = (
    ("ln_1.*", "norm1.*"),
    ("attn.in_proj_weight", "attn.qkv.weight"),
    ("attn.in_proj_bias", "attn.qkv.bias"),
    ("attn.out_proj.*", "attn.proj.*"),
    ("ln_2.*", "norm2.*"),
    ("mlp.c_fc.*", "mlp.fc1.*"),
    ("mlp.c_proj.*", "mlp.fc2.*"),
)
_HF_BLOCK = (
    ("layer_norm1.*", "norm1.*"),
    ("self_attn.qkv.*", "attn.qkv.*"),  # q, k and v once fused
    ("self_attn.out_proj.*", "attn.proj.*"),
    ("layer_norm2.*", "norm2.*"),
    ("mlp.fc1.*", "mlp.fc1.*"),
    ("mlp.fc2.*", "mlp.fc2.*"),
)
_OPEN_CLIP = (
    _Pair("token_embedding.weight", "text.token_embedding.weight"),
    _Pair("positional_embedding", "text.positional_embedding"),
    *_blocks("transformer.resblocks", "text", _OPEN_CLIP_BLOCK),
    _Pair("ln_final.*", "text.norm.*"),
    _Pair("logit_scale", "temperature.logit_scale", "scalar"),
    _Pair("logit_bias", "temperature.logit_bias", "scalar"),
)
_OPEN_CLIP_PLAIN = (_Pair("text_projection", "text.proj.weight", "transposed"),)
_OPEN_CLIP_BIASED = (_Pair("text_projection.*", "text.proj.*"),)
_OPEN_CLIP_VIT = (
    _Pair("visual.conv1.weight", "visual.trunk.patch_embed.proj.weight"),
    _Pair("visual.class_embedding", "visual.trunk.cls_token", "without 2 axes"),
    _Pair("visual.positional_embedding", "visual.trunk.pos_embed", "without 1 axis"),
    _Pair("visual.ln_pre.*", "visual.trunk.norm_pre.*"),
    *_blocks("visual.transformer.resblocks", "visual.trunk", _OPEN_CLIP_BLOCK),
    _Pair("visual.ln_post.*", "visual.trunk.norm.*"),
    _Pair("visual.proj", "visual.proj.weight", "transposed"),
)
_OPEN_CLIP_RESNET = (
    *(_Pair(f"visual.conv{n}.*", f"visual.trunk.stem.conv{n}.conv.*") for n in (1, 2, 3)),
    *(_Pair(f"visual.bn{n}.*", f"visual.trunk.stem.conv{n}.bn.*") for n in (1, 2, 3)),
    *(
        _Pair(f"visual.layer{stage + 1}.#.{there}.*", f"visual.trunk.stages.{stage}.#.{here}.*")
        for stage in range(4)
        for there, here in (
            ("conv1", "conv1_1x1.conv"),
            ("bn1", "conv1_1x1.bn"),
            ("conv2", "conv2_kxk.conv"),
            ("bn2", "conv2_kxk.bn"),
            ("conv3", "conv3_1x1.conv"),
            ("bn3", "conv3_1x1.bn"),
            ("downsample.0", "shortcut.conv.conv"),
            ("downsample.1", "shortcut.conv.bn"),
        )
    ),
    _Pair("visual.attnpool.positional_embedding", "visual.trunk.head.pos_embed"),
    *(_Pair(f"visual.attnpool.{x}_proj.*", f"visual.trunk.head.{x}.*") for x in "qkv"),
    _Pair("visual.attnpool.c_proj.*", "visual.trunk.head.proj.*"),
)
_OPEN_CLIP_TIMM = (
    _Pair("visual.trunk.**", "visual.trunk.**"),
    _Pair("visual.head.proj.weight", "visual.proj.weight"),
)
_HF = (
    _Pair("text_model.embeddings.token_embedding.weight", "text.token_embedding.weight"),
    _Pair("text_model.embeddings.position_embedding.weight", "text.positional_embedding"),
    *_blocks("text_model.encoder.layers", "text", _HF_BLOCK),
    _Pair("text_model.final_layer_norm.*", "text.norm.*"),
    _Pair("vision_model.embeddings.patch_embedding.*", "visual.trunk.patch_embed.proj.*"),
    _Pair("vision_model.embeddings.position_embedding.weight", "visual.trunk.pos_embed", "without 1 axis"),
    *_blocks("vision_model.encoder.layers", "visual.trunk", _HF_BLOCK),
    _Pair("vision_model.post_layernorm.*", "visual.trunk.norm.*"),
)
_HF_CLIP = (
    _Pair("text_projection.weight", "text.proj.weight"),
    _Pair("vision_model.embeddings.class_embedding", "visual.trunk.cls_token", "without 2 axes"),
    _Pair("vision_model.pre_layrnorm.*", "visual.trunk.norm_pre.*"),  # so it is spelt there
    _Pair("visual_projection.weight", "visual.proj.weight"),
    _Pair("logit_scale", "temperature.logit_scale", "scalar"),
)
_HF_SIGLIP = (
    _Pair("text_model.head.*", "text.proj.*"),
    _Pair("vision_model.head.probe", "visual.trunk.attn_pool.latent"),
    _Pair("vision_model.head.attention.q.*", "visual.trunk.attn_pool.q.*"),  # once parted from the keys and values
    _Pair("vision_model.head.attention.kv.*", "visual.trunk.attn_pool.kv.*"),
    _Pair("vision_model.head.attention.out_proj.*", "visual.trunk.attn_pool.proj.*"),
    _Pair("vision_model.head.layernorm.*", "visual.trunk.attn_pool.norm.*"),
    _Pair("vision_model.head.mlp.fc1.*", "visual.trunk.attn_pool.mlp.fc1.*"),
    _Pair("vision_model.head.mlp.fc2.*", "visual.trunk.attn_pool.mlp.fc2.*"),
    _Pair("logit_scale", "temperature.logit_scale"),
    _Pair("logit_bias", "temperature.logit_bias"),
)

# What a tensor of theirs becomes in ours, and the way back.
_SHAPES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]] = {
    "same": (lambda t: t, lambda t: t),
    "transposed": (lambda t: t.t().contiguous(), lambda t: t.t().contiguous()),
    "without 1 axis": (lambda t: t[None], lambda t: t[0]),
    "without 2 axes": (lambda t: t[None, None], lambda t: t[0, 0]),
    "scalar": (lambda t: t.reshape(1), lambda t: t.reshape(())),
}


def _rename(state: Mapping[str, torch.Tensor], pairs: Sequence[_Pair], *, to_ours: bool) -> State:
    renamed: State = {}
    strange = []
    exact, patterns = {}, []
    for pair in pairs:
        before, after = (pair.theirs, pair.ours) if to_ours else (pair.ours, pair.theirs)
        if re.search(r"[#*]", before):
            patterns.append((_pattern(before), after, pair.shape))
        else:
            exact[before] = (after, pair.shape)
    for name, tensor in state.items():
        found = exact.get(name) or next(
            ((_fill(after, match), shape) for one, after, shape in patterns if (match := one.fullmatch(name))), None
        )
        if found is None:
            strange.append(name)
        else:
            try:
                renamed[found[0]] = _SHAPES[found[1]][0 if to_ours else 1](tensor)
            except (RuntimeError, IndexError):
                raise ClipscaleError(f"{name} has the shape {list(tensor.shape)}, which no CLIP has") from None
    if strange:
        where = "clipscale's towers" if to_ours else "that format"
        raise ClipscaleError(
            f"{len(strange)} of {len(state)} weights have no place in {where}: {', '.join(strange[:3])}"
            f"{', …' if len(strange) > 3 else ''}; it is another architecture"
        )
    return renamed


def _pattern(name: str) -> re.Pattern[str]:
    kinds = {"#": r"(\d+)", "*": r"(\w+)", "**": r"(.+)"}
    return re.compile("".join(kinds.get(part) or re.escape(part) for part in re.split(r"(#|\*+)", name)))


def _fill(name: str, match: re.Match[str]) -> str:
    parts = iter(match.groups())
    return re.sub(r"#|\*+", lambda _: next(parts), name)


_QKV = re.compile(r"(.+\.self_attn\.)q_proj\.(\w+)")


def _fuse(state: Mapping[str, torch.Tensor]) -> State:
    """Queries, keys and values of Hugging Face's attention as one matrix, in this order."""
    fused = dict(state)
    for name in state:
        if match := _QKV.fullmatch(name):
            three = [f"{match[1]}{x}_proj.{match[2]}" for x in "qkv"]
            if all(one in fused for one in three):
                fused[f"{match[1]}qkv.{match[2]}"] = torch.cat([fused.pop(one) for one in three])
    return fused


def _split(state: State) -> State:
    split: State = {}
    for name, tensor in state.items():
        if ".self_attn.qkv." in name:
            for x, part in zip("qkv", tensor.chunk(3), strict=True):
                split[name.replace(".qkv.", f".{x}_proj.")] = part
        else:
            split[name] = tensor
    return split


_PROBE = "vision_model.head.attention."


def _part_probe(state: State) -> State:
    """The pool's one matrix of Hugging Face's as two: for the probe's query, and for keys and values."""
    parted = dict(state)
    for kind in ("weight", "bias"):
        if (whole := parted.pop(f"{_PROBE}in_proj_{kind}", None)) is not None:
            width = len(whole) // 3
            parted[f"{_PROBE}q.{kind}"], parted[f"{_PROBE}kv.{kind}"] = whole.split([width, 2 * width])
    return parted


def _join_probe(state: State) -> State:
    joined = dict(state)
    for kind in ("weight", "bias"):
        both = [joined.pop(f"{_PROBE}{part}.{kind}") for part in ("q", "kv")]
        joined[f"{_PROBE}in_proj_{kind}"] = torch.cat(both)
    return joined
