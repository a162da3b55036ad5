"""The text tower: a causal transformer pooled at the end-of-text token (CLIP paper, section 2.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from clipscale.config.model import Activation, Text


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``, the activation of OpenAI's own weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Causal multi-head self-attention, Float[B, L, d] to Float[B, L, d]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, width: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = QuickGELU() if activation is Activation.quickgelu else nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: Text, activation: Activation) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attn = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = Mlp(config.width, int(config.width * config.mlp_ratio), activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TextTower(nn.Module):
    """Captions to Float[B, D].

    Attention is causal and the caption is pooled at its last token, so whatever follows it cannot matter: captions
    are padded only to the longest of the batch, with id 0, which is equal to padding them to the context length.
    """

    def __init__(self, config: Text, context_length: int, embed_dim: int, activation: Activation) -> None:
        super().__init__()
        self.context_length = context_length
        self.eot_id = config.eot_id
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, config.width))
        self.blocks = nn.ModuleList(Block(config, activation) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.proj = nn.Linear(config.width, embed_dim, bias=False)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor, longest: int | None = None) -> torch.Tensor:
        """Features of packed captions: ``ids`` Int[T], all captions end to end, and ``lengths`` Int[B].

        ``longest`` is their maximum where the host knows it; asking the device for it waits for the device. Raises
        ValueError when a caption is longer than the context.
        """
        longest = int(lengths.max()) if longest is None else longest
        if longest > self.context_length:
            raise ValueError(f"a caption has {longest} tokens, the context length is {self.context_length}")
        real = torch.arange(longest, device=ids.device) < lengths[:, None]
        padded = ids.new_zeros(real.shape).masked_scatter(real, ids)
        x = self.token_embedding(padded) + self.positional_embedding[:longest]
        for block in self.blocks:
            x = block(x)
        pooled = x[torch.arange(len(x), device=x.device), lengths.long() - 1]
        return self.proj(self.norm(pooled))

    def pack(self, padded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Padded ids Int[B, L] as packed ids Int[T] and lengths Int[B]; each caption ends at its end-of-text token.

        Raises ValueError for a row without one.
        """
        ends = padded == self.eot_id
        if not bool(ends.any(dim=1).all()):
            raise ValueError(
                f"a caption has no end-of-text token ({self.eot_id}); was it made by this model's tokenizer?"
            )
        lengths = ends.int().argmax(dim=1) + 1
        keep = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        return padded[keep], lengths
