"""Captions without padding: where their tokens lie, and attention within each."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from clipscale.models.groups import rounding


@dataclass(frozen=True)
class Packing:
    """How B captions lie in one tensor of T tokens: sorted by length, those of a group equally long.

    A group is padded to its longest caption, with tokens that none of the caption sees and no pooling asks for. It is
    made from lengths on the host, so nothing waits for the device.
    """

    groups: tuple[tuple[int, int], ...]
    """``(captions, tokens each)`` of every group, in order."""
    real: int
    """Tokens that are given: of all captions, padding not counted."""
    longest: int
    """At least the tokens of the longest caption."""
    exact: bool
    """Whether there is no padding that must be hidden."""
    tokens: torch.Tensor
    """Int[T], which of the captions' ids, laid end to end, stands at each place; ``real`` is the id that fills."""
    positions: torch.Tensor
    """Int[T], the place of each token in its caption."""
    ends: torch.Tensor
    """Int[B], where each caption's last token lies; behind them, that of a filling."""
    lengths: torch.Tensor
    """Int[B], the lengths of the captions, filled or not, in the order in which they lie; behind them, a filling's."""
    places: torch.Tensor
    """Int[B], which of the captions as they lie is the first, the second, … that was given."""
    bounds: torch.Tensor
    """Int32[B + 1], where each caption begins, and the last one's end; behind it, that of a filling."""

    @staticmethod
    def of(lengths: torch.Tensor, device: torch.device, *, exact: bool = False, fill: int = 0) -> Packing:
        """Pack captions of ``lengths`` Int[B], each at least 1.

        ``exact`` has as many groups as there are lengths. ``fill`` makes T a multiple of it, by a last caption of 1 to
        ``fill`` tokens that is nobody's, so that few values of T exist.
        """
        lengths = lengths.cpu().long()
        real, longest = int(lengths.sum()), int(lengths.max()) if len(lengths) else 1
        step = 1 if exact else rounding(longest)
        rounded = (-(-lengths // step) * step).clamp(max=longest)
        order = rounded.argsort(stable=True)
        begins, lengths, rounded = (lengths.cumsum(0) - lengths)[order], lengths[order], rounded[order]
        exact = exact or int(rounded.sum()) == real
        if fill and len(lengths):
            more = fill - int(rounded.sum()) % fill
            begins, lengths, rounded = (
                F.pad(x, (0, 1), value=v) for x, v in ((begins, 0), (lengths, 1), (rounded, more))
            )
        bounds = F.pad(rounded.cumsum(0), (1, 0))
        positions = torch.arange(int(bounds[-1])) - bounds[:-1].repeat_interleave(rounded)
        positions = positions.clamp(max=longest - 1)
        # Padding repeats the last token: any that exists will do.
        tokens = begins.repeat_interleave(rounded) + positions.minimum((lengths - 1).repeat_interleave(rounded))
        sizes, counts = rounded.unique_consecutive(return_counts=True)
        groups = tuple(zip(counts.tolist(), sizes.tolist(), strict=True)) or ((0, 1),)
        ends = bounds[:-1] + lengths - 1
        made = _to(device, [tokens, positions, ends, lengths, order.argsort(), bounds.int()])
        longest = max(longest, -(-longest // fill) * fill) if fill else longest
        return Packing(groups, real, longest, exact, *made)

    @staticmethod
    def filled(lengths: torch.Tensor, context: int, device: torch.device) -> Packing:
        """Captions of ``lengths`` Int[B], each filled up to ``context`` tokens, which are computed as any other."""
        lengths = lengths.cpu().long()
        count, real = len(lengths), int(lengths.sum())
        positions = torch.arange(context).expand(count, context)
        begins = (lengths.cumsum(0) - lengths)[:, None]
        tokens = torch.where(positions < lengths[:, None], begins + positions, real).flatten()
        bounds = torch.arange(count + 1) * context
        ends, whole = bounds[1:] - 1, torch.full((count,), context)
        made = _to(device, [tokens, positions.flatten(), ends, whole, torch.arange(count), bounds.int()])
        return Packing(((count, context),), real, context, True, *made)

    @cached_property
    def seen(self) -> tuple[torch.Tensor | None, ...]:
        """Of every group, which tokens are no padding, Bool[captions, 1, 1, tokens each], or None if all are: a mask
        for attention that is not causal."""
        if self.exact:
            return (None,) * len(self.groups)
        lengths = self.lengths.split([count for count, _ in self.groups])
        return tuple(
            (torch.arange(size, device=own.device) < own[:, None])[:, None, None]
            for own, (_, size) in zip(lengths, self.groups, strict=True)
        )

    def require(self, ids: torch.Tensor) -> None:
        """Raise ValueError for packed ids Int[T] of other captions."""
        if self.real != len(ids):
            raise ValueError(f"the captions have {self.real} tokens by their lengths, but there are {len(ids)}")

    def split(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """Views of Float[T, …], one per group: Float[captions, tokens each, …]."""
        parts = x.split([count * size for count, size in self.groups])
        return (part.unflatten(0, group) for part, group in zip(parts, self.groups, strict=True))


def check_lengths(lengths: torch.Tensor, context_length: int) -> int:
    """The longest of the lengths Int[B] of captions, on the host.

    Raises ValueError when a caption is empty, or longer than the context.
    """
    shortest, longest = (int(x) for x in lengths.aminmax()) if len(lengths) else (1, 1)
    if longest > context_length:
        raise ValueError(f"a caption has {longest} tokens, the context length is {context_length}")
    if shortest < 1:
        raise ValueError("a caption has no token, not even its end")
    return longest


def find_lengths(padded: torch.Tensor, eot_id: int) -> torch.Tensor:
    """Lengths Int64[B] of captions in padded ids Int[B, L]; 0 where there is no end-of-text token.

    A caption ends at its first one, as open_clip has it, but for one that it begins with.
    """
    # Some tokenizers begin captions with the token that ends them (OPT); others fill up with it, even an empty caption.
    ends = padded == eot_id
    after = (ends.cumsum(dim=1) > ends[:, :1].int()) & ends & ~ends.all(dim=1, keepdim=True)
    return torch.where(after.any(dim=1), after.int().argmax(dim=1) + 1, ends[:, 0].long())


def unpad(padded: torch.Tensor, eot_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded ids Int[B, L] as packed ids Int[T] and lengths Int64[B].

    Raises ValueError for a row without an end-of-text token.
    """
    lengths = find_lengths(padded, eot_id)
    if not bool((lengths > 0).all()):
        raise ValueError(f"a caption has no end-of-text token ({eot_id}); was it made by this model's tokenizer?")
    keep = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
    return padded[keep], lengths


def _to(device: torch.device, tensors: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Ship small tensors without waiting for the device."""
    if device.type != "cuda":
        return iter(tensors)
    return (tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)


def attend(qkv: torch.Tensor, packing: Packing, *, causal: bool) -> torch.Tensor:
    """Attention of every caption to itself: Float[T, 3, heads, E] to Float[T, heads, E]."""
    # Padding follows its caption: where attention is causal, no token sees it.
    if (causal or packing.exact) and has_kernel(qkv.device, qkv.dtype, qkv.shape[-1]):
        bounds, longest = packing.bounds, packing.longest
        q, k, v = qkv.unbind(1)
        return _varlen(q, k, v, (bounds, bounds), (longest, longest), causal=causal)
    return _attend_in_groups(qkv, packing, causal)


# Not compiled, here and below: every batch has groups of its own.
@torch.compiler.disable
def _attend_in_groups(qkv: torch.Tensor, packing: Packing, causal: bool) -> torch.Tensor:
    found = []
    seen = (None,) * len(packing.groups) if causal else packing.seen
    for part, mask in zip(packing.split(qkv), seen, strict=True):
        q, k, v = part.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        found.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(found)


def attend_from(q: torch.Tensor, kv: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Attention of one query per caption to all of the caption: Float[B, heads, E] and Float[T, 2, heads, E] to
    Float[B, heads, E]."""
    if packing.exact and has_kernel(q.device, q.dtype, q.shape[-1]):
        each = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
        k, v = kv.unbind(1)
        return _varlen(q, k, v, (each, packing.bounds), (1, packing.longest), causal=False)
    return _attend_from_in_groups(q, kv, packing)


@torch.compiler.disable
def _attend_from_in_groups(q: torch.Tensor, kv: torch.Tensor, packing: Packing) -> torch.Tensor:
    found = []
    counts = [count for count, _ in packing.groups]
    for mine, part, mask in zip(q.split(counts), packing.split(kv), packing.seen, strict=True):
        k, v = part.permute(2, 0, 3, 1, 4)
        found.append(F.scaled_dot_product_attention(mine[:, :, None], k, v, attn_mask=mask).squeeze(2))
    return torch.cat(found)


def mean(x: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Mean over every caption's tokens: Float[T, d] to Float[B, d], at least in fp32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # Segments of the caption and of its padding by turns; the sum of none is 0.
    padding = packing.bounds.diff() - packing.lengths
    segments = torch.stack([packing.lengths, padding], dim=1).flatten()
    # Unchecked: to look at lengths would wait for the device.
    sums = torch.segment_reduce(x, "sum", lengths=segments, unsafe=True)
    return sums[::2] / packing.lengths[:, None]


def has_kernel(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether FlashAttention takes captions of any lengths at once, so that no padding is needed."""
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and head_width % 8 == 0
        and head_width <= 256
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


# The oldest supported torch says `is_causal=True`, the newest `window_size=(-1, 0)`.
_HAS_WINDOW = "window_size" in inspect.signature(varlen_attn).parameters


def _varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    *,
    causal: bool,
) -> torch.Tensor:
    options: dict[str, object] = {"window_size": (-1, 0 if causal else -1)} if _HAS_WINDOW else {"is_causal": causal}
    return varlen_attn(q, k, v, *bounds, *longest, **options)  # type: ignore[arg-type,return-value]
