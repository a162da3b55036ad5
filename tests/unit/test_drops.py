"""What training leaves out of the image tower depends on each sample's seed alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.layers import PatchDropout
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from clipscale.config import load_group
from clipscale.config.model import Model, Pool, Vision
from clipscale.data.prepare import sample_seed
from clipscale.errors import ConfigError
from clipscale.models import CLIP, build_model
from clipscale.models.drops import PATCHES, PATHS, DropPatches, DropPath, draw
from clipscale.models.flops import Execution, activations, flops, parameters
from clipscale.models.vision import VisionTower
from tests.towers import randomise

SEEDS = torch.tensor([sample_seed(0, stream, position) for stream in range(40) for position in range(50)])


def tower(**vision: Any) -> VisionTower:
    config: Model = load_group("model", "tiny", Model)
    sizes = {} if "timm" not in vision else dict(patch_size=None, width=None, layers=None, heads=None)
    config = replace(config, vision=replace(config.vision, **sizes | vision))
    return build_model(config, seed=3).visual


def images(count: int, size: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def scramble(x: int) -> int:
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        x = (x ^ x >> shift) * factor % 2**32
    return x ^ x >> 15


def test_the_numbers_are_these() -> None:
    """They may never change: a resumed run must draw what it would have drawn."""
    assert sample_seed(7, 3, 11) == -1325303384490763750
    for seed in (0, -1, 2**63 - 1, -(2**63), -1325303384490763750):
        state = scramble(scramble(scramble(seed % 2**64 >> 32 ^ PATCHES) ^ seed % 2**32))
        expected = [scramble((state + number * 0x9E3779B9) % 2**32) for number in range(500)]
        assert draw(torch.tensor([seed]), PATCHES, 500).tolist() == [expected]
    assert expected[499] == 955330580


def test_the_numbers_are_uniform_and_independent() -> None:
    for kind in (PATHS, PATCHES):
        drawn = draw(SEEDS, kind, 24).double() / 2**32
        assert ((drawn >= 0) & (drawn < 1)).all()
        counts = torch.histc(drawn, 64, 0, 1)
        assert ((counts - counts.mean()).square() / counts.mean()).sum() < 110  # chi-square of 63: 99.98 % are below
        # Neighbours in position, in stream, in number; and of another kind.
        other = draw(SEEDS, PATHS + PATCHES - kind, 24).double() / 2**32
        pairs = [(drawn[:-1], drawn[1:]), (drawn[:-50], drawn[50:]), (drawn[:, :-1], drawn[:, 1:]), (drawn, other)]
        for one, two in pairs:
            correlation = torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1]
            assert correlation.abs() < 4 / one.numel() ** 0.5
        assert len(drawn.unique()) > 0.999 * drawn.numel()


@pytest.mark.parametrize(
    "vision", [{"drop_path": 0.5}, {"patch_dropout": 0.5}, {"timm": "convnext_atto", "drop_path": 0.5}], ids=str
)
def test_a_sample_loses_the_same_in_any_company(vision: dict[str, Any]) -> None:
    made = tower(**vision).double().train()
    randomise(made)
    batch, seeds = images(6), SEEDS[:6]
    together = made(batch, seeds)
    torch.testing.assert_close(made(batch.flip(0), seeds.flip(0)).flip(0), together, atol=1e-12, rtol=0)
    alone = torch.cat([made(batch[i : i + 1], seeds[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(alone, together, atol=1e-12, rtol=0)
    changed = (made(batch, seeds + 1) - together).norm(dim=1) > 1e-6 * together.norm(dim=1)
    assert changed.sum() >= 5
    assert torch.equal(made.eval()(batch, seeds), made(batch))


def test_branches_are_dropped_as_often_as_asked() -> None:
    made = tower(drop_path=0.3, layers=7)
    made.train()(images(2), SEEDS[:2])
    paths = [module for module in made.modules() if isinstance(module, DropPath)]
    assert len(paths) == 12, "two in each block but the first, whose rate is 0"
    made.drops.draw(len(SEEDS), SEEDS, SEEDS.device)
    for number, path in enumerate(paths):
        rate = 0.3 * (1 + number // 2) / 6
        lost = (path.scale == 0).double().mean()
        assert abs(lost - rate) < 4 * (rate / len(SEEDS)) ** 0.5
        torch.testing.assert_close(path.scale.max(), torch.tensor(1 / (1 - rate)))


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
@pytest.mark.parametrize("size", [32, 48, 64, 112])
def test_as_many_patches_stay_as_in_timm(share: float, size: int) -> None:
    patches = (size // 16) ** 2
    theirs = PatchDropout(share, num_prefix_tokens=1).train()(torch.zeros(2, 1 + patches, 8))
    assert 1 + Vision(patch_dropout=share).kept_patches(patches) == theirs.shape[1]


REGISTERS = dict(timm="vit_small_patch14_reg4_dinov2", patch_size=16, width=64, layers=2, heads=2)


@pytest.mark.parametrize(("vision", "prefix"), [({}, 1), (REGISTERS, 5)], ids=["class", "registers"])
def test_patches_are_dropped_and_nothing_else(vision: dict[str, Any], prefix: int) -> None:
    made = tower(patch_dropout=0.5, **vision).train()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    drop = next(module for module in made.modules() if isinstance(module, DropPatches))
    drop.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    count = 1000
    made(images(4).repeat(count // 4, 1, 1, 1), SEEDS[:count])
    (before, after), kept = seen[0], drop.kept
    assert before.shape[1] == prefix + 16 and after.shape[1] == prefix + 8
    assert torch.equal(after[:, :prefix], before[:, :prefix])
    assert torch.equal(after, before[torch.arange(count)[:, None], kept])
    assert all(len(row.unique()) == prefix + 8 for row in kept)
    often = torch.bincount(kept[:, prefix:].flatten() - prefix, minlength=16).double() / count
    assert (often - 0.5).abs().max() < 4 * 0.5 / count**0.5
    seen.clear()
    made.eval()(images(2))
    assert torch.equal(*seen[0])


def test_without_any_nothing_changes() -> None:
    plain, none = tower(), tower(patch_dropout=0.0, drop_path=0.0)
    assert [*dict(plain.named_modules())] == [*dict(none.named_modules())]
    assert torch.equal(none.train()(images(3), SEEDS[:3]), plain.eval()(images(3)))


@pytest.mark.parametrize("pool", [*Pool])
def test_patches_are_dropped_however_they_are_pooled(pool: Pool) -> None:
    made = tower(patch_dropout=0.75, pool=pool, **REGISTERS).train()
    features = made(images(4), SEEDS[:4])
    assert features.shape == (4, 128) and not torch.equal(features, made(images(4), SEEDS[4:8]))
    assert all(p.grad is not None for p in made.parameters() if features.sum().backward(retain_graph=True) is None)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "resnet50_clip", "eva02_tiny_patch14_224"])
def test_other_towers_have_no_patches(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"model.vision.timm={name} is no VisionTransformer.*patch_dropout=0$"):
        tower(timm=name, patch_dropout=0.5, image_size=224)


def test_without_seeds_torchs_generator_draws() -> None:
    made = tower(patch_dropout=0.5).train()
    torch.manual_seed(1)
    first = made(images(3))
    assert not torch.equal(made(images(3)), first)
    torch.manual_seed(1)
    assert torch.equal(made(images(3)), first)


def test_compiled_blocks_draw_the_same() -> None:
    """And are compiled once, whatever is drawn."""
    plain, compiled = (tower(patch_dropout=0.5, drop_path=0.5).train() for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    for block in compiled.trunk.blocks:
        block.compile(backend=counter)
    graphs = []
    for step in range(3):
        batch, seeds = images(4) // (step + 1), SEEDS[4 * step : 4 * step + 4]
        expected, found = plain(batch, seeds), compiled(batch, seeds)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        gradients = [
            torch.autograd.grad(made.square().sum(), list(model.parameters()))
            for made, model in ((expected, plain), (found, compiled))
        ]
        for one, two in zip(*gradients, strict=True):
            torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-4)
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1 and graphs[0] <= len(compiled.trunk.blocks)


def test_a_model_passes_the_seeds_on() -> None:
    config: Model = load_group("model", "tiny", Model)
    model = CLIP(replace(config, vision=replace(config.vision, patch_dropout=0.5))).train()
    ids, lengths = torch.tensor([49406, 49407] * 4), torch.tensor([2] * 4)
    features = model(images(4), ids, lengths, None, SEEDS[:4]).image
    assert torch.equal(model(images(4), ids, lengths, seeds=SEEDS[:4]).image, features)
    assert not torch.equal(model(images(4), ids, lengths, seeds=SEEDS[4:8]).image, features)


def kept_bytes(made: VisionTower, count: int) -> int:
    """What autograd keeps of a batch for the backward pass, parameters left out."""
    storages = {t.untyped_storage().data_ptr(): 0 for t in (*made.parameters(), *made.buffers())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = torch.nn.functional.normalize(made(images(count), SEEDS[:count]), dim=-1)
    del features
    return sum(storages.values())


VARIANTS = [{"patch_dropout": 0.5}, {"patch_dropout": 0.75, "pool": Pool.avg}, {"pool": Pool.avg, "drop_path": 0.2}]


@pytest.mark.parametrize("vision", VARIANTS, ids=str)
def test_what_patch_dropout_and_pools_cost(vision: dict[str, Any]) -> None:
    """Fewer patches' FLOPs and bytes; where all are pooled, nothing of the last block is left out."""
    config: Model = load_group("model", "tiny", Model)
    config = replace(config, vision=replace(config.vision, **vision))
    made = CLIP(config).visual.train()
    execution = Execution(pooled_last_block=True)
    assert parameters(config).vision == sum(p.numel() for p in made.parameters())
    with FlopCounterMode(display=False) as counter:
        made(images(2))
    cost = flops(config, execution).vision
    assert cost == pytest.approx(counter.get_total_flops() / 2, rel=1e-3)
    assert (flops(config, replace(execution, pooled_last_block=False)).vision > cost) == ("pool" not in vision)
    assert activations(config, execution).vision == pytest.approx(kept_bytes(made, 3) - kept_bytes(made, 2), rel=0.01)


def test_the_cost_of_attention_pools_is_not_known() -> None:
    config: Model = load_group("model", "tiny", Model)
    with pytest.raises(ConfigError, match=r"model.vision.pool=map: what it costs is not known"):
        flops(replace(config, vision=replace(config.vision, pool=Pool.map)))
