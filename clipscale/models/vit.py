"""timm's ViTs, computing of their last block only what the class token needs."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn


class PooledBlock(nn.Module):
    """timm's ``Block`` of a ViT, of whose output only the first token is asked for.

    Float[B, N, d] to Float[B, 1, d]. Its parameters keep the block's names, and stochastic depth draws what it would
    draw there.
    """

    norm1: nn.Module
    attn: Attention
    ls1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module

    def __init__(self, block: Block) -> None:
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        self.train(block.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, :1] + self.drop_path1(self.ls1(self._attend(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        attn, heads = self.attn, self.attn.num_heads
        width = attn.qkv.out_features // 3
        weights = attn.qkv.weight.tensor_split([width])
        biases = (None, None) if attn.qkv.bias is None else attn.qkv.bias.tensor_split([width])
        q = F.linear(x[:, :1], weights[0], biases[0]).unflatten(-1, (heads, -1)).transpose(1, 2)
        k, v = F.linear(x, weights[1], biases[1]).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = attn.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(attn.q_norm(q), attn.k_norm(k), v, dropout_p=dropout)
        return attn.proj_drop(attn.proj(attn.norm(x.transpose(1, 2).flatten(2))))


class PatchLinear(nn.Module):
    """A convolution whose patches do not overlap, Float[B, C, H, W] to Float[B, d, rows, columns], as one matrix
    product; the same parameters."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.patch = conv.kernel_size
        self.weight = conv.weight
        self.bias = conv.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = self.patch
        x = x.unflatten(3, (-1, width)).unflatten(2, (-1, height))
        patches = x.permute(0, 2, 4, 1, 3, 5).flatten(3)  # Float[B, rows, columns, C * height * width]
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def compute_what_counts(trunk: nn.Module) -> None:
    """Replace the last block of a ViT that is pooled at its class token, and its patches' convolution, by ones that
    give the same for less; another architecture stays as timm made it."""
    if not isinstance(trunk, VisionTransformer):
        return
    patches: Any = trunk.patch_embed
    if _is_linear(patches):
        patches.proj = PatchLinear(patches.proj)
    takes_token = type(trunk) is VisionTransformer and trunk.global_pool == "token" and trunk.attn_pool is None
    if takes_token and isinstance(trunk.norm, nn.LayerNorm) and is_poolable(last := trunk.blocks[-1]):
        trunk.blocks[-1] = PooledBlock(last)


def _is_linear(patches: Any) -> bool:
    conv, sides = getattr(patches, "proj", None), getattr(patches, "img_size", None)
    return (
        type(patches) is PatchEmbed
        and type(conv) is nn.Conv2d
        and conv.stride == conv.kernel_size
        and (conv.padding, conv.dilation, conv.groups) == ((0, 0), (1, 1), 1)
        and patches.strict_img_size
        and sides is not None
        and all(side % kernel == 0 for side, kernel in zip(sides, conv.kernel_size, strict=True))
    )


@torch.no_grad()
def is_poolable(block: nn.Module) -> TypeGuard[Block]:
    """Whether ``block`` is one that :class:`PooledBlock` stands for: by what it is made of, and by what it computes of
    random numbers with random weights. Draws none from torch's own generators; works on the meta device too."""
    if not (type(block) is Block and type(block.attn) is Attention and type(block.attn.qkv) is nn.Linear):
        return False
    if getattr(block.attn, "gate", None) is not None:
        return False
    trial: Any = deepcopy(block).to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in trial.parameters():
        bound = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1.0
        parameter.uniform_(-bound, bound, generator=generator)
    x = torch.empty(2, 5, trial.attn.qkv.in_features, device="cpu").uniform_(-1, 1, generator=generator)
    return torch.allclose(PooledBlock(trial)(x), trial(x)[:, :1], rtol=1e-4, atol=1e-4)
