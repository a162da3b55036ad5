"""Compiled towers give what plain ones do, and few graphs serve batches of any lengths."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from clipscale.config.model import Activation, Text, TextPool
from clipscale.models.packing import Packing
from clipscale.models.text import FILL, TextTower
from tests.towers import draw_captions, randomise


def tower(layers: int = 2, **kind: Any) -> TextTower:
    made = TextTower(Text(width=64, heads=2, layers=layers, vocab_size=50, **kind), 77, 32, Activation.gelu)
    randomise(made)
    return made


def batches(count: int, pairs: int = 24) -> list[list[int]]:
    """Captions of LAION's lengths, more or less, and at last one batch with nothing but long ones."""
    draw = random.Random(0)
    found = [[min(77, 2 + int(draw.lognormvariate(2.5, 0.7))) for _ in range(pairs)] for _ in range(count - 1)]
    return [*found, [77] * pairs]


def outcome(text: TextTower, lengths: list[int]) -> list[torch.Tensor]:
    """Features, and the gradients of all parameters."""
    features = text(*draw_captions(lengths, 50))
    return [features.detach(), *torch.autograd.grad(features.cos().sum(), list(text.parameters()))]


@pytest.mark.parametrize("lengths", [[1], [256], [3, 77, 20, 20, 5], [77] * 10])
def test_a_filled_batch_is_the_batch(lengths: list[int]) -> None:
    text, ids = tower().double(), draw_captions(lengths, 50)
    if max(lengths) > 77:
        text.positional_embedding = torch.nn.Parameter(torch.randn(256, 64, dtype=torch.float64))
    plain = Packing.of(ids[1], torch.device("cpu"))
    for exact in (False, True):
        filled = Packing.of(ids[1], torch.device("cpu"), exact=exact, fill=FILL)
        assert len(filled.tokens) % FILL == 0 < len(filled.tokens) - plain.real <= 2 * FILL
        assert filled.longest >= max(size for _, size in filled.groups) and filled.longest % FILL == 0
        assert len(filled.bounds) == len(lengths) + 2 and int(filled.bounds[-1]) == len(filled.tokens)
        torch.testing.assert_close(text(ids[0], filled), text(ids[0], plain), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("pool", TextPool)
def test_so_are_captions_seen_both_ways(pool: TextPool) -> None:
    if pool is TextPool.last:
        kind: dict[str, Any] = {"pad_to_context": True}
    else:
        kind = {"pool": pool}
    text, ids = tower(causal=False, **kind).double(), draw_captions([3, 77, 20, 20, 5], 50)
    plain = text(*ids)
    text.fill = FILL
    torch.testing.assert_close(text(*ids), plain, atol=1e-12, rtol=1e-12)


def held_against_plain(backend: str, sizes: list[list[int]]) -> list[int]:
    """How many graphs there are after each batch; what they compute is held against the plain tower's."""
    torch._dynamo.reset()
    counters.clear()
    plain, compiled, graphs = tower(), tower(), []
    compiled.compile_blocks(backend)
    for lengths in sizes:
        for found, truth in zip(outcome(compiled, lengths), outcome(plain, lengths), strict=True):
            assert (found - truth).norm() <= 1e-5 * max(float(truth.norm()), 1e-2)
        graphs.append(counters["stats"]["unique_graphs"])
    return graphs


def test_few_graphs_serve_all_batches() -> None:
    """Traced, not turned into code, which takes long: shapes are told apart before that."""
    sizes = batches(10)
    assert len({tuple(sorted(lengths)) for lengths in sizes}) == 10
    graphs = held_against_plain("eager", sizes)
    # For each piece of a block, beside attention in groups, one graph of the first shape and one of any.
    assert graphs[-1] == graphs[3] <= 16, graphs


@pytest.mark.slow
def test_compiled_blocks_are_the_plain_ones() -> None:
    graphs = held_against_plain("inductor", batches(6))
    assert graphs[-1] == graphs[3]
