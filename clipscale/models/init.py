"""CLIP's initialisation and SigLIP's, drawn parameter by parameter.

Every parameter has a generator seeded by its own name, so that the same seed gives the same model on one CPU and on
512 GPUs, however it is sharded. Values follow section 2.5 of the CLIP paper and its reference implementation; for text
towers that are not causal and ViTs that pool by attention, SigLIP's (google-research/big_vision: ``vit.py``,
``text_transformer.py``).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from timm.layers.attention_pool2d import AttentionPool2d
from torch import nn

from clipscale.models.hf import HFTextTower

if TYPE_CHECKING:
    from clipscale.models.clip import CLIP


@dataclass(frozen=True)
class Draw:
    """The first values of a parameter: all ``constant``, or drawn, ``normal`` with this deviation or ``uniform`` in
    ±``value``, from a generator of its own."""

    kind: str
    value: float
    seed: int

    def values(self, shape: Sequence[int]) -> torch.Tensor:
        """Float[*shape] in fp32, on the CPU."""
        full = torch.empty(tuple(shape), dtype=torch.float32, device="cpu")
        generator = torch.Generator().manual_seed(self.seed)
        if self.kind == "normal":
            return full.normal_(0.0, self.value, generator=generator)
        if self.kind == "uniform":
            return full.uniform_(-self.value, self.value, generator=generator)
        return full.fill_(self.value)


@torch.no_grad()
def initialize(model: CLIP, seed: int) -> None:
    """Set the weights as :func:`first_values` has them.

    Other timm architectures keep the initialisation that timm gave them; text towers of Hugging Face's have their own.
    """
    if isinstance(model.text, HFTextTower):
        model.text.draw(seed)
    parameters = dict(model.named_parameters())
    for name, draw in first_values(model, seed).items():
        parameters[name].copy_(draw.values(parameters[name].shape))


def first_values(model: CLIP, seed: int) -> dict[str, Draw]:
    """How the parameters begin, by name: those of the text tower, the projections, the temperature, a classifier's
    head, and of ViTs and CLIP's own ResNets. Names and shapes decide, so a model without storage will do."""
    layers, width = len(model.text.blocks), 0
    if not isinstance(model.text, HFTextTower):
        width = model.text.norm.normalized_shape[0]
    is_vit = hasattr(model.visual.trunk, "patch_embed") and hasattr(model.visual.trunk, "blocks")
    is_clip_resnet = isinstance(getattr(model.visual.trunk, "head", None), AttentionPool2d)
    pools_by_attention = hasattr(getattr(model.visual.trunk, "attn_pool", None), "latent")
    modules, found = dict(model.named_modules()), {}
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        tower, _, inner = name.partition(".")
        owner = modules[name.rpartition(".")[0]]
        drawn: tuple[str, float] | None = None
        if tower == "text" and isinstance(model.text, HFTextTower):
            drawn = ("normal", parameter.shape[1] ** -0.5) if inner.startswith("proj.") else None
        elif tower == "text" and (inner.startswith("attn_pool.") or not model.config.text.causal):
            drawn = _siglip(inner, leaf, parameter)
        elif tower == "text":
            drawn = _text(inner, leaf, width, layers, owner)
        elif tower == "temperature":
            drawn = ("constant", model.temperature.first[leaf])
        elif tower == "head":
            drawn = ("constant", 0.0)
        elif name == "visual.proj.weight":
            drawn = ("normal", parameter.shape[1] ** -0.5)
        elif inner.startswith("trunk.") and is_vit and pools_by_attention:
            drawn = _siglip(inner.removeprefix("trunk."), leaf, parameter)
        elif inner.startswith("trunk.") and is_vit:
            drawn = _vit(inner.removeprefix("trunk."), leaf, parameter, owner)
        elif inner.startswith("trunk.") and is_clip_resnet:
            drawn = _resnet(inner.removeprefix("trunk."), leaf, parameter, owner)
        if drawn is not None:
            # One 32-bit number of both: torch's CPU generator ignores the upper half of a larger seed.
            found[name] = Draw(*drawn, seed=zlib.crc32(f"{seed}:{name}".encode()))
    return found


