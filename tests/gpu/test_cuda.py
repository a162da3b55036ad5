"""The same steps on a GPU. Written without one at hand: these have not run yet."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clipscale.config import compose
from clipscale.distributed.runtime import Runtime
from clipscale.losses import LOSSES
from clipscale.models import build_model
from clipscale.optim import Ema, build_optimizer
from clipscale.parallel import build_scaler, parallelize
from clipscale.trainer.step import TrainStep
from tests.distributed.test_parallel import advance, small

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def losses_on(device: str, overrides: list[str]) -> list[float]:
    config, _ = compose(overrides)
    config.model = small("vit")
    runtime = Runtime(0, 1, 0, torch.device(device))
    laid_out = parallelize(build_model(config.model), config.parallel, runtime.device)
    optimizer = build_optimizer(laid_out.model, config.optim)
    scaler = build_scaler(config.precision.name, runtime.device)
    ema = Ema(laid_out.model, 0.9)
    return advance(TrainStep(config, runtime, laid_out, optimizer, scaler, ema), 0, 3)


@pytest.mark.parametrize(
    ("overrides", "bound"), [([], 1e-4), (["precision=amp_bf16"], 1e-2), (["precision=amp_fp16"], 1e-2)]
)
def test_steps_equal_the_cpus(overrides: list[str], bound: float) -> None:
    assert losses_on("cuda", overrides) == pytest.approx(losses_on("cpu", []), rel=bound)


@pytest.mark.parametrize("name", sorted(LOSSES))
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
