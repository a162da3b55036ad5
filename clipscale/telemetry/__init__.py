"""What a run says of itself: meters that measure, sinks that show."""

from clipscale.telemetry.meters import Meters, Work
from clipscale.telemetry.sinks import Sinks, evaluations, last_values
from clipscale.telemetry.stragglers import Stragglers
from clipscale.telemetry.timesheet import Timesheet
from clipscale.telemetry.wandb import read_run_id, write_run_id

__all__ = [
    "Meters",
    "Sinks",
    "Stragglers",
    "Timesheet",
    "Work",
    "evaluations",
    "last_values",
    "read_run_id",
    "write_run_id",
]