def _norm_or_none(leaf: str, inner: str) -> tuple[str, float] | None:
    if "norm" in inner:
        return ("constant", 1.0 if leaf == "weight" else 0.0)
    return None


def _text(inner: str, leaf: str, width: int, layers: int, owner: Any) -> tuple[str, float]:
    if inner == "token_embedding.weight":
        return ("normal", 0.02)
    if inner == "positional_embedding":
        return ("normal", 0.01)
    if inner == "proj.weight":
        return ("normal", width**-0.5)
    if (norm := _norm_or_none(leaf, inner)) is not None:
        return norm
    if inner.endswith("qkv.weight"):
        return ("normal", width**-0.5)
    if inner.endswith("fc1.weight"):
        return ("normal", (2 * width) ** -0.5)
    if inner.endswith(("attn.proj.weight", "fc2.weight")):
        return ("normal", width**-0.5 * (2 * layers) ** -0.5)
    if inner.endswith(("fc1.bias", "fc2.bias")):
        return _left_to_torch(owner)
    return ("constant", 0.0)


def _left_to_torch(linear: nn.Linear) -> tuple[str, float]:
    """The bias of a layer that the reference leaves as PyTorch draws it: uniform in 1/sqrt(fan in)."""
    return ("uniform", linear.in_features**-0.5)


def _vit(inner: str, leaf: str, parameter: nn.Parameter, owner: Any) -> tuple[str, float] | None:
    width = parameter.shape[-1]
    if inner in ("cls_token", "pos_embed"):
        return ("normal", width**-0.5)
    if (norm := _norm_or_none(leaf, inner)) is not None:
        return norm
    if inner.endswith("qkv.weight"):  # Xavier, as torch's MultiheadAttention
        return ("uniform", math.sqrt(6 / sum(parameter.shape)))
    if inner.endswith(("qkv.bias", "attn.proj.bias")):
        return ("constant", 0.0)
    if leaf == "weight" and parameter.ndim > 1:  # PyTorch's default for linear and convolution
        return ("uniform", parameter[0].numel() ** -0.5)
    if inner.endswith(("fc1.bias", "fc2.bias")):
        return _left_to_torch(owner)
    return None


def _siglip(inner: str, leaf: str, parameter: nn.Parameter) -> tuple[str, float] | None:
    """Both towers: Xavier in the blocks, query, key and value each for itself; LeCun around them."""
    if (norm := _norm_or_none(leaf, inner)) is not None:
        return norm
    if inner == "attn_pool.latent":
        return ("uniform", math.sqrt(6 / (1 + parameter.shape[-1])))
    if inner in ("token_embedding.weight", "positional_embedding", "pos_embed"):
        return ("normal", parameter.shape[-1] ** -0.5)
    if inner in ("proj.weight", "patch_embed.proj.weight"):
        return ("normal", parameter[0].numel() ** -0.5)
    if leaf == "bias":
        return ("normal", 1e-6) if ".fc" in inner else ("constant", 0.0)
    if leaf == "weight" and parameter.ndim == 2:
        outputs, inputs = parameter.shape
        return ("uniform", math.sqrt(6 / (inputs + (outputs if ".fc" in inner else inputs))))
    return None


def _resnet(inner: str, leaf: str, parameter: nn.Parameter, owner: Any) -> tuple[str, float] | None:
    if inner == "head.pos_embed":
        return ("normal", parameter.shape[-1] ** -0.5)
    if inner.startswith("head."):
        return ("normal", parameter.shape[-1] ** -0.5) if leaf == "weight" else _left_to_torch(owner)
    if ".bn." in inner or inner.startswith("bn"):
        last = inner.endswith("conv3_1x1.bn.weight")  # every residual branch starts as zero
        return ("constant", 0.0 if last or leaf == "bias" else 1.0)
    if parameter.ndim == 4:
        return ("uniform", parameter[0].numel() ** -0.5)
    return None
