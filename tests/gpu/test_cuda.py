"""The same steps on a GPU. Written without one at hand: these have not run yet."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from clipscale.config import compose
from clipscale.data.loader import Batch
from clipscale.losses import LOSSES
from clipscale.models import build_model
from clipscale.trainer.objective import Objective
from tests.distributed import test_cached as microbatches
from tests.distributed import test_overlap as overlap
from tests.distributed.test_parallel import advance, build, make_batch, small
from tests.towers import draw_captions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def losses_on(device: str, overrides: list[str]) -> list[float]:
    config, _ = compose(overrides)
    config.model = small("vit")
    return advance(build(config, device=device), 0, 3)


@pytest.mark.parametrize(
    ("overrides", "bound"), [([], 1e-4), (["precision=amp_bf16"], 1e-2), (["precision=amp_fp16"], 1e-2)]
)
def test_steps_equal_the_cpus(overrides: list[str], bound: float) -> None:
    assert losses_on("cuda", overrides) == pytest.approx(losses_on("cpu", []), rel=bound)


SHARDED = [
    (["parallel=fsdp"], 1e-4),
    (["parallel=hsdp", "parallel.activation_checkpointing=selective", "precision=amp_bf16"], 1e-2),
    (["parallel=fsdp", "parallel.activation_checkpointing=selective", "precision=bf16"], 2e-2),
    (["parallel=fsdp", "parallel.cpu_offload=true", "optim.clip_grad_norm=1.0"], 1e-4),
    (["parallel=fsdp", "parallel.cpu_offload=true", "precision=bf16", "optim.microbatches=2"], 2e-2),
]


@pytest.mark.parametrize(("overrides", "bound"), SHARDED, ids=str)
def test_sharded_steps_equal_the_cpus(overrides: list[str], bound: float) -> None:
    clipped = [one for one in overrides if one.startswith("optim.clip")]
    expected = losses_on("cpu", clipped)
    backend = "cpu:gloo,cuda:nccl" if "parallel.cpu_offload=true" in overrides else "nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = losses_on("cuda", overrides)
    finally:
        dist.destroy_process_group()
    assert found == pytest.approx(expected, rel=bound)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_losses_equal_the_cpus(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (
        torch.nn.functional.normalize(torch.randn(64, 32, generator=generator, dtype=torch.float64), dim=-1)
        for _ in range(2)
    )
    scale, bias = torch.tensor([20.0]), torch.tensor([-5.0])
    here = LOSSES[name](image, text, scale, bias)
    there = LOSSES[name](image.cuda(), text.cuda(), scale.cuda(), bias.cuda())
    torch.testing.assert_close(there.cpu(), here)


@pytest.mark.parametrize(("name", "bound"), microbatches.PRECISIONS)
def test_microbatches_equal_the_whole_batch(name: str, bound: float) -> None:
    cached, whole = (microbatches.in_precision(name, count, "cuda") for count in (4, 1))
    microbatches.assert_equal([cached], [whole], 10 * bound)  # other kernels for other shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_text_equals_the_cpus(dtype: torch.dtype) -> None:
    """In half precision by FlashAttention, without any padding; in fp32 by groups."""
    ids, lengths = draw_captions([17, 9, 31, 2, 12, 32, 12, 24, 16, 8, 25], 60)
    here, there = (build_model(small("vit")).text for _ in range(2))
    there.cuda()
    truth = here(ids, lengths)
    with torch.autocast("cuda", dtype, enabled=dtype is not torch.float32):
        packing = there.packing(lengths)
        found = there(ids.cuda(), packing).float()
    assert packing.exact == (dtype is not torch.float32)
    bound = 1e-5 if dtype is torch.float32 else 2e-2
    assert (found.cpu() - truth).norm() <= bound * truth.norm()
    (found * found.detach().cos()).sum().backward()
    (truth * truth.detach().cos()).sum().backward()
    scale = max(p.grad.norm() for p in here.parameters())
    for (name, one), other in zip(here.named_parameters(), there.parameters(), strict=True):
        error = (other.grad.cpu() - one.grad).norm()
        assert error <= 3 * bound * max(one.grad.norm(), 0.1 * scale), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_text_waits_for_no_device(dtype: torch.dtype) -> None:
    ids, lengths = draw_captions([17, 9, 31, 2], 60)
    tower = build_model(small("vit")).text.cuda()
    there = ids.cuda()
    tower(there, lengths)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", dtype, enabled=dtype is not torch.float32):
            tower(there, tower.packing(lengths)).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "overrides",
    [[], ["precision=amp_bf16"], ["precision=amp_fp16"], ["optim.microbatches=4"], ["loss=siglip"],
     ["loss.mask_duplicates=text"], ["parallel.activation_checkpointing=full", "precision=amp_bf16"]],
    ids=str,
)  # fmt: skip
def test_a_step_waits_for_no_device(overrides: list[str]) -> None:
    config, _ = compose(["optim.clip_grad_norm=1.0", *overrides])
    config.model = small("vit")
    step = build(config, device="cuda")
    batches = [Batch.concatenate([make_batch(number, slice(None))], pin=True) for number in range(4)]
    step(batches[0], 0, 1e-3)  # compiles kernels, and agrees with the other ranks
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, batch in enumerate(batches[1:], 1):
            step.zero_grad()
            step(batch, 16 * number, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_repeated_pass_draws_as_the_first_one() -> None:
    truth = microbatches.kept(0, "cuda")
    assert microbatches.worst(microbatches.cached([], "cuda"), truth)[0] <= 1e-12


def test_microbatches_save_memory() -> None:
    peaks = []
    for count in (1, 8):
        config, _ = compose([f"optim.microbatches={count}"])
        config.model = small("vit")
        step = build(config, device="cuda")
        batch = Batch.concatenate([make_batch(number, slice(None)) for number in range(16)])
        step(batch, 0, 1e-3)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step.zero_grad()
        step(batch, 256, 1e-3)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 0.5 * peaks[0]


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """A group of its own beside the default one, of one rank: its collectives run in a stream of their own."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.new_group()
    dist.destroy_process_group()


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_texts_sent_ahead_change_nothing(group: dist.ProcessGroup, layout: str, precision: str) -> None:
    config = microbatches.configured([f"parallel={layout}", f"precision={precision}"])
    late, early = (
        overlap.train(step, negatives=True, steps=1)[0]
        for step in (build(config, objective=Objective(config, ahead=one), device="cuda") for one in (None, group))
    )
    assert torch.equal(early[0], late[0])
    assert microbatches.worst(early[1], late[1])[0] <= 1e-4  # attention's own backward pass may differ between runs


def test_gathering_waits_for_its_stream(group: dist.ProcessGroup) -> None:
    assert overlap.gathered_later("cuda", rows=2**18)
    assert all(overlap.given_gathered("cuda"))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_demo_trains_on_a_gpu(tmp_path: Path, parallel: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m"]
    overrides = [
        f"runs_dir={tmp_path}", "name=run", "device=cuda", "tracking=disabled", "precision=amp_bf16",
        f"parallel={parallel}", "total_samples=12800", "schedule.warmup_samples=1280", "ema.decay=0.9",
    ]  # fmt: skip
    done = subprocess.run([*torchrun, "clipscale.train", *overrides], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["metrics"]["val/retrieval/i2t_r1"] > 10 * result["metrics"]["val/retrieval/i2t_r1_chance"]
