"""What a run says of itself: meters that measure, sinks that show."""

from clipscale.telemetry.meters import Meters
from clipscale.telemetry.sinks import Sinks, evaluated_at, last_values

__all__ = ["Meters", "Sinks", "evaluated_at", "last_values"]
