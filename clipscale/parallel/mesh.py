"""The ranks as a table: copies of the model down, shards of a copy across."""

from __future__ import annotations

import math

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from clipscale.config.running import Parallel, Strategy
from clipscale.distributed.collectives import world_size
from clipscale.distributed.runtime import processes_per_node
from clipscale.errors import ConfigError

REPLICATE, SHARD = "dp_replicate", "dp_shard"


def build_mesh(config: Parallel, device: torch.device) -> DeviceMesh:
    """All ranks as ``(dp_replicate, dp_shard)``, row by row; a collective.

    Of W ranks, ``fsdp`` makes (1, W) and ``hsdp`` (W / s, s), where s is :func:`shard_size`.
    """
    world = world_size()
    size = world if config.strategy is Strategy.fsdp else shard_size(config, world, processes_per_node())
    return init_device_mesh(device.type, (world // size, size), mesh_dim_names=(REPLICATE, SHARD))


def shard_size(config: Parallel, world: int, per_node: int) -> int:
    """Over how many of ``world`` ranks ``hsdp`` shards a copy of the model.

    ``parallel.shard_size``, or as many as a node has: the most that divide both where some of its ranks idle. Raises
    ConfigError for one that does not divide ``world``.
    """
    if config.shard_size is None:
        return math.gcd(world, per_node)
    if world % config.shard_size:
        raise ConfigError(
            f"parallel.shard_size={config.shard_size} does not divide the {world} processes that train; use "
            f"parallel.shard_size={math.gcd(world, config.shard_size)}, or null for those of a node"
        )
    return config.shard_size
