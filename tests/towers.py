"""The text tower as the paper words it, padding and all, on the weights of ours; and captions for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clipscale.models.text import TextTower


def padded_text(tower: TextTower, ids: Tensor, lengths: Tensor) -> Tensor:
    """Float[B, D]: every caption padded to the context length, every token of every block computed."""
    heads, context = len(tower.positional_embedding[0]) // tower.head_width, tower.context_length
    x = torch.stack([F.pad(one, (0, context - len(one))) for one in ids.split(lengths.tolist())])
    x = tower.token_embedding(x) + tower.positional_embedding
    future = torch.ones(context, context, dtype=torch.bool).triu(1)
    for block in tower.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        logits = q @ k.mT * tower.head_width**-0.5
        attended = logits.masked_fill(future, -torch.inf).softmax(-1) @ v
        x = x + block.attn.proj(attended.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return tower.proj(tower.norm(x))[torch.arange(len(x)), lengths - 1]


def draw_captions(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids of captions of these lengths, end to end, Int32[T], and the lengths, Int32[B]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (sum(lengths),), generator=generator, dtype=torch.int32)
    return ids, torch.tensor(lengths, dtype=torch.int32)


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter numbers that a mistake in any of them would show: none is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            bound = 2 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
