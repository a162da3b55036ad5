"""How much of a device a run uses: by the FLOPs that its captions need, and nominally."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clipscale.config import compose
from clipscale.models.flops import Execution, flops
from clipscale.telemetry import Meters, Stragglers, Timesheet, Work
from clipscale.trainer.work import build_work, count_work

CPU = torch.device("cpu")


def metering(path: Path, world: int, work: Work | None = None) -> Meters:
    return Meters(CPU, world, Stragglers(path, CPU), Timesheet(path), work)


@pytest.mark.parametrize("overrides", [[], ["model=siglip_b_16", "loss=siglip"], ["init.weights=a", "lock.image=true"]])
def test_utilisation_counts_what_captions_need(overrides: list[str], tmp_path: Path) -> None:
    """FLOPs by the tokens of the captions, as the cost model has them one by one; and the nominal ones beside it."""
    config, _ = compose(overrides)
    work, lengths = count_work(config, 1e12), [3, 9, 9, 14]
    meters = metering(tmp_path, 2, work)
    for _ in range(3):
        meters.stepped(8, torch.tensor(1.0), torch.tensor(lengths, dtype=torch.int32))
    values = meters.read()
    per_s = values["train/samples_per_s_per_gpu"]
    needed = flops(config.model, Execution(lengths, lock=config.lock)).training
    assert values["train/tokens_per_caption"] == sum(lengths) / 4
    assert values["train/mfu"] == pytest.approx(needed * per_s / 1e12)
    assert values["train/mfu_nominal"] == pytest.approx(work.nominal * per_s / 1e12)
    assert values["train/mfu_nominal"] >= values["train/mfu"]
    meters.stepped(8, torch.tensor(1.0), torch.tensor([5, 7]))
    assert meters.read()["train/tokens_per_caption"] == 6, "an interval of its own"


def test_without_a_known_peak_there_is_no_utilisation(tmp_path: Path) -> None:
    config, _ = compose([])
    assert build_work(config, CPU) is None
    meters = metering(tmp_path, 1)
    meters.stepped(8, torch.tensor(1.0), torch.tensor([5, 7]))
    assert not any("mfu" in key for key in meters.read())
