"""What blocks compute again: as many as are asked for, and of selective ones what is cheap."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from clipscale.config import load_group
from clipscale.config.model import Model
from clipscale.models import CLIP, build_model
from clipscale.parallel.parallelize import find_blocks
from clipscale.parallel.recompute import _ATTENTION, checkpoint_blocks, keeps
from tests.distributed.test_parallel import make_batch, small


def backward(model: CLIP) -> None:
    batch = make_batch(0, slice(0, 4))
    features = model(batch.images, batch.text_ids[: int(batch.text_lengths.sum())], batch.text_lengths)
    (features.image * features.text).sum().backward()


@pytest.mark.parametrize(("asked", "again"), [("none", 0), (1, 1), (2, 2), (9, 2), ("full", 2), ("selective", 2)])
def test_so_many_blocks_of_each_tower_are_computed_again(asked: str | int, again: int) -> None:
    model, passes = build_model(small("vit")), Counter[str]()
    for tower, blocks in find_blocks(model).items():
        for i, block in enumerate(blocks):
            block.norm1.register_forward_pre_hook(lambda *_, of=f"{tower}{i}": passes.update([of]))
    checkpoint_blocks([*find_blocks(model).values()], asked)
    backward(model)
    expected = {f"{tower}{i}": 1 + (i < again) for tower in ("visual", "text") for i in range(2)}
    assert passes == expected


class Keeping(TorchDispatchMode):
    """Notes what the policy would keep."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if keeps(None, func, *args, **(kwargs or {})) is CheckpointPolicy.MUST_SAVE:
            first = made[0] if isinstance(made, tuple) else made
            self.kept[str(func).split(".")[1], first.shape[-1]] += 1
        return made


@pytest.mark.parametrize("amp", [False, True])
def test_of_a_transformers_block_attention_and_what_widens_is_kept(amp: bool) -> None:
    model = build_model(small("vit"))
    blocks = find_blocks(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp), Keeping() as seen:
        blocks["visual"][0](torch.randn(2, 5, 128))
        lengths = torch.tensor([4, 4])
        blocks["text"][0](torch.randn(8, 128), model.text.packing(lengths))
    products, attended = (
        {size: n for (name, size), n in seen.kept.items() if (name in ("addmm", "mm")) is is_product}
        for is_product in (True, False)
    )
    assert products == {3 * 128: 2, 4 * 128: 2} and attended == {32: 2}


def test_convolutions_are_kept_but_those_in_groups() -> None:
    """Of three in ConvNeXt's block, one is depthwise."""
    for name, kept in (("resnet18", 2), ("convnext_atto", 2)):
        block = find_blocks(build_model(small(name)))["visual"][0]
        width = next(p for p in block.parameters() if p.ndim == 4).shape[0]
        with Keeping() as seen:
            block(torch.randn(2, width, 8, 8))
        assert sum(n for (op, _), n in seen.kept.items() if op == "convolution") == kept


def test_attention_is_known_by_the_names_that_torch_has() -> None:
    import torch.nn.attention.varlen  # registers one of them

    known = [name for name in _ATTENTION if hasattr(getattr(torch.ops, name.split(".")[0]), name.split(".")[1])]
    assert known == [*_ATTENTION], "a name that no supported torch has would keep nothing"


@pytest.mark.parametrize(
    ("name", "asked"), [("tiny", "full"), ("tiny", "selective"), ("tiny", 3), ("rn50", "selective")]
)
def test_nothing_else_changes(name: str, asked: str | int) -> None:
    """Neither a bit of the gradient nor BatchNorm's averages, which a repeated pass would move twice."""
    config = load_group("model", name, Model)
    config.vision.image_size, config.text.layers, config.text.vocab_size, config.text.eot_id = 64, 1, 64, 63
    grads, buffers = [], []
    for ask in ("none", asked):
        model = build_model(config).train()
        checkpoint_blocks([*find_blocks(model).values()], ask)
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=generator)
        features = model(images, torch.tensor([1, 63, 2, 63]), torch.tensor([2, 2]))
        (features.image * features.text).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        buffers.append(dict(model.named_buffers()))
    assert all(torch.equal(grads[1][n], g) for n, g in grads[0].items())
    assert all(torch.equal(buffers[1][n], b) for n, b in buffers[0].items())
