"""What a model costs, by formula: held against the model itself, torch's counter, and what autograd keeps."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import _VersionWrapper
from torch.utils.flop_counter import FlopCounterMode

from clipscale.config import config_dir, load_group
from clipscale.config.model import Model, TextPool
from clipscale.config.optim import PrecisionName
from clipscale.errors import ConfigError
from clipscale.models import CLIP, Classifier
from clipscale.models.flops import MIB, NOMINAL, Execution, activations, flops, parameters, render
from clipscale.models.groups import rounded
from clipscale.models.packing import Packing
from clipscale.parallel.parallelize import find_blocks
from clipscale.parallel.recompute import checkpoint_blocks

ROOT = Path(__file__).parents[2]
MODELS = sorted(file.stem for file in (config_dir() / "model").glob("*.yaml"))

# GFLOPs of the image and of the text tower, from open_clip's docs/model_profile.csv.
PROFILE = {
    "vit_s_16": (9.2, 3.38),
    "vit_b_32": (8.82, 5.96),
    "vit_b_16": (35.13, 5.96),
    "vit_l_14": (162.03, 13.3),
    "vit_l_14_336": (381.92, 13.3),
    "vit_h_14": (334.59, 47.09),
    "vit_g_14": (534.06, 47.09),
    "vit_bigg_14": (967.5, 97.86),
    "rn50": (12.22, 5.96),
    "rn101": (19.54, 5.96),
    "rn50x4": (42.56, 9.27),
    "rn50x16": (149.39, 13.3),
    "rn50x64": (529.11, 23.55),
    "convnext_base": (30.71, 5.96),
    "siglip_b_16": (35.42, 11.02),
    "so400m_14": (220.35, 13.19),
}


@cache
def config_of(name: str) -> Model:
    return load_group("model", name, Model)


def on_meta(config: Model, **options: Any) -> CLIP:
    with torch.device("meta"):
        return CLIP(config, **options)


def inputs(config: Model, lengths: Sequence[int], device: str) -> tuple[torch.Tensor, torch.Tensor, Packing]:
    """Pairs with captions of these lengths. How they are packed follows from numbers, so that is made with contents."""
    size = config.vision.image_size
    images = torch.empty(len(lengths), 3, size, size, dtype=torch.uint8, device=device)
    ids = torch.ones(sum(lengths), dtype=torch.int32, device=device)
    packing = Packing.of(torch.tensor(lengths), torch.device("cpu"))
    if config.text.pad_to_context:
        packing = Packing.filled(torch.tensor(lengths), config.context_length, torch.device("cpu"))
    there = {name: x.to(device) for name, x in vars(packing).items() if isinstance(x, torch.Tensor)}
    return images, ids, replace(packing, **there)


@pytest.mark.parametrize("name", [name for name in MODELS if not name.endswith("_quickgelu")])
def test_parameters_are_the_models(name: str) -> None:
    if f"{name}_quickgelu" in MODELS:
        assert parameters(config_of(f"{name}_quickgelu")) == parameters(config_of(name))
    model, count = on_meta(config_of(name), logit_bias=-10.0), parameters(config_of(name), logit_bias=True)
    for tower in ("text", "temperature"):
        assert getattr(count, tower) == sum(p.numel() for p in getattr(model, tower).parameters()), tower
    assert count.vision == sum(p.numel() for p in model.visual.parameters())
    assert count.total == parameters(config_of(name)).total + 1


@pytest.mark.parametrize("change", [
    ("vit_xsmall_patch16_clip_224", 224), ("vit_betwixt_patch32_clip_224", 224), ("vit_medium_patch32_clip_224", 224),
    ("vit_base_patch32_clip_448", 448), ("resnet50x4_clip", 320), ("convnext_tiny", 256), ("convnext_small", 224),
    ("convnext_large", 224), ("convnext_xlarge", 224), ("vit_large_patch16_siglip_384", 384),
    ("vit_giantopt_patch16_siglip_256", 256),
])  # fmt: skip
def test_other_architectures(change: tuple[str, int]) -> None:
    config = load_group("model", "vit_b_32", Model)
    config.vision.timm, config.vision.image_size = change
    assert parameters(config).total == sum(p.numel() for p in on_meta(config).parameters())


def test_a_head_is_counted() -> None:
    config = load_group("model", "tiny", Model)
    config.classes = ["circle", "square", "star"]
    with torch.device("meta"):
        made = Classifier(config)
    assert parameters(config).total == sum(p.numel() for p in made.parameters())
    assert parameters(config).head == sum(p.numel() for p in made.head.parameters())


@pytest.mark.parametrize("name", sorted(PROFILE))
def test_flops_are_open_clips(name: str) -> None:
    cost = flops(config_of(name), NOMINAL)
    assert (cost.vision / 1e9, cost.text / 1e9) == pytest.approx(PROFILE[name], rel=1e-3)
    assert flops(config_of(f"{name}_quickgelu" if f"{name}_quickgelu" in MODELS else name), NOMINAL) == cost


def test_a_size_of_ones_own() -> None:
    config = load_group("model", "tiny", Model)
    config.vision.layers, config.vision.width, config.vision.patch_size, config.text.mlp_ratio = 3, 192, 8, 2.5
    assert parameters(config).total == sum(p.numel() for p in on_meta(config).parameters())


def counted(
    config: Model,
    train: bool = False,
    wrap: Callable[[CLIP], None] = lambda model: None,
    lengths: Sequence[int] | None = None,
) -> float:
    """FLOPs of a sample, by torch's own counter, which sees every product."""
    model, lengths = on_meta(config), lengths or [config.context_length] * 2
    wrap(model)
    with FlopCounterMode(display=False) as counter:
        images, *captions = inputs(config, lengths, "meta")
        features = model.visual(images), model.text(*captions)
        if train:
            sum(one.sum() for one in features).backward()
    return counter.get_total_flops() / len(lengths)


