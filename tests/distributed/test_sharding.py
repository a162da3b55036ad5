"""Sharded models: their units and first weights, what they compute in, and what sharding must not change."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule

from clipscale.checkpoint.pretrained import load_pretrained, read_pretrained
from clipscale.config import Config, compose, load_group
from clipscale.config.model import Model
from clipscale.config.running import Parallel, Strategy
from clipscale.distributed.collectives import fill, gather, gather_rows, rank, whole, world_size
from clipscale.errors import ConfigError
from clipscale.evals import EvalContext
from clipscale.models import CLIP, build_model
from clipscale.optim import Ema
from clipscale.parallel import parallelize
from clipscale.parallel.mesh import build_mesh, shard_size
from clipscale.parallel.parallelize import find_blocks
from tests.distributed.test_layouts import in_a_group
from tests.distributed.test_parallel import advance, build, make_batch, small

CPU = torch.device("cpu")


def configured(*overrides: str, tower: str = "vit") -> Config:
    config, _ = compose([*overrides])
    config.model = small(tower)
    return config


# ---- the mesh ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "world", "per_node", "size"),
    [
        (None, 16, 8, 8),
        (None, 8, 8, 8),
        (None, 2, 1, 1),
        (None, 12, 8, 4),
        (4, 16, 8, 4),
        (16, 16, 8, 16),
        (1, 4, 4, 1),
    ],
)
def test_a_copy_lies_on_a_node(asked: int | None, world: int, per_node: int, size: int) -> None:
    """Or on as many ranks as divide both, where spares leave a node with fewer."""
    assert shard_size(Parallel(Strategy.hsdp, asked), world, per_node) == size


def test_ranks_that_no_copy_shares_evenly() -> None:
    with pytest.raises(ConfigError, match=r"shard_size=4 does not divide the 6 processes.*use parallel.shard_size=2"):
        shard_size(Parallel(Strategy.hsdp, 4), 6, 8)


def _places(strategy: str, size: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    mesh = build_mesh(Parallel(Strategy(strategy), size), CPU)
    return tuple(mesh.shape), tuple(mesh.get_coordinate() or ())


def test_ranks_beside_each_other_share_a_copy(pool4: Any) -> None:
    assert pool4.run(_places, "hsdp", 2) == [((2, 2), (i // 2, i % 2)) for i in range(4)]
    assert pool4.run(_places, "fsdp", None) == [((1, 4), (0, i)) for i in range(4)]


# ---- units ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "image", "text"),
    [
        ("vit_b_32", 12, 12), ("vit_l_14", 24, 12), ("rn50", 16, 12), ("rn101", 33, 12), ("convnext_base", 36, 12),
        ("siglip_b_16", 12, 12), ("so400m_14", 27, 27),
    ],
)  # fmt: skip
def test_units_of_the_models(name: str, image: int, text: int) -> None:
    with torch.device("meta"):
        found = find_blocks(CLIP(load_group("model", name, Model)))
    assert (len(found["visual"]), len(found["text"])) == (image, text)


@pytest.mark.parametrize(("tower", "blocks"), [("vit", 2), ("siglip", 2), ("convnext_atto", 12), ("resnet18", 8)])
def test_every_block_is_gathered_by_itself(tower: str, blocks: int) -> None:
    """Beside them the temperature is, and the root, which has the rest."""
    with in_a_group():
        step = build(configured("parallel=fsdp", tower=tower))
    assert sum(isinstance(module, FSDPModule) for module in step.model.modules()) == blocks + 2 + 2


def test_layers_of_another_librarys_tower_are_units() -> None:
    pytest.importorskip("transformers")
    from tests.hf import hf_model

    config, _ = compose(["parallel=fsdp"])
    config.model = hf_model("bert", eot_id=63)
    with in_a_group():
        step = build(config)
    assert all(isinstance(block, FSDPModule) for block in step.model.text.blocks) and len(step.model.text.blocks) == 2


# ---- first weights ----------------------------------------------------------------------------------------------


def _first(overrides: list[str], tower: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """All weights, and those of which this rank holds more than its shard."""
    config = configured(*overrides, tower=tower)
    model = build_model(config.model, seed=5, drawn=False)
    laid_out = parallelize(model, config.parallel, CPU).model
    shards = config.parallel.shard_size or world_size()
    more = [name for name, p in laid_out.named_parameters() if _held(p) > 4 * _rows(p, shards) * p.shape[1:].numel()]
    return {name: whole(p.detach()).clone() for name, p in laid_out.named_parameters()}, more


def _rows(parameter: torch.Tensor, shards: int) -> int:
    return -(-parameter.shape[0] // shards)


def _held(parameter: Any) -> int:
    return parameter.to_local().untyped_storage().nbytes()


@pytest.mark.parametrize(
    ("world", "tower", "overrides"),
    [
        (1, "vit", ["parallel=fsdp"]),
        (2, "siglip", ["parallel=fsdp"]),
        (2, "vit", ["parallel=hsdp", "parallel.shard_size=1"]),
        (2, "vit", ["parallel=fsdp", "parallel.cpu_offload=true", "precision=bf16"]),
        (2, "convnext_atto", ["parallel=fsdp"]),  # drawn by timm
        (4, "vit", ["parallel=hsdp", "parallel.shard_size=2"]),
        pytest.param(2, "resnet50_clip", ["parallel=fsdp"], marks=pytest.mark.slow),
        pytest.param(4, "siglip", ["parallel=fsdp"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_seed_gives_the_same_weights_on_any_layout(pools: Any, world: int, tower: str, overrides: list[str]) -> None:
    """Bit for bit, and drawn without a rank that has the whole: torch's own draws give every rank the same shard."""
    alone = build_model(small(tower), seed=5).state_dict()
    if world == 1:
        with in_a_group():
            everyone = [_first(overrides, tower)]
    else:
        everyone = pools[world].run(_first, overrides, tower)
    for found, more in everyone:
        assert not more
        for name, tensor in found.items():
            assert torch.equal(tensor, alone[name]), name


