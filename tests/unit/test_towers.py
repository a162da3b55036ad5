"""Towers that compute only what counts give what whole ones give."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clipscale.config import load_group
from clipscale.config.model import Activation, Model, Pool, Text, TextPool
from clipscale.errors import ConfigError
from clipscale.models import CLIP, build_model
from clipscale.models.packing import Packing, unpad
from clipscale.models.text import TextTower
from clipscale.models.vit import PatchLinear, PooledBlock, compute_what_counts, is_poolable
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


# What a token sees and what is pooled, beside CLIP's way.
KINDS: dict[str, dict[str, Any]] = {
    f"{'causal' if causal else 'both-ways'}-{pool.value}{'-filled' if fill else ''}": dict(
        causal=causal, pool=pool, pad_to_context=fill, pad_id=3, proj_bias=fill, norm_eps=1e-6
    )
    for causal in (True, False)
    for pool in TextPool
    for fill in (False, True)
}


def text_tower(dtype: torch.dtype, context: int = 77, layers: int = 3, **kind: Any) -> TextTower:
    config = Text(width=64, layers=layers, heads=4, vocab_size=50, eot_id=49, **kind)
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


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_text_are_the_padded_text(kind: str) -> None:
    """Padding is hidden from attention that is not causal and from pooling, or computed where the model sees it."""
    tower = text_tower(torch.float64, layers=2, **KINDS[kind])
    for name in ("usual", "one-token", "two-groups"):
        ids, lengths = draw_captions(LENGTHS[name], 50)
        truth = padded_text(tower, ids, lengths)
        expected = gradients(truth, tower)
        packings = [tower.packing(lengths)]
        if not tower.config.pad_to_context:
            packings.append(Packing.of(lengths, torch.device("cpu"), exact=True))
        for packing in packings:
            found = tower(ids, packing)
            assert (found - truth).abs().max() <= 1e-12 * truth.abs().max()
            assert worst(gradients(found, tower), expected) <= 1e-12
        alone = torch.cat([tower(one, torch.tensor([len(one)])) for one in ids.split(lengths.tolist())])
        torch.testing.assert_close(truth, alone, atol=1e-12, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.lists(st.integers(1, 40), min_size=1, max_size=9))
def test_any_lengths_are_the_padded_text(kind: str, sizes: list[int]) -> None:
    tower = text_tower(torch.float64, context=40, layers=2, **KINDS[kind])
    ids, lengths = draw_captions(sizes, 50, seed=sum(sizes))
    truth = padded_text(tower, ids, lengths)
    found = tower(ids, lengths)
    assert (found - truth).abs().max() <= 1e-12 * truth.abs().max()
    assert worst(gradients(found, tower), gradients(truth, tower)) <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_no_captions_have_gradients_of_every_kind(kind: str) -> None:
    tower = text_tower(torch.float32, **KINDS[kind])
    nothing = torch.zeros(0, dtype=torch.int32)
    features = tower(nothing, nothing)
    assert features.shape == (0, 32)
    assert all((g == 0).all() for g in gradients(features, tower))


def test_padded_ids_of_a_model_that_sees_its_padding() -> None:
    """What comes after a caption's end is the model's own padding, whatever the tokenizer put there."""
    tower = text_tower(torch.float64, context=12, **KINDS["both-ways-last-filled"])
    captions = [[5, 6, 49], [7, 49]]
    rows = {
        (size, fill): torch.tensor([caption + [fill] * (size - len(caption)) for caption in captions])
        for size, fill in ((12, 3), (7, 0), (3, 49))
    }
    found = [tower(*tower.pack(ids)) for ids in rows.values()]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    longer = text_tower(torch.float64, context=13, **KINDS["both-ways-last-filled"])
    assert not torch.allclose(found[0], longer(*longer.pack(rows[3, 49])))


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


# timm's name, options, whether the last block is pooled
TRUNKS = [
    ("vit_base_patch16_clip_224", {"img_size": 32}, True),
    ("vit_base_patch16_clip_quickgelu_224", {"img_size": 32}, True),
    ("vit_base_patch16_224", {"img_size": (32, 48)}, True),  # neither a norm before the blocks nor a bare convolution
    ("vit_small_patch14_reg4_dinov2", {"img_size": 42, "num_heads": 4}, True),  # registers, LayerScale
    ("vit_base_patch16_224", {"img_size": 32, "qk_norm": True, "scale_attn_norm": True, "qkv_bias": False}, True),
    ("vit_base_patch16_clip_224", {"img_size": 36}, True),  # the last pixels belong to no patch
    ("vit_base_patch16_siglip_224", {"img_size": 32}, False),  # pooled by attention
    ("vit_base_patch16_rope_reg1_gap_256", {"img_size": 32}, False),
    ("vit_base_patch16_224", {"img_size": 32, "global_pool": "avg"}, False),
    ("vit_base_patch16_224", {"img_size": 32, "global_pool": "avg", "fc_norm": False}, False),  # the norm stays before
    ("resnet18", {}, False),
]


def trunks(name: str, options: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """A small one as timm makes it, in float64, and one of the same weights that computes only what counts."""
    sizes = (
        {}
        if name == "resnet18"
        else {"embed_dim": 64, "depth": 2} | ({} if "num_heads" in options else {"num_heads": 4})
    )
    plain, ours = (timm.create_model(name, num_classes=0, **sizes | options).double() for _ in range(2))
    randomise(plain)
    ours.load_state_dict(plain.state_dict())
    compute_what_counts(ours)
    return plain, ours


@pytest.mark.parametrize(("name", "options", "pooled"), TRUNKS, ids=str)
def test_vits_compute_what_timms_do(name: str, options: dict[str, Any], pooled: bool) -> None:
    plain, ours = trunks(name, options)
    assert any(isinstance(module, PooledBlock) for module in ours.modules()) == pooled
    assert {n: p.shape for n, p in plain.state_dict().items()} == {n: p.shape for n, p in ours.state_dict().items()}
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in ours.named_parameters()]
    side = options.get("img_size", 32)
    images = torch.randn(3, 3, *((side, side) if isinstance(side, int) else side), dtype=torch.float64)
    truth, found = plain.eval()(images), ours.eval()(images)
    torch.testing.assert_close(found, truth, atol=1e-12, rtol=1e-12)
    assert worst(gradients(found, ours), gradients(truth, plain)) <= 1e-11


@pytest.mark.parametrize("drops", [{"drop_path_rate": 0.5}, {"patch_drop_rate": 0.5}, {"pos_drop_rate": 0.3}], ids=str)
def test_vits_drop_what_timms_do(drops: dict[str, float]) -> None:
    plain, ours = trunks("vit_base_patch16_clip_224", {"img_size": 64} | drops)
    images = torch.randn(6, 3, 64, 64, dtype=torch.float64)
    drawn = []
    for model in (plain, ours):
        torch.manual_seed(3)
        features = model.train()(images)
        drawn += [features, gradients(features, model)]
    torch.testing.assert_close(drawn[2], drawn[0], atol=1e-12, rtol=1e-12)
    assert worst(drawn[3], drawn[1]) <= 1e-11
    assert (plain.eval()(images) - drawn[0]).abs().max() > 1e-3, "nothing was dropped"


class Mixing(nn.Module):
    """What no block of a ViT has: a scale that depends on the other tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(dim=1, keepdim=True)


