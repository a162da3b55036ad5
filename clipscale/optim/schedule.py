"""The learning rate against samples seen, so that a changed batch size or world size does not move it."""

from __future__ import annotations

import math
from collections.abc import Callable

from clipscale.config.optim import Schedule


def _cosine(progress: float, config: Schedule) -> float:
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2


def _constant(progress: float, config: Schedule) -> float:
    return 1.0


def _wsd(progress: float, config: Schedule) -> float:
    decayed = max(0.0, (progress - (1 - config.decay_fraction)) / config.decay_fraction)
    return 1 - (1 - config.min_lr_ratio) * decayed


# Factor on the peak rate against progress in [0, 1] after the warm-up.
SCHEDULES: dict[str, Callable[[float, Schedule], float]] = {
    "cosine": _cosine,
    "constant": _constant,
    "wsd": _wsd,
}


def learning_rate(config: Schedule, peak: float, before: int, after: int, total_samples: int) -> float:
    """The rate of the step that takes the run from ``before`` to ``after`` samples: linear warm-up, then the schedule.

    As in open_clip, the warm-up counts the step itself and the decay does not: neither end of a run has a rate of zero.
    """
    if before < config.warmup_samples:
        return peak * min(after / config.warmup_samples, 1.0)
    rest = max(total_samples - config.warmup_samples, 1)
    return peak * SCHEDULES[config.name.value](min((before - config.warmup_samples) / rest, 1.0), config)
