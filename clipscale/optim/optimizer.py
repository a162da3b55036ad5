"""AdamW, with weight decay on matrices only."""

from __future__ import annotations

import torch
from torch import nn

from clipscale.config.optim import Optim

# Tokens are vectors, whatever the number of dimensions timm gives them.
NO_DECAY = ("cls_token", "reg_token", "logit_scale", "logit_bias")


def build_optimizer(model: nn.Module, config: Optim) -> torch.optim.AdamW:
    """AdamW with decoupled decay on all weights that are not gains or biases (CLIP paper, section 2.5).

    Parameters with fewer than two dimensions, class tokens and the temperature are exempt, as in open_clip.
    """
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_vector = parameter.ndim < 2 or name.rpartition(".")[2] in NO_DECAY
            (exempt if is_vector else decayed).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": exempt}],
        fused=True,  # several times faster than the default, on CPU too
    )
    configure(optimizer, config)
    return optimizer


def configure(optimizer: torch.optim.Optimizer, config: Optim) -> None:
    """Set what the configuration says; also after a restore, which brings back what the checkpoint was made with."""
    for group, weight_decay in zip(optimizer.param_groups, (config.weight_decay, 0.0), strict=True):
        group |= {
            "lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps, "weight_decay": weight_decay,
        }  # fmt: skip
