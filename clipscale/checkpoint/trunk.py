"""Weights of an image tower alone, as timm has them."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.layers.attention_pool2d import AttentionPool2d
from torch import nn

from clipscale.checkpoint.interop import State, from_timm
from clipscale.errors import ClipscaleError
from clipscale.models.vision import trunk_activation


def download_timm(name: str) -> nn.Module:
    """timm's model ``name`` with its weights, e.g. ``vit_base_patch16_224.augreg_in21k``.

    Raises ClipscaleError for a name that timm does not have weights of; else whatever timm raises without a network.
    """
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = timm.list_models(f"*{architecture.split('_')[0]}*")[:3]
        raise ClipscaleError(f"timm has no model {architecture}; near it: {', '.join(near) or 'none'}")
    tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{architecture}.*")]
    if tag not in tags and (tag or not tags):
        raise ClipscaleError(f"timm has no weights {tag!r} of {architecture}; choose from {', '.join(tags) or 'none'}")
    return timm.create_model(name, pretrained=True)


def of_timm(model: Any) -> tuple[State, dict[str, Any]]:
    """The weights of a timm model under our names, but for its classifier, and what they do not show: values of
    ``model.*`` keys, without that prefix."""
    card = model.pretrained_cfg
    state: dict[str, torch.Tensor] = model.state_dict()
    if not isinstance(getattr(model, "head", None), AttentionPool2d):  # CLIP's ResNets: that is no classifier
        last = card.get("classifier") or ()
        dropped = tuple(f"{name}." for name in ([last] if isinstance(last, str) else last))
        state = {name: tensor for name, tensor in state.items() if not name.startswith(dropped)}
    told: dict[str, Any] = {key: list(card[key]) for key in ("mean", "std") if key in card}
    if activation := trunk_activation(card["architecture"]):
        told["activation"] = activation
        told["vision.heads"] = model.blocks[0].attn.num_heads
    return from_timm(state), told
