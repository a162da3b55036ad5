"""The towers: parameters, initialisation, packing, what they accept."""

from __future__ import annotations

import math
import random
import string
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clipscale.checkpoint.interop import from_open_clip
from clipscale.config import config_dir, load_group
from clipscale.config.model import ImageProjection, Model, Text, TextPool
from clipscale.data import tokenizer as tokenizing
from clipscale.data.tokenizer import Tokenizer
from clipscale.errors import ConfigError
from clipscale.models import CLIP, build_model

# open_clip's model profile; each count includes the scalar temperature.
PARAMETERS = {
    "vit_s_16": 62_257_537,
    "vit_b_32": 151_277_313,
    "vit_b_16": 149_620_737,
    "vit_l_14": 427_616_513,
    "vit_l_14_336": 427_944_193,
    "vit_h_14": 986_109_441,
    "vit_g_14": 1_366_678_273,
    "vit_bigg_14": 2_539_567_105,
    "rn50": 102_007_137,
    "rn101": 119_688_033,
    "rn50x4": 178_300_601,
    "rn50x16": 290_979_217,
    "rn50x64": 623_258_305,
    "convnext_base": 151_518_849,
    "siglip_b_16": 203_155_969,  # but for the bias on its logits
    "so400m_14": 877_360_305,
}
MODELS = sorted(file.stem for file in (config_dir() / "model").glob("*.yaml"))


@pytest.fixture(scope="module")
def tiny() -> CLIP:
    return build_model("tiny").eval()


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_open_clips_parameters(name: str) -> None:
    with torch.device("meta"):
        model = CLIP(load_group("model", name, Model))
    base = name.removesuffix("_quickgelu")
    if base != "tiny":
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS[base]
    activations = {type(m).__name__.lower() for m in model.modules() if "gelu" in type(m).__name__.lower()}
    assert any("quick" in a for a in activations) == name.endswith("_quickgelu")


def test_same_seed_same_weights() -> None:
    one, same, other = build_model("tiny"), build_model("tiny"), build_model("tiny", seed=1)
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        if a.ndim > 1:
            assert not torch.equal(a, c), name


@pytest.mark.parametrize("name", ["tiny", "rn50"])
def test_initialisation_follows_clip(name: str) -> None:
    model = build_model(name)
    width, layers = model.text.norm.normalized_shape[0], len(model.text.blocks)
    expected = {
        "text.token_embedding.weight": 0.02,
        "text.positional_embedding": 0.01,
        "text.blocks.0.attn.qkv.weight": width**-0.5,
        "text.blocks.0.mlp.fc1.weight": (2 * width) ** -0.5,
        "text.blocks.0.attn.proj.weight": width**-0.5 * (2 * layers) ** -0.5,
        "text.blocks.1.mlp.fc2.weight": width**-0.5 * (2 * layers) ** -0.5,
        "text.proj.weight": width**-0.5,
    }
    if name == "tiny":
        fan_in = 3 * 16 * 16
        expected |= {
            "visual.proj.weight": 128**-0.5,
            "visual.trunk.pos_embed": 128**-0.5,
            "visual.trunk.patch_embed.proj.weight": (3 * fan_in) ** -0.5,
            "visual.trunk.blocks.0.mlp.fc1.weight": (3 * 128) ** -0.5,
        }
    else:
        expected |= {"visual.trunk.head.q.weight": 2048**-0.5}
        assert (model.visual.trunk.stages[0][0].conv3_1x1.bn.weight == 0).all()
    parameters = dict(model.named_parameters())
    for key, std in expected.items():
        assert parameters[key].detach().std().item() == pytest.approx(std, rel=0.05), key
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert model.logit_scale.shape == (1,)


