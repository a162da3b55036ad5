"""AdamW with CLIP's parameter groups, schedules in samples, and the moving average of the weights."""

from clipscale.optim.ema import Ema
from clipscale.optim.optimizer import build_optimizer, configure
from clipscale.optim.schedule import SCHEDULES, learning_rate

__all__ = ["SCHEDULES", "Ema", "build_optimizer", "configure", "learning_rate"]