def test_buffers_have_values_before_weights_do() -> None:
    whole_model, bare = (build_model(small("resnet50_clip"), drawn=drawn) for drawn in (True, False))
    assert all(parameter.is_meta for parameter in bare.parameters())
    buffers = dict(bare.named_buffers())
    assert buffers.keys() == dict(whole_model.named_buffers()).keys()
    assert all(torch.equal(buffers[name], buffer) for name, buffer in whole_model.named_buffers())


@pytest.mark.parametrize("part", ["", "visual.trunk."])
def test_weights_of_a_file_reach_their_shards(tmp_path: Path, part: str) -> None:
    """What the file has none for is drawn."""
    config = configured("parallel=fsdp")
    given, drawn = (build_model(config.model, seed=seed).state_dict() for seed in (9, 5))
    save_file({name: x for name, x in given.items() if name.startswith(part)}, tmp_path / "w.safetensors")
    model = build_model(config.model, seed=5, drawn=False)
    load_pretrained(model, read_pretrained(str(tmp_path / "w.safetensors")))
    with in_a_group():
        found = parallelize(model, config.parallel, CPU).model
        for name, parameter in found.named_parameters():
            expected = given if name.startswith(part) else drawn
            assert torch.equal(whole(parameter.detach()), expected[name]), name


def _peak_bytes(drawn: bool) -> int:
    """By how much this process grew at most while it made a model and cut it."""
    config = configured("parallel=fsdp")
    config.model.text.vocab_size, config.model.text.layers, config.model.text.width = 20_000, 8, 512
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
    before = _status("VmRSS")
    parallelize(build_model(config.model, drawn=drawn), config.parallel, CPU)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def test_no_rank_holds_the_whole_model(pool2: Any) -> None:
    """Of 36 M parameters, 144 MB, a rank has half, and the largest of them, 41 MB, whole for a while."""
    pool2.run(_peak_bytes, False)  # what is imported at first use
    bare, drawn = (max(pool2.run(_peak_bytes, way)) for way in (False, True))
    assert bare < 0.75 * drawn, f"{bare / 1e6:.0f} MB without storage, {drawn / 1e6:.0f} MB with"


