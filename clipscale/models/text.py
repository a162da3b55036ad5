"""The text tower: a causal transformer pooled at the end-of-text token (CLIP paper, section 2.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from clipscale.config.model import Activation, Text
from clipscale.models.packing import Packing, attend, attend_from_ends, has_kernel

FILL = 256  # tokens; few shapes to compile for, and little that is computed for nothing


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``, the activation of OpenAI's own weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Causal multi-head self-attention within packed captions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Float[T, d] of Float[T, d]."""
        return self.proj(attend(self.qkv(x).unflatten(-1, (3, self.heads, -1)), packing).flatten(1))

    def of_ends(self, x: torch.Tensor, packing: Packing) -> torch.Tensor:
        """The rows of the captions' last tokens, Float[B, d], of Float[T, d]."""
        width = x.shape[1]
        ends = x.index_select(0, packing.ends)
        q = F.linear(ends, self.qkv.weight[:width], self.qkv.bias[:width]).unflatten(-1, (self.heads, -1))
        kv = F.linear(x, self.qkv.weight[width:], self.qkv.bias[width:]).unflatten(-1, (2, self.heads, -1))
        return self.proj(attend_from_ends(q, kv, packing).flatten(1))


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
    """A pre-norm transformer block over packed captions.

    The last one is ``pooled``: of its output only the captions' last tokens are asked for, so it computes no other.
    """

    def __init__(self, config: Text, activation: Activation, pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled
        self.norm1 = nn.LayerNorm(config.width)
        self.attn = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = Mlp(config.width, int(config.width * config.mlp_ratio), activation)

    def forward(self, x: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Float[T, d] of Float[T, d], or Float[B, d] if pooled."""
        if self.pooled:
            x = x.index_select(0, packing.ends) + self.attn.of_ends(self.norm1(x), packing)
        else:
            x = x + self.attn(self.norm1(x), packing)
        return x + self.mlp(self.norm2(x))


class TextTower(nn.Module):
    """Captions to Float[B, D].

    Attention is causal and a caption is pooled at its last token, so whatever follows it cannot matter: captions are
    computed as they are packed, which equals padding them to the context length.
    """

    def __init__(self, config: Text, context_length: int, embed_dim: int, activation: Activation) -> None:
        super().__init__()
        self.context_length = context_length
        self.eot_id = config.eot_id
        self.head_width = config.width // config.heads
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, config.width))
        last = config.layers - 1
        self.blocks = nn.ModuleList(Block(config, activation, pooled=i == last) for i in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.proj = nn.Linear(config.width, embed_dim, bias=False)
        self.fill = 0  # tokens of packed captions are a multiple of it

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile each block by torch.compile. Batches are then filled up with tokens that are nobody's, so that few
        shapes exist; what is computed of captions stays the same."""
        self.fill = FILL
        for block in self.blocks:
            block.compile(backend=backend)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor | Packing) -> torch.Tensor:
        """Features of packed captions: ``ids`` Int[T], all captions end to end, and ``lengths`` Int[B].

        Lengths that lie on the device make the host wait for it; :meth:`packing` makes of those on the host what can
        be given here instead. Raises ValueError as that does, and for lengths that are not those of ``ids``.
        """
        packing = lengths if isinstance(lengths, Packing) else self.packing(lengths)
        if packing.real != len(ids):
            raise ValueError(f"the captions have {packing.real} tokens by their lengths, but there are {len(ids)}")
        x = self.token_embedding(ids.index_select(0, packing.tokens))
        x = x + F.embedding(packing.positions, self.positional_embedding)
        for block in self.blocks:
            x = block(x, packing)
        return self.proj(self.norm(x)).index_select(0, packing.places)

    def packing(self, lengths: torch.Tensor) -> Packing:
        """How captions of ``lengths`` Int[B], on the host, are computed here, in the autocast context of this moment.

        Raises ValueError when a caption is empty, or longer than the context.
        """
        lengths = lengths.cpu()
        shortest, longest = (int(x) for x in lengths.aminmax()) if len(lengths) else (1, 1)
        if longest > self.context_length:
            raise ValueError(f"a caption has {longest} tokens, the context length is {self.context_length}")
        if shortest < 1:
            raise ValueError("a caption has no token, not even its end")
        device, dtype = self.positional_embedding.device, self.positional_embedding.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        return Packing.of(lengths, device, exact=has_kernel(device, dtype, self.head_width), fill=self.fill)

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
