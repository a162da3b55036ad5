"""What a run says of itself: meters that measure, sinks that show."""

from clipscale.telemetry.meters import Meters
from clipscale.telemetry.sinks import Sinks, last_values

__all__ = ["Meters", "Sinks", "last_values"]
