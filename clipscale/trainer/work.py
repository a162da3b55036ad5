"""How much arithmetic a run's samples need, for the meters: FLOPs by the tokens of their captions, and the peak."""

from __future__ import annotations

import torch

from clipscale.config import Config
from clipscale.config.optim import LossName, PrecisionName
from clipscale.errors import ConfigError
from clipscale.hardware import find
from clipscale.models.flops import Execution, flops
from clipscale.telemetry import Work

ARITHMETIC = {PrecisionName.fp32: "fp32", PrecisionName.amp_fp16: "fp16"}


def build_work(config: Config, device: torch.device) -> Work | None:
    """None where the device's peak is not known, as a CPU's, or what the towers cost."""
    if device.type != "cuda":
        return None
    try:
        peak = find(torch.cuda.get_device_name(device)).peak[ARITHMETIC.get(config.precision.name, "bf16")]
        return count_work(config, peak)
    except ConfigError:
        return None


def count_work(config: Config, peak: float) -> Work:
    """FLOPs of training on a sample as a polynomial of its caption's tokens, which they are; ``peak`` is FLOP/s."""
    model, most = config.model, config.model.context_length
    classifies = config.loss.name is LossName.cross_entropy

    def needed(tokens: int) -> float:
        return flops(model, Execution([tokens], lock=config.lock, classifies=classifies)).training

    everything = Execution(pooled_last_block=False, lock=config.lock, classifies=classifies)
    nominal = flops(model, everything).training
    if most < 3:
        return Work(peak, nominal, needed(most), 0.0, 0.0)
    one, two, three = needed(1), needed(2), needed(3)
    square = (three - 2 * two + one) / 2
    linear = two - one - 3 * square
    return Work(peak, nominal, one - linear - square, linear, square)
