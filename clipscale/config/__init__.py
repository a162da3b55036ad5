"""Typed configuration: one dataclass per group, composed by Hydra, validated before anything starts."""

from clipscale.config.compose import compose, config_dir, load_config, load_group, save_config
from clipscale.config.schema import Config
from clipscale.config.validate import validate

__all__ = ["Config", "compose", "config_dir", "load_config", "load_group", "save_config", "validate"]