@pytest.mark.parametrize("name", ["vit_b_32", "vit_b_16", "vit_l_14", "rn50", "convnext_base", "tiny", "siglip_b_16"])
def test_flops_are_what_torch_counts(name: str) -> None:
    assert flops(config_of(name)).forward == pytest.approx(counted(config_of(name)), rel=1e-3)


@pytest.mark.parametrize("lengths", [[3], [9, 17, 17, 5], [32, 3, 30, 31, 8]])
def test_flops_of_groups_are_what_torch_counts(lengths: list[int]) -> None:
    config = config_of("tiny")
    cost = flops(config, Execution(lengths, grouped=True))
    assert cost.forward == pytest.approx(counted(config, lengths=lengths), rel=1e-3)
    assert cost.text >= flops(config, Execution(lengths)).text


def test_groups_are_as_long_as_packing_makes_them() -> None:
    for lengths in ([1], [77, 76, 3], [256, 30, 31, 90, 25], [8] * 4, list(range(1, 78))):
        groups = Packing.of(torch.tensor(lengths), torch.device("cpu")).groups
        assert sorted(rounded(lengths)) == [size for count, size in groups for _ in range(count)]


def recompute(asked: str | int, model: CLIP) -> None:
    """As ``parallel.activation_checkpointing`` asks."""
    checkpoint_blocks([*find_blocks(model).values()], asked)


# Not ConvNeXt: torch counts the gradients of grouped convolutions as if they had no groups.
@pytest.mark.parametrize(("name", "asked"), [("vit_b_32", 3), ("tiny_quickgelu", "full"), ("rn50", "full")])
def test_flops_of_training_are_what_torch_counts(name: str, asked: str | int) -> None:
    config = config_of(name)
    plain = counted(config, True)
    # The first layer has no gradient of its input to form.
    assert 0.97 * flops(config).training < plain < flops(config).training == flops(config).executed
    wrapped = counted(config, True, partial(recompute, asked))
    assert flops(config, Execution(checkpointing=asked)).repeated == pytest.approx(wrapped - plain, rel=1e-3)