# ---- what it computes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_no_parameter_is_a_scalar(name: str) -> None:
    """Sharding refuses those."""
    assert all(parameter.ndim >= 1 for parameter in build_model(small(name), logit_bias=-10.0).parameters())


def test_the_temperature_is_fp32_whatever_the_towers_are() -> None:
    """In bf16, 13.46 would be 13.375."""
    config = configured("parallel=fsdp", "precision=bf16", "loss=siglip")
    with in_a_group():
        step = build(config, build_model(config.model, logit_scale=13.4637, logit_bias=-10.01))
        batch = make_batch(0, slice(0, 16))
        packing = step.model.text.packing(batch.text_lengths)
        features = step.laid_out.module(batch.images, batch.text_ids, packing)
        assert features.logit_scale.item() == pytest.approx(13.4637, rel=1e-6)
        assert features.logit_bias.item() == pytest.approx(-10.01, rel=1e-6)
        image = step.model.encode_image(batch.images).detach()
        assert {p.dtype for p in step.model.parameters()} == {torch.float32}
    assert (features.image.dtype, features.text.dtype, image.dtype) == (torch.float32,) * 3
    exact = build_model(config.model).encode_image(batch.images).detach()
    assert 1e-4 < (image - exact).norm() / exact.norm() < 2e-2, "towers compute in 8 bits"


def _averages(strategy: str) -> dict[str, torch.Tensor]:
    step = build(configured(f"parallel={strategy}"))
    assert isinstance(step.ema, Ema)
    advance(step, 0, 3)
    return {name: whole(tensor).clone() for name, tensor in step.ema.state_dict().items()}


def test_the_average_is_ddps(pool2: Any) -> None:
    """Of two ranks, sums have one order: no bit differs."""
    of_ddp, of_fsdp = (pool2.run(_averages, strategy)[0] for strategy in ("ddp", "fsdp"))
    assert of_ddp.keys() == of_fsdp.keys()
    assert all(torch.equal(of_ddp[name], tensor) for name, tensor in of_fsdp.items())


def test_names_stay_what_they_are() -> None:
    config = configured("parallel=fsdp", "parallel.compile=true", "parallel.activation_checkpointing=selective")
    names = list(build_model(config.model).state_dict())
    with in_a_group():
        assert list(build(config).model.state_dict()) == names


def test_an_evaluation_may_come_before_training() -> None:
    """Neither are towers gathered for good by it, nor do its tensors refuse what training writes into them."""
    config = configured("parallel=fsdp", "precision=bf16")
    with in_a_group():
        step = build(config)
        context = EvalContext(step.model, _Letters(), CPU, 4, torch.no_grad, lambda image, text: image.sum())
        assert context.encode_captions(["abc", "d"]).shape == (2, 128)
        with torch.no_grad():
            step.model.encode_image(make_batch(0, slice(0, 2)).images)
        advance(step, 0, 1)
        assert context.encode_captions(["abc", "d"]).isfinite().all()


class _Letters:
    """A tokenizer of letters."""

    def encode(self, text: str) -> tuple[list[int], bool]:
        return [*(ord(letter) - ord("a") for letter in text), 63], False


def _collectives() -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        x = torch.ones(2, 3, requires_grad=True)
        gather(x).sum().backward()
        gather_rows(torch.ones(1 + rank(), 2))
        fill(torch.empty(2), torch.ones(2))
    return [str(one.message) for one in said]


def test_collectives_are_none_that_torch_gives_up(pool2: Any) -> None:
    assert pool2.run(_collectives) == [[], []]


def test_a_process_alone_is_sharded_too() -> None:
    with in_a_group():
        assert world_size() == 1 and dist.get_backend() == "gloo"
        assert isinstance(build(configured("parallel=hsdp")).model, FSDPModule)