@pytest.mark.parametrize("name", ["tiny", "rn50"])
def test_initialisation_is_spread_as_open_clips(name: str) -> None:
    """Every parameter, by its mean and deviation; those of few numbers say little."""
    ours, config = build_model(name), load_group("model", name, Model)
    sizes = dict(context_length=config.context_length, vocab_size=49408, width=config.text.width)
    vision: dict[str, Any] = dict(layers=4, width=128, head_width=32, patch_size=16)
    if name == "rn50":
        vision = dict(layers=[3, 4, 6, 3], width=64, patch_size=None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = open_clip.CLIP(
            config.embed_dim,
            dict(image_size=config.vision.image_size, **vision),
            dict(heads=config.text.heads, layers=config.text.layers, **sizes),
        )
    expected, own = from_open_clip(theirs.state_dict()), ours.state_dict()
    for key, there in expected.items():
        here, there = own[key].double().flatten(), there.double().flatten()
        if len(here) < 128:
            continue
        # Five standard errors, and for what is uniform or constant too.
        assert abs(here.std() - there.std()) <= 5 * there.std() / len(here) ** 0.5, key
        assert abs(here.mean() - there.mean()) <= 7 * there.std() / len(here) ** 0.5, key


def siglip() -> Model:
    """A small one: both towers pool by attention, and what the image tower gives is what is compared."""
    config = load_group("model", "tiny", Model)
    config.vision.timm, config.vision.proj = "vit_base_patch16_siglip_224", ImageProjection.none
    config.text = Text(width=128, layers=2, heads=4, causal=False, pool=TextPool.map, proj_bias=True)
    return config


def test_initialisation_follows_siglip() -> None:
    """That of Flax's layers: Xavier's uniform numbers in the blocks, query, key and value each alone."""
    torch.manual_seed(5)
    model, again = build_model(siglip()), dict(build_model(siglip(), seed=3).named_parameters())
    attention, mlp, probe = 128**-0.5, (6 / (5 * 128)) ** 0.5 / 3**0.5, (6 / 129) ** 0.5 / 3**0.5
    expected = {
        "token_embedding.weight": 128**-0.5, "positional_embedding": 128**-0.5, "pos_embed": 128**-0.5,
        "patch_embed.proj.weight": (3 * 16 * 16) ** -0.5, "qkv.weight": attention, "attn.proj.weight": attention,
        "attn_pool.latent": probe, "attn_pool.q.weight": attention, "attn_pool.kv.weight": attention,
        "attn_pool.proj.weight": attention, "fc1.weight": mlp, "fc2.weight": mlp, "fc1.bias": 1e-6, "fc2.bias": 1e-6,
        "text.proj.weight": 128**-0.5,
    }  # fmt: skip
    seen = set()
    for name, parameter in model.named_parameters():
        if name.startswith("temperature"):
            continue
        kinds = [kind for kind in expected if name.endswith(kind)]
        seen.update(kinds)
        if not kinds:
            value = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            assert (parameter == value).all(), name
        else:
            assert parameter.detach().std().item() == pytest.approx(expected[kinds[0]], rel=0.2), name
            assert not torch.equal(parameter, again[name]), name
    assert seen == set(expected)


def test_no_projection_needs_the_towers_width() -> None:
    config = siglip()
    assert [*CLIP(config).visual.proj.parameters()] == []
    config.embed_dim = 64
    with pytest.raises(ConfigError, match=r"width of 128, but model.embed_dim=64; use model.embed_dim=128"):
        CLIP(config)


def test_padding_does_not_matter(tiny: CLIP) -> None:
    tokenizer = Tokenizer("clip", 32)
    captions = ["a dog", "two very small red circles above one another", "x"]
    together = tiny.encode_text(tokenizer(captions))
    alone = torch.cat([tiny.encode_text(tokenizer(caption)) for caption in captions])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_packed_equals_padded(tiny: CLIP) -> None:
    tokenizer = Tokenizer("clip", 32)
    padded = tokenizer(["a dog", "a large blue star"])
    ids, lengths = tiny.text.pack(padded)
    assert lengths.tolist() == [4, 6] and len(ids) == 10
    assert torch.equal(tiny.encode_text(ids.int(), lengths), tiny.encode_text(padded))


def test_images_are_normalised_inside(tiny: CLIP) -> None:
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, std = torch.tensor(tiny.config.mean).view(3, 1, 1), torch.tensor(tiny.config.std).view(3, 1, 1)
    by_hand = (images.float() / 255 - mean) / std
    torch.testing.assert_close(tiny.encode_image(images), tiny.encode_image(by_hand), atol=1e-5, rtol=1e-4)


def test_normalize_gives_unit_vectors(tiny: CLIP) -> None:
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    torch.testing.assert_close(tiny.encode_image(images, normalize=True).norm(dim=-1), torch.ones(2))


def test_wrong_text_is_refused(tiny: CLIP) -> None:
    with pytest.raises(ValueError, match="no end-of-text token"):
        tiny.encode_text(torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="40 tokens, the context length is 32"):
        tiny.encode_text(torch.zeros(40, dtype=torch.int32), torch.tensor([40]))
    with pytest.raises(ValueError, match="no token"):
        tiny.encode_text(torch.zeros(4, dtype=torch.int32), torch.tensor([4, 0]))
    with pytest.raises(ValueError, match="5 tokens by their lengths, but there are 4"):
        tiny.encode_text(torch.zeros(4, dtype=torch.int32), torch.tensor([3, 2]))


def test_any_timm_architecture() -> None:
    config = load_group("model", "tiny", Model)
    config.vision.timm, config.vision.image_size = "resnet18", 32
    config.vision.patch_size = config.vision.width = config.vision.layers = config.vision.heads = None
    model = build_model(config)
    assert model.encode_image(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 128)
    assert isinstance(model.visual.proj, nn.Linear)


def test_unknown_models_are_one_line() -> None:
    with pytest.raises(ConfigError, match="did you mean vit_b_32"):
        build_model("vit_b32")
    config = load_group("model", "tiny", Model)
    config.vision.timm = "vit_nothing"
    with pytest.raises(ConfigError, match="timm has no such model"):
        build_model(config)
    config.vision.timm = "resnet18"
    with pytest.raises(ConfigError, match="is no ViT"):
        build_model(config)


TOKENIZER = Tokenizer("clip", 10**6)


def test_tokenizer() -> None:
    from open_clip import get_tokenizer

    ours, theirs = Tokenizer("clip", 77), get_tokenizer("ViT-B-32")
    captions = ["A photo of a cat!", "ümlaut, 42 & more…", "word " * 100]
    assert torch.equal(ours(captions), theirs(captions))
    assert [ours.encode(c)[1] for c in captions] == [False, False, True]


@pytest.mark.parametrize("before", ["", "é "])
def test_an_endless_word_is_cut(before: str) -> None:
    from open_clip import get_tokenizer

    letters = "".join(random.Random(0).choices(string.ascii_lowercase, k=2000))
    ours, theirs = Tokenizer("clip", 77), get_tokenizer("ViT-B-32")
    assert torch.equal(ours(before + letters), theirs(before + letters))
    assert ours.encode(f"{before}{letters * 50} and more")[1], "in no time: the whole of it would take minutes"


@settings(max_examples=500, deadline=None)
@given(st.lists(st.one_of(
    st.text(), st.text(st.characters(codec="ascii")),
    st.sampled_from(["don't", "<end_of_text>", "&amp;amp;lt;", "A_b-c", "it\u2019s", "x<y", " ", "\t", "42nd"]),
)).map(" ".join))  # fmt: skip
def test_captions_are_cut_into_words_as_open_clip_does(caption: str) -> None:
    theirs = [*TOKENIZER._impl.encode(caption), TOKENIZER.eot_id]
    assert TOKENIZER.encode(caption)[0][1:].tolist() == theirs[: theirs.index(TOKENIZER.eot_id) + 1]


def test_words_are_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "MOST_WORDS", 50)
    tokenizer = Tokenizer("clip", 77)
    before = tokenizer.encode("one two <end_of_text> é")[0].tolist()
    for n in range(500):
        tokenizer.encode(f"word{n} wörd{n}")
    assert len(tokenizer._words) < 60 and len(tokenizer._impl.cache) < 60
    assert tokenizer.encode("one two <end_of_text> é")[0].tolist() == before


def test_unknown_tokenizer() -> None:
    with pytest.raises(ConfigError, match="did you mean ViT-B-32"):
        Tokenizer("ViT-B32", 77)