@pytest.mark.parametrize("asked", ["full", "selective", 1])
def test_flops_of_what_is_kept_are_not_repeated(asked: str | int) -> None:
    """Of real tensors: on the meta device attention would not be the operation that is kept."""
    config, found = config_of("tiny"), []
    for ask in ("none", asked):
        model = CLIP(config)
        recompute(ask, model)
        with FlopCounterMode(display=False) as counter:
            images, *captions = inputs(config, [32, 32], "cpu")
            sum(one.sum() for one in (model.visual(images), model.text(*captions))).backward()
        found.append(counter.get_total_flops() / 2)
    assert flops(config, Execution(grouped=True, checkpointing=asked)).repeated == pytest.approx(found[1] - found[0])


def test_what_shorter_captions_and_pooled_blocks_save() -> None:
    """How many times less the whole model then computes, from products counted by hand."""
    for name, pooled, short, both in (("vit_b_32", 1.072, 1.462, 1.566), ("vit_l_14", 1.039, 1.063, 1.102)):
        config = config_of(name)
        full = flops(config, NOMINAL).forward
        assert full / flops(config).forward == pytest.approx(pooled, abs=1e-3)
        assert full / flops(config, replace(NOMINAL, lengths=[17])).forward == pytest.approx(short, abs=1e-3)
        assert full / flops(config, Execution([17])).forward == pytest.approx(both, abs=1e-3)
    mixed, one, other = (flops(config, Execution(lengths)).text for lengths in ([9, 9, 60], [9], [60]))
    assert mixed == pytest.approx((2 * one + other) / 3)


def kept_bytes(
    config: Model, autocast: bool, wrap: Callable[[CLIP], None], lengths: Sequence[int] | None = None
) -> dict[str, float]:
    """Bytes that autograd keeps for a sample, by tower: the difference between a batch and one twice as large.

    Of tensors that have all but contents; on a meta device, attention would not be the fused one.
    """
    model, lengths = on_meta(config), lengths or [config.context_length]
    wrap(model)
    batches = [inputs(config, [*lengths] * times, "cpu") for times in (1, 2)]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model.to_empty(device="cpu")
        sizes = [_kept(model, *batch) for batch in batches]
    return {tower: (sizes[1][tower] - sizes[0][tower]) / len(lengths) for tower in sizes[0]}


def _kept(model: CLIP, images: torch.Tensor, ids: torch.Tensor, packing: Packing) -> dict[str, int]:
    weights = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    storages: dict[int, int] = {}
    gc.collect()
    alive: list[Any] = [one for one in gc.get_objects() if type(one) is _VersionWrapper]
    others = {id(one) for one in alive}  # of passes before this one

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alive.append((tensor, storage))
        if storage._cdata not in weights:
            storages[storage._cdata] = storage.nbytes()
        return tensor

    sizes = {}
    towers = {"vision": lambda: model.visual(images), "text": lambda: model.text(ids, packing)}
    for name, tower in towers.items():
        storages.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            features = torch.nn.functional.normalize(tower().float(), dim=-1)
        # What selective checkpointing keeps is seen by no hook.
        aside = [one for one in gc.get_objects() if type(one) is _VersionWrapper and id(one) not in others]
        kept = [one.val.untyped_storage() for one in aside]
        storages |= {storage._cdata: storage.nbytes() for storage in kept}
        others |= {id(one) for one in aside}
        alive += [*aside, features]
        sizes[name] = sum(storages.values())
    return sizes


