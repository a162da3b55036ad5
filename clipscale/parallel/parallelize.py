"""Activation checkpointing, then compile, then sharding: one place, in that order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from clipscale.config.running import Parallel
from clipscale.distributed.collectives import world_size
from clipscale.errors import ConfigError
from clipscale.models import CLIP
from clipscale.parallel.batchnorm import has_batchnorm, recomputing, use_global_batch_statistics


@dataclass(frozen=True)
class Parallelized:
    """``model`` holds the parameters, under their own names; ``module`` is what a training step calls."""

    model: CLIP
    module: Callable[..., Any]
    without_sync: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Context in which backward passes, and the forward passes that belong to them, keep their gradients on this rank;
    the first backward pass outside of it takes the mean over ranks of all that has gathered."""


def parallelize(model: CLIP, config: Parallel, device: torch.device) -> Parallelized:
    """Lay a model out over the default process group (or this process alone).

    Raises ConfigError when the image tower has no blocks to checkpoint or shard by.
    """
    model.to(device)
    use_global_batch_statistics(model)
    blocks = find_blocks(model)
    needs_blocks = config.activation_checkpointing != "none" or config.compile or config.strategy.value == "fsdp"
    if needs_blocks and not blocks["visual"]:
        raise ConfigError(
            f"model.vision.timm={model.config.vision.timm}: no blocks found to work by; use parallel=ddp, "
            "parallel.activation_checkpointing=none and parallel.compile=false"
        )
    units = [block for tower in blocks.values() for block in tower]
    if config.activation_checkpointing == "full":
        for block in units:
            # Not torch's checkpoint_wrapper: that renames every parameter below it.
            options = {"context_fn": partial(recomputing, block)} if has_batchnorm(block) else {}
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)
    if config.compile:
        for block in blocks["visual"]:
            block.compile()
        if device.type == "cuda":  # attention within captions of any lengths is one operation there
            model.text.compile_blocks()
    if dist.is_initialized():
        return STRATEGIES[config.strategy.value](model, units, device)
    return Parallelized(model, model)


def find_blocks(model: CLIP) -> dict[str, list[nn.Module]]:
    """The repeated blocks of each tower: what is recomputed, compiled and sharded as one."""
    trunk: Any = model.visual.trunk
    blocks = [*trunk.blocks] if hasattr(trunk, "blocks") else []
    classic = [getattr(trunk, f"layer{i}") for i in range(1, 5) if hasattr(trunk, f"layer{i}")]  # timm's plain ResNets
    for stage in [*getattr(trunk, "stages", []), *classic]:
        blocks += [*getattr(stage, "blocks", stage.children())]
    return {"visual": blocks, "text": [*model.text.blocks]}


def _ddp(model: CLIP, units: list[nn.Module], device: torch.device) -> Parallelized:
    # Buffers are equal by construction: every BatchNorm takes its statistics over all ranks.
    with warnings.catch_warnings():
        # The newest torch renames this argument; the oldest supported one does not know the new name.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
        module = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
    return Parallelized(model, module, module.no_sync)


def _fsdp(model: CLIP, units: list[nn.Module], device: torch.device) -> Parallelized:
    mesh = init_device_mesh(device.type, (1, world_size()), mesh_dim_names=("dp_replicate", "dp_shard"))
    shard = partial(fully_shard, mesh=mesh["dp_shard"])
    for unit in units:
        shard(unit)
    shard(model.temperature, mp_policy=MixedPrecisionPolicy())
    # The root too: left gathered after an evaluation, it would hide its shards from whoever changes or reads them then.
    root = shard(model, reshard_after_forward=True)
    for method in ("encode_image", "encode_text"):
        register_fsdp_forward_method(model, method)
    return Parallelized(model, model, partial(_unreduced, root))


@contextmanager
def _unreduced(root: FSDPModule) -> Iterator[None]:
    # Every backward pass stays a "last" one: it has no reduction to wait for, and forgets the order of the forward
    # passes, by which the next one would fetch the wrong parameters ahead. Parameters are freed after each as ever:
    # the gradients that stay whole meanwhile take as much memory already.
    root.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        root.set_requires_gradient_sync(True)


STRATEGIES: dict[str, Callable[[CLIP, list[nn.Module], torch.device], Parallelized]] = {
    "ddp": _ddp,
    "fsdp": _fsdp,
}
