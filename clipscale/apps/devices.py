"""The choices of ``--device``."""

from __future__ import annotations

from clipscale.config.schema import Device
from clipscale.errors import ConfigError

DEVICES = tuple(device.value for device in Device)


def check_device(device: str) -> None:
    """Raises ConfigError for what is no choice."""
    if device not in DEVICES:
        raise ConfigError(f"--device {device}: choose from {', '.join(DEVICES)}")