def test_a_block_that_cannot_be_pooled_is_not() -> None:
    trunk = timm.create_model(
        "vit_base_patch16_clip_224", img_size=32, num_classes=0, embed_dim=64, depth=2, num_heads=4
    )
    before, block = torch.get_rng_state(), trunk.blocks[-1]
    assert is_poolable(block)
    assert torch.equal(torch.get_rng_state(), before)
    block.ls1 = Mixing()
    assert not is_poolable(block)
    compute_what_counts(trunk)
    assert trunk.blocks[-1] is block


@pytest.mark.parametrize("name", ["tiny", "vit_b_32", "rn50", "convnext_base"])
def test_which_towers_pool_their_last_block(name: str) -> None:
    with torch.device("meta"):
        trunk = CLIP(load_group("model", name, Model)).visual.trunk
    found = [name for name, module in trunk.named_modules() if isinstance(module, PooledBlock | PatchLinear)]
    depth = len(getattr(trunk, "blocks", ()))
    assert found == (["patch_embed.proj", f"blocks.{depth - 1}"] if depth else [])


POOLED = [
    # timm's name, pool, whether the last block is pooled
    ("vit_base_patch16_clip_224", None, True),
    ("vit_base_patch16_clip_224", Pool.token, True),
    ("vit_base_patch16_clip_224", Pool.avg, False),
    ("vit_base_patch16_clip_224", Pool.map, False),
    ("vit_small_patch14_reg4_dinov2", None, True),
    ("vit_small_patch14_reg4_dinov2", Pool.avg, False),
    ("vit_small_patch14_reg4_dinov2", Pool.map, False),
    ("vit_base_patch16_reg4_gap_256", None, False),  # registers, and no class token
    ("vit_base_patch16_siglip_224", Pool.avg, False),
    ("vit_small_patch16_dinov3", None, False),  # timm's Eva
    ("vit_relpos_small_patch16_224", None, False),
]


@pytest.mark.parametrize(("name", "pool", "pooled"), POOLED, ids=str)
def test_towers_pool_as_timms_do(name: str, pool: Pool | None, pooled: bool) -> None:
    config: Model = load_group("model", "tiny", Model)
    config.vision = replace(config.vision, timm=name, width=64, layers=2, pool=pool)
    tower = CLIP(config).visual.double().eval()
    randomise(tower)
    options = {} if pool is None else {"global_pool": pool.value}
    sizes = dict(img_size=64, patch_size=16, embed_dim=64, depth=2, num_heads=4)
    plain = timm.create_model(name, num_classes=0, **sizes, **options).double().eval()
    plain.load_state_dict(tower.trunk.state_dict())
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(tower(images), tower.proj(plain(images)), atol=1e-12, rtol=1e-12)
    assert isinstance(tower.trunk.blocks[-1], PooledBlock) == pooled


@pytest.mark.parametrize(("name", "pool"), [("vit_base_patch16_siglip_224", "token"), ("resnet18", "avg")])
def test_pools_that_timm_does_not_make(name: str, pool: str) -> None:
    config: Model = load_group("model", "tiny", Model)
    sizes = {} if name.startswith("vit") else dict(patch_size=None, width=None, layers=None, heads=None)
    config.vision = replace(config.vision, timm=name, pool=Pool(pool), **sizes)
    with pytest.raises(ConfigError, match=r"pool\S* null$|model.vision.pool=null$"):
        CLIP(config)


@pytest.mark.parametrize(
    ("row", "length"),
    [
        ([5, 9, 0, 0], 2),
        ([5, 6, 7, 9], 4),
        ([5, 9, 9, 9], 2),
        ([9, 5, 9, 0], 3),
        ([9, 5, 9, 9], 3),
        ([9, 0, 0, 0], 1),
        ([9] * 4, 1),
    ],
)
def test_where_a_caption_ends(row: list[int], length: int) -> None:
    """Padded with 0 or with the end itself (9), and begun with it or not."""
    ids, lengths = unpad(torch.tensor([row]), 9)
    assert lengths.tolist() == [length] and ids.tolist() == row[:length]
