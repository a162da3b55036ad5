"""Towers that compute only what counts give what whole ones give."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clipscale.config.model import Activation, Text
from clipscale.models import CLIP, build_model
from clipscale.models.packing import Packing
from clipscale.models.text import TextTower
from tests.towers import draw_captions, padded_text, randomise


@pytest.fixture(scope="module")
def tiny() -> CLIP:
    return build_model("tiny").eval()


LENGTHS = {
    "one": [6],
    "one-token": [1, 1, 5],
    "equal": [9] * 4,
    "full": [77] * 3,
    "two-groups": [77, 2, 2, 76, 3],
    "every": [*range(77, 1, -1)],
    "usual": [17, 9, 31, 2, 12, 77, 12, 24, 16, 8, 25],
}


def text_tower(dtype: torch.dtype, context: int = 77, layers: int = 3) -> TextTower:
    config = Text(width=64, layers=layers, heads=4, vocab_size=50, eot_id=49)
    tower = TextTower(config, context, 32, Activation.gelu).to(dtype)
    randomise(tower)
    return tower


def gradients(features: torch.Tensor, tower: nn.Module) -> list[torch.Tensor]:
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(7)).to(features)
    return list(torch.autograd.grad((features * weights).sum(), list(tower.parameters())))


def worst(found: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    """The largest relative error of a gradient; that of one that vanishes (a key's bias) against the largest."""
    scale = max(t.norm() for t in truth)
    return max(float((f - t).norm() / max(t.norm(), 1e-4 * scale)) for f, t in zip(found, truth, strict=True))


@pytest.mark.parametrize(("dtype", "features", "gradient"), [("float64", 1e-12, 1e-12), ("float32", 1e-6, 1e-5)])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", LENGTHS)
def test_packed_text_is_the_padded_text(name: str, exact: bool, dtype: str, features: float, gradient: float) -> None:
    tower = text_tower(getattr(torch, dtype))
    ids, lengths = draw_captions(LENGTHS[name], 50)
    truth = padded_text(tower, ids, lengths)
    found = tower(ids, Packing.of(lengths, torch.device("cpu"), exact=exact))
    assert (found - truth).abs().max() <= features * truth.abs().max()
    assert worst(gradients(found, tower), gradients(truth, tower)) <= gradient


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), max_size=12), st.booleans())
def test_a_packing_holds_every_caption_whole(sizes: list[int], exact: bool) -> None:
    ids, lengths = torch.arange(sum(sizes)), torch.tensor(sizes, dtype=torch.int32)
    packing = Packing.of(lengths, torch.device("cpu"), exact=exact)
    assert packing.real == sum(sizes)
    assert exact or len(packing.groups) <= 10
    assert len(packing.tokens) == len(packing.positions) == sum(count * size for count, size in packing.groups)
    if exact:
        assert len(packing.tokens) == packing.real
    rows = [row for group in packing.split(ids[packing.tokens]) for row in group]
    places = [row for group in packing.split(packing.positions) for row in group]
    captions = ids.split(sizes)
    for i, at in enumerate(packing.places.tolist()):
        begin, length = int(packing.bounds[at]), int(packing.lengths[at])
        assert torch.equal(rows[at][:length], captions[i])
        assert places[at].tolist() == list(range(len(rows[at])))
        assert int(packing.ends[at]) == begin + length - 1
        assert int(packing.bounds[at + 1]) == begin + len(rows[at])


def test_little_is_padded() -> None:
    """Captions of 17 tokens in the mean, some of them long."""
    lengths = [random.Random(i).choice((5, 8, 11, 13, 14, 16, 20, 24, 29, 77)) for i in range(256)]
    packing = Packing.of(torch.tensor(lengths), torch.device("cpu"))
    assert packing.longest == 77 and len(packing.tokens) < 1.25 * sum(lengths)


def test_text_of_any_layout_is_the_same() -> None:
    """Each caption has the features that it has alone, whatever it is computed with, in whatever order."""
    tower = text_tower(torch.float64)
    ids, lengths = draw_captions(LENGTHS["usual"], 50)
    together = tower(ids, lengths)
    alone = torch.cat([tower(one, torch.tensor([len(one)])) for one in ids.split(lengths.tolist())])
    torch.testing.assert_close(together, alone, atol=1e-13, rtol=1e-12)
    backwards = tower(torch.cat(ids.split(lengths.tolist())[::-1]), lengths.flip(0))
    torch.testing.assert_close(together, backwards.flip(0), atol=1e-13, rtol=1e-12)


def test_a_batch_without_captions_has_gradients_too(tiny: CLIP) -> None:
    """A rank that has none takes part in what all ranks do."""
    nothing = torch.zeros(0, dtype=torch.int32)
    features = tiny.encode_text(nothing, nothing)
    assert features.shape == (0, 128)
    assert all((g == 0).all() for g in torch.autograd.grad(features.sum(), list(tiny.text.parameters())))


def test_long_captions_fall_into_few_groups() -> None:
    tower = text_tower(torch.float64, context=256, layers=2)
    sizes = [*range(1, 257, 5)]
    ids, lengths = draw_captions(sizes, 50)
    assert len(tower.packing(lengths).groups) <= 10
    torch.testing.assert_close(tower(ids, lengths), padded_text(tower, ids, lengths), atol=1e-12, rtol=1e-12)


def test_the_last_block_computes_no_more_than_the_ends(tiny: CLIP) -> None:
    ids, lengths = draw_captions([5, 30, 5, 17], 100)
    packing = tiny.text.packing(lengths)
    seen: list[tuple[torch.Size, torch.Size]] = []
    hooks = [
        block.mlp.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].shape, output.shape)))
        for block in tiny.text.blocks
    ]
    tiny.text(ids, packing)
    for hook in hooks:
        hook.remove()
    assert [given[0] for given, _ in seen] == [len(packing.tokens)] * (len(tiny.text.blocks) - 1) + [4]
