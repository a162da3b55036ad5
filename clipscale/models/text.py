"""The text tower: a transformer, causal and pooled at the end-of-text token (CLIP paper, section 2.4), or one that sees
all of a caption; and other ways to pool it (SigLIP)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from clipscale.config.model import Activation, Text, TextPool
from clipscale.models.packing import Packing, attend, attend_from, check_lengths, has_kernel, mean, unpad

FILL = 256  # tokens; few shapes to compile for, and little that is computed for nothing


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``, the activation of OpenAI's own weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


def _activation(kind: Activation) -> nn.Module:
    if kind is Activation.quickgelu:
        return QuickGELU()
    return nn.GELU(approximate="tanh" if kind is Activation.gelu_tanh else "none")


class Attention(nn.Module):
    """Multi-head self-attention within packed captions."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Float[T, d] of Float[T, d]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        return self.proj(attend(qkv, packing, causal=self.causal).flatten(1))

    def of_ends(self, x: torch.Tensor, packing: Packing) -> torch.Tensor:
        """The rows of the captions' last tokens, Float[B, d], of Float[T, d]."""
        width = x.shape[1]
        ends = x.index_select(0, packing.ends)
        q = F.linear(ends, self.qkv.weight[:width], self.qkv.bias[:width]).unflatten(-1, (self.heads, -1))
        kv = F.linear(x, self.qkv.weight[width:], self.qkv.bias[width:]).unflatten(-1, (2, self.heads, -1))
        return self.proj(attend_from(q, kv, packing).flatten(1))


class Mlp(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, width: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = _activation(activation)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block over packed captions.

    The last one may be ``pooled``: of its output only the captions' last tokens are asked for, so it computes no other.
    """

    def __init__(self, config: Text, activation: Activation, pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled
        self.norm1 = nn.LayerNorm(config.width, config.norm_eps)
        self.attn = Attention(config.width, config.heads, config.causal)
        self.norm2 = nn.LayerNorm(config.width, config.norm_eps)
        self.mlp = Mlp(config.width, int(config.width * config.mlp_ratio), activation)

    def forward(self, x: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Float[T, d] of Float[T, d], or Float[B, d] if pooled."""
        if self.pooled:
            x = x.index_select(0, packing.ends) + self.attn.of_ends(self.norm1(x), packing)
        else:
            x = x + self.attn(self.norm1(x), packing)
        return x + self.mlp(self.norm2(x))


class AttentionPool(nn.Module):
    """Attention of a learned probe to a caption's tokens, and an MLP: SigLIP's pool of image tokens, for text.

    Its parameters have the names of timm's ``AttentionPoolLatent``.
    """

    def __init__(self, config: Text, activation: Activation) -> None:
        super().__init__()
        self.heads, width = config.heads, config.width
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, config.norm_eps)
        self.mlp = Mlp(width, int(width * config.mlp_ratio), activation)

    def forward(self, x: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Float[B, d] of Float[T, d]."""
        q = self.q(self.latent[0]).unflatten(-1, (self.heads, -1)).expand(len(packing.lengths), -1, -1)
        x = self.proj(attend_from(q, self.kv(x).unflatten(-1, (2, self.heads, -1)), packing).flatten(1))
        return x + self.mlp(self.norm(x))


class TextTower(nn.Module):
    """Captions to Float[B, D].

    Padding that a caption does not see cannot matter: captions are computed as they are packed, which equals padding
    them to the context length. Where the model is one that sees its padding (``model.text.pad_to_context``), captions
    are filled up here, and come without.
    """

    def __init__(self, config: Text, context_length: int, embed_dim: int, activation: Activation) -> None:
        super().__init__()
        self.config = config
        self.context_length = context_length
        self.eot_id = config.eot_id
        self.head_width = config.width // config.heads
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.zeros(context_length, config.width))
        activation = config.activation or activation
        # Where all tokens are pooled, the last block computes them all.
        pooled = config.layers - 1 if config.pool is TextPool.last else None
        self.blocks = nn.ModuleList(Block(config, activation, pooled=i == pooled) for i in range(config.layers))
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.attn_pool = AttentionPool(config, activation) if config.pool is TextPool.map else None
        self.proj = nn.Linear(config.width, embed_dim, bias=config.proj_bias)
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
        packing = lengths if isinstance(lengths, Packing) else self.packing(lengths, ids.device)
        packing.require(ids)
        if self.config.pad_to_context:
            ids = F.pad(ids, (0, 1), value=self.config.pad_id)
        x = self.token_embedding(ids.index_select(0, packing.tokens))
        x = x + F.embedding(packing.positions, self.positional_embedding)
        for block in self.blocks:
            x = block(x, packing)
        return self.proj(self._pool(self.norm(x), packing)).index_select(0, packing.places)

    def _pool(self, x: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Float[B, d] of what the last block gave, normalised."""
        if self.attn_pool is not None:
            return self.attn_pool(x, packing)
        return mean(x, packing).to(x.dtype) if self.config.pool is TextPool.mean else x

    def packing(
        self, lengths: torch.Tensor, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Packing:
        """How captions of ``lengths`` Int[B], on the host, are computed here: on ``device`` and in ``dtype``, or those
        of the weights in the autocast context of this moment.

        Raises ValueError when a caption is empty, or longer than the context.
        """
        lengths = lengths.cpu()
        check_lengths(lengths, self.context_length)
        device = device or self.positional_embedding.device
        if dtype is None:
            cast = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if cast else self.positional_embedding.dtype
        if self.config.pad_to_context:
            return Packing.filled(lengths, self.context_length, device)
        return Packing.of(lengths, device, exact=has_kernel(device, dtype, self.head_width), fill=self.fill)

    def pack(self, padded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Padded ids Int[B, L] as packed ids Int[T] and lengths Int[B].

        Raises ValueError for a row without an end-of-text token.
        """
        return unpad(padded, self.eot_id)
