"""Texts that are sent while the images are still in their tower change no bit of a step, and leave nobody waiting."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from clipscale.config.schema import Config
from clipscale.data.loader import Batch
from clipscale.distributed.collectives import Gathering, gather, rank, whole, world_size
from clipscale.losses import clip_loss, siglip_loss
from clipscale.trainer.objective import Objective, build_objective
from clipscale.trainer.step import TrainStep
from tests.distributed.test_cached import configured, my_batch
from tests.distributed.test_parallel import B, build

AHEAD = "loss.overlap_gather=true"
STEPS = 3
NEGATIVES = 2  # places of a sample
Trained = list[tuple[torch.Tensor, dict[str, torch.Tensor]]]


def batch_of(number: int, negatives: bool) -> Batch:
    """This rank's share, perhaps with hard negatives: the first place of some samples, both of others, or none."""
    batch = my_batch(number)
    if not negatives:
        return batch
    generator = torch.Generator().manual_seed(1000 * number + rank())
    there = torch.randint(0, NEGATIVES + 1, (len(batch.images), 1), generator=generator)
    lengths = torch.where(torch.arange(NEGATIVES) < there, 3, 0).reshape(-1).int()
    ids = torch.tensor([7, 8, 63], dtype=torch.int32).repeat(int((lengths > 0).sum()))
    ids[::3] = torch.randint(0, 62, (len(ids) // 3,), generator=generator).int()
    return replace(batch, negative_ids=ids, negative_lengths=lengths)


def objective_of(config: Config) -> Objective:
    return build_objective(config, [], torch.device("cpu"))


@contextmanager
def built(overrides: list[str], tower: str = "vit") -> Iterator[TrainStep]:
    """A step, and the group in which it sends ahead while it lasts."""
    config = configured(overrides, tower)
    objective = objective_of(config)
    try:
        yield build(config, objective=objective)
    finally:
        if objective.ahead is not None:
            dist.destroy_process_group(objective.ahead)


def train(step: TrainStep, negatives: bool, steps: int = STEPS) -> Trained:
    results = []
    for number in range(steps):
        step.zero_grad()
        loss = step(batch_of(number, negatives), number * B, 1e-3)
        gradients = {n: whole(p.grad).cpu().clone() for n, p in step.model.named_parameters()}
        results.append((loss.cpu(), gradients))
    return results


def trained(overrides: list[str], negatives: bool = False, tower: str = "vit") -> Trained:
    with built(overrides, tower) as step:
        assert (step.objective.ahead is not None) == (AHEAD in overrides and world_size() > 1)
        return train(step, negatives)


def assert_same(ours: Trained, truth: Trained) -> None:
    for number, ((loss, gradients), (true_loss, true_gradients)) in enumerate(zip(ours, truth, strict=True)):
        assert torch.equal(loss, true_loss), f"step {number}: {loss} instead of {true_loss}"
        assert gradients.keys() == true_gradients.keys()
        for name, gradient in gradients.items():
            assert torch.equal(gradient, true_gradients[name]), f"step {number}: gradient of {name}"


RECOMPUTED = "parallel.activation_checkpointing=full"
TABLE = [
    # world, overrides, hard negatives
    (2, ["parallel=ddp", RECOMPUTED], True),
    pytest.param(2, ["parallel=ddp", "loss=siglip"], True, marks=pytest.mark.slow),
    pytest.param(2, ["parallel=ddp", "loss.dtype=bf16", "precision=amp_bf16"], True, marks=pytest.mark.slow),
    (2, ["parallel=ddp", "loss.mask_duplicates=text", "model.vision.drop_path=0.3"], True),
    pytest.param(2, ["parallel=fsdp"], False, marks=pytest.mark.slow),
    pytest.param(2, ["parallel=fsdp", RECOMPUTED], True, marks=pytest.mark.slow),
    pytest.param(2, ["parallel=fsdp", "loss=siglip", RECOMPUTED], False, marks=pytest.mark.slow),
    (2, ["parallel=fsdp", "precision=amp_fp16"], True),
    pytest.param(2, ["parallel=fsdp", "optim.microbatches=2"], True, marks=pytest.mark.slow),  # has no effect
    (4, ["parallel=fsdp", "loss=siglip"], True),
]


# Without recomputation and with all negatives: test_ranks_that_fall_behind.
@pytest.mark.parametrize(("world", "overrides", "negatives"), TABLE, ids=str)
def test_no_bit_changes(pools: Any, world: int, overrides: list[str], negatives: bool) -> None:
    truth = pools[world].run(trained, overrides, negatives)
    for ours, true in zip(pools[world].run(trained, [*overrides, AHEAD], negatives), truth, strict=True):
        assert_same(ours, true)
    assert not torch.equal(truth[0][0][0], truth[0][1][0]), "the steps were all the same"


def test_no_bit_changes_in_one_process() -> None:
    assert_same(trained([AHEAD]), trained([]))


def test_batchnorm_gathers_meanwhile(pool2: Any) -> None:
    """The image tower's own collectives, in the default group, are under way at the same time."""
    truth, ahead = (pool2.run(trained, ["parallel=ddp", *extra], False, "resnet18") for extra in ([], [AHEAD]))
    for ours, true in zip(ahead, truth, strict=True):
        assert_same(ours, true)


# ---- what is sent, and when --------------------------------------------------------------------------------------


def collectives(overrides: list[str]) -> tuple[dict[str, int], int]:
    """Those of a step by name, and how many of them gather before the image tower begins."""
    with built(overrides) as step:
        train(step, negatives=True, steps=2)  # DDP lays its buckets out anew after the first step
        step.zero_grad()
        before = []
        with CommDebugMode() as counted:
            hook = step.model.visual.register_forward_pre_hook(lambda *_: before.append(gathers(counted)))
            step(batch_of(0, negatives=True), 0, 1e-3)
        hook.remove()
        assert len(before) == 1
        return {str(op): count for op, count in counted.get_comm_counts().items()}, before[0]


def gathers(counted: CommDebugMode) -> int:
    return sum(count for op, count in counted.get_comm_counts().items() if "gather" in str(op))


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("recomputed", ["full", pytest.param("none", marks=pytest.mark.slow)])
def test_texts_are_sent_once_and_before_the_images(pool2: Any, layout: str, recomputed: str) -> None:
    overrides = [f"parallel={layout}", f"parallel.activation_checkpointing={recomputed}"]
    for (usual, late), (ahead, early) in zip(
        pool2.run(collectives, overrides), pool2.run(collectives, [*overrides, AHEAD]), strict=True
    ):
        assert ahead == usual
        assert early == late + 1


# ---- ranks that are not in step ----------------------------------------------------------------------------------

DELAYED_STEPS = 20


def delayed(overrides: list[str], slow: bool) -> Trained:
    """Ranks that fall behind at random, before and after the texts and the images."""
    with built(overrides) as step:
        draw = random.Random(rank())

        def dawdle(*_: Any) -> None:
            if slow and draw.random() < 0.5:
                time.sleep(draw.random() * 0.02)

        for tower in (step.model.visual, step.model.text):
            tower.register_forward_pre_hook(dawdle)
            tower.register_forward_hook(dawdle)
        return train(step, negatives=True, steps=DELAYED_STEPS)


@pytest.mark.parametrize(
    ("world", "layout"),
    [(2, "ddp"), pytest.param(2, "fsdp", marks=pytest.mark.slow), pytest.param(4, "ddp", marks=pytest.mark.slow)],
)
def test_ranks_that_fall_behind(pools: Any, world: int, layout: str) -> None:
    truth = pools[world].run(delayed, [f"parallel={layout}"], False)
    for ours, true in zip(pools[world].run(delayed, [f"parallel={layout}", AHEAD], True), truth, strict=True):
        assert_same(ours, true)


TIMEOUT_S = 2


def waited_in_vain() -> str:
    """Of two ranks, the second raises before it has sent its texts."""
    group = objective_of(configured([AHEAD, f"distributed.timeout_s={TIMEOUT_S}"])).ahead
    said = ""
    if rank() == 0:
        gathering = Gathering(torch.ones(3, 2), group)
        try:
            gathering.wait()
        except RuntimeError as error:
            said = str(error)
    dist.barrier()
    dist.destroy_process_group(group)
    return said


def test_a_rank_that_never_sends_is_an_error_after_the_runs_own_timeout(pool2: Any) -> None:
    waiting, _ = pool2.run(waited_in_vain)
    assert "tim" in waiting.lower()


def raised_after_sending() -> tuple[bool, bool]:
    """A step that fails in the image tower of every rank, and what the next ones give."""
    with built(["parallel=ddp"]) as step:
        truth = train(step, negatives=True, steps=2)
    with built(["parallel=ddp", AHEAD]) as step:
        hook = step.model.visual.register_forward_pre_hook(_fail)
        try:
            step(batch_of(7, negatives=True), 0, 1e-3)
            failed = False
        except ArithmeticError:
            failed = True
        hook.remove()
        again = train(step, negatives=True, steps=2)
    assert_same(again, truth)
    return failed, True


def _fail(*_: Any) -> None:
    raise ArithmeticError("no images today")


def test_a_gathering_that_nobody_waits_for_does_no_harm(pool2: Any) -> None:
    assert pool2.run(raised_after_sending) == [(True, True)] * 2


# ---- the losses --------------------------------------------------------------------------------------------------


def given_gathered(device: str = "cpu") -> list[bool]:
    """Whether loss and gradients are the same with the texts gathered before, for what the losses may be asked."""
    generator = torch.Generator().manual_seed(rank())
    image, text, extra = (torch.randn(n, 16, generator=generator).to(device) for n in (6, 6, 4))
    image, text, extra = (torch.nn.functional.normalize(x, dim=-1) for x in (image, text, extra))
    return [
        _agree(loss, image, text, more, comm_dtype)
        for loss in (_clip, _siglip)
        for more in (None, extra)
        for comm_dtype in (None, torch.bfloat16)
    ]


def _clip(image: torch.Tensor, text: torch.Tensor, **options: Any) -> torch.Tensor:
    return clip_loss(image, text, 10.0, **options)


def _siglip(image: torch.Tensor, text: torch.Tensor, **options: Any) -> torch.Tensor:
    return siglip_loss(image, text, 10.0, -5.0, **options)


def _agree(
    loss: Any, image: torch.Tensor, text: torch.Tensor, extra: torch.Tensor | None, comm_dtype: torch.dtype | None
) -> bool:
    results = []
    for early in (False, True):
        inputs = [x.clone().requires_grad_() for x in (image, text, *([] if extra is None else [extra]))]
        columns = torch.cat(inputs[1:])
        gathering = Gathering(columns.to(comm_dtype or columns.dtype)) if early else None
        more = inputs[2] if extra is not None else None
        value = loss(inputs[0], inputs[1], extra_text=more, comm_dtype=comm_dtype, gathering=gathering)
        value.backward()
        results.append([value.detach(), *(x.grad for x in inputs)])
    return all(torch.equal(ours, true) for ours, true in zip(*results, strict=True))


def test_losses_take_what_is_gathered(pool2: Any) -> None:
    for agreed in pool2.run(given_gathered):
        assert all(agreed), agreed


def wrongly_gathered() -> list[str]:
    text = torch.nn.functional.normalize(torch.ones(4, 8), dim=-1)
    said = []
    for wrong in (text[:2], text.bfloat16()):
        with pytest.raises(ValueError, match="gathering brings") as caught:
            clip_loss(text, text, 10.0, gathering=Gathering(wrong))
        said.append(str(caught.value))
    return said


def test_other_texts_than_the_losss_are_refused(pool2: Any) -> None:
    for shape, dtype in pool2.run(wrongly_gathered):
        assert "(4, 8)" in shape and "(8, 8)" in shape
        assert "bfloat16" in dtype


def gathered_later(device: str = "cpu", rows: int = 3) -> bool:
    local = torch.full((rows, 512), float(rank() + 1), device=device, requires_grad=True)
    time.sleep(0.1 * rank())  # whoever does not wait has nothing yet
    gathering = Gathering(local * 1)
    everyone = gathering.wait()
    return torch.equal(everyone, gather(local.detach())) and not everyone.requires_grad


def test_gathering_is_a_gather(pools: Any) -> None:
    assert all(pools[4].run(gathered_later))
