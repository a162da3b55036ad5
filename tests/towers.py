"""The text tower as the paper words it, padding and all, on the weights of ours; and captions for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clipscale.config.model import TextPool
from clipscale.models.text import TextTower


def padded_text(tower: TextTower, ids: Tensor, lengths: Tensor) -> Tensor:
    """Float[B, D]: every caption padded to the context length, every token of every block computed."""
    config, context = tower.config, tower.context_length
    x = torch.stack([F.pad(one, (0, context - len(one)), value=config.pad_id) for one in ids.split(lengths.tolist())])
    x = tower.token_embedding(x) + tower.positional_embedding
    if config.pad_to_context:
        lengths = torch.full_like(lengths, context)
    real = torch.arange(context) < lengths[:, None]
    # Where a token looks back, the padding that follows it is not there anyway.
    hidden = torch.ones(context, context, dtype=torch.bool).triu(1) if config.causal else ~real[:, None, None]
    for block in tower.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, config.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + block.attn.proj(_attention(q, k, v, hidden))
        x = x + block.mlp(block.norm2(x))
    return tower.proj(_pool(tower, tower.norm(x), lengths, real))


def _attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    logits = q @ k.mT * q.shape[-1] ** -0.5
    return (logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)


def _pool(tower: TextTower, x: Tensor, lengths: Tensor, real: Tensor) -> Tensor:
    if tower.config.pool is TextPool.last:
        return x[torch.arange(len(x)), lengths - 1]
    if tower.config.pool is TextPool.mean:
        return (x * real[:, :, None]).sum(1) / lengths[:, None]
    pool = tower.attn_pool
    assert pool is not None
    q = pool.q(pool.latent).unflatten(-1, (pool.heads, -1)).transpose(1, 2)
    k, v = pool.kv(x).unflatten(-1, (2, pool.heads, -1)).permute(2, 0, 3, 1, 4)
    x = pool.proj(_attention(q, k, v, ~real[:, None, None]))[:, 0]
    return x + pool.mlp(pool.norm(x))


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
