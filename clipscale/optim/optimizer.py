"""AdamW, with weight decay on matrices only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from clipscale.config.optim import Optim

# Tokens are vectors, whatever the number of dimensions timm gives them.
NO_DECAY = ("cls_token", "reg_token", "logit_scale", "logit_bias")


def build_optimizer(model: nn.Module, config: Optim, heights: Mapping[str, int] | None = None) -> torch.optim.AdamW:
    """AdamW with decoupled decay on all weights that are not gains or biases (CLIP paper, section 2.5).

    Parameters with fewer than two dimensions, class tokens and the temperature are exempt, as in open_clip. ``heights``
    says by name how many groups of layers lie above a parameter's, for ``optim.layer_decay``: each takes a factor off
    its learning rate.
    """
    assert heights is not None or config.layer_decay == 1, "layers are needed to tell their rates"
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            height = heights[name] if heights and config.layer_decay < 1 else 0
            decays = parameter.ndim >= 2 and name.rpartition(".")[2] not in NO_DECAY
            new = {"params": [], "lr_scale": config.layer_decay**height, "decays": decays}
            groups.setdefault((height, not decays), new)["params"].append(parameter)
    optimizer = torch.optim.AdamW(
        [groups[key] for key in sorted(groups)],
        fused=True,  # several times faster than the default, on CPU too
    )
    configure(optimizer, config)
    return optimizer


def configure(optimizer: torch.optim.Optimizer, config: Optim) -> None:
    """Set what the configuration says; also after a restore, which brings back what the checkpoint was made with."""
    for group in optimizer.param_groups:
        group |= {
            "lr": config.lr * group["lr_scale"], "betas": (config.beta1, config.beta2), "eps": config.eps,
            "weight_decay": config.weight_decay if group["decays"] else 0.0,
        }  # fmt: skip