@pytest.mark.parametrize(("name", "precision"), [
    ("tiny_quickgelu", "fp32"), ("tiny_quickgelu", "amp_bf16"), ("vit_b_32", "amp_bf16"), ("rn50", "fp32"),
    ("convnext_base", "amp_bf16"), ("siglip_b_16", "fp32"), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (
        ("vit_b_32", "fp32"), ("vit_b_16", "fp32"), ("vit_b_16", "amp_bf16"), ("rn50", "amp_bf16"),
        ("convnext_base", "fp32"), ("siglip_b_16", "amp_bf16"),
    )),
])  # fmt: skip
def test_activations_are_what_autograd_keeps(name: str, precision: str) -> None:
    config = load_group("model", name, Model)
    ways: list[str | int] = ["none", "full", "selective", 2]
    if name != "vit_b_32":
        config.text.layers = 2  # to save time: the text tower is the same in all
    if name == "convnext_base":
        config.vision.timm = "convnext_tiny"  # half as deep
    for asked in ways if name == "tiny_quickgelu" else ways[:3]:
        expected = activations(config, Execution(grouped=True, checkpointing=asked), PrecisionName(precision))
        found = kept_bytes(config, precision == "amp_bf16", partial(recompute, asked))
        assert (expected.vision, expected.text) == pytest.approx((found["vision"], found["text"]), rel=1e-3), asked
        assert (expected.live > 0) == (asked != "none")


@pytest.mark.parametrize("precision", [PrecisionName.fp32, PrecisionName.amp_bf16])
@pytest.mark.parametrize("pool", list(TextPool), ids=lambda pool: pool.value)
def test_text_pooled_in_other_ways(pool: TextPool, precision: PrecisionName) -> None:
    config = load_group("model", "tiny", Model)
    config.text.pool, config.text.causal, config.text.proj_bias = pool, False, True
    assert parameters(config).text == sum(p.numel() for p in on_meta(config).text.parameters())
    assert flops(config).forward == pytest.approx(counted(config), rel=1e-3)
    found = kept_bytes(config, precision is PrecisionName.amp_bf16, lambda model: None)
    assert activations(config, Execution(grouped=True), precision).text == pytest.approx(found["text"], rel=3e-3)


def test_tensors_without_contents_keep_what_real_ones_do() -> None:
    config = config_of("tiny")
    model = CLIP(config)
    real = [_kept(model, *inputs(config, [20, 9] * times, "cpu")) for times in (1, 2)]
    found = kept_bytes(config, False, lambda model: None, [20, 9])
    assert found == {tower: (real[1][tower] - real[0][tower]) / 2 for tower in real[0]}


def test_pooled_blocks_and_short_captions_keep_less() -> None:
    config = config_of("vit_b_32")
    full, pooled = activations(config, NOMINAL), activations(config)
    assert full.vision / MIB == pytest.approx(29.2, abs=0.1) and pooled.vision / MIB == pytest.approx(27.2, abs=0.2)
    assert activations(config, replace(NOMINAL, lengths=[7])).text == pytest.approx(full.text / 11, rel=0.01)
    found = kept_bytes(config, False, lambda model: None, lengths := [7, 30, 12])
    assert activations(config, Execution(lengths, grouped=True)).text == pytest.approx(found["text"], rel=1e-3)


def test_mistakes_are_one_line() -> None:
    config = load_group("model", "tiny", Model)
    with pytest.raises(ConfigError, match=r"captions of 5 to 40 tokens do not fit model\.context_length=32"):
        flops(config, Execution(lengths=[5, 40]))
    for asked in ("some", -1, True, 1.5):
        with pytest.raises(ConfigError, match="none, selective, full or a number of blocks"):
            activations(config, Execution(checkpointing=asked))  # type: ignore[arg-type]
    config.vision.image_size = 65
    with pytest.raises(ConfigError, match="image_size=65 must be a multiple of 16"):
        parameters(config)
    config.vision.timm = "resnet18"
    with pytest.raises(ConfigError, match=r"timm=resnet18: what it costs is not known; known are vit_.*resnet50_clip"):
        parameters(config)


def test_the_table_in_the_documents_is_this_one() -> None:
    assert render() in (ROOT / "docs" / "models.md").read_text()
