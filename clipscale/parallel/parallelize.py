"""Activation checkpointing, then compile, then DDP or sharding: one place, in that order."""

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
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from clipscale.config.optim import PrecisionName
from clipscale.config.running import Parallel, Strategy
from clipscale.errors import ConfigError
from clipscale.models import CLIP
from clipscale.parallel.batchnorm import use_global_batch_statistics
from clipscale.parallel.mesh import SHARD, build_mesh
from clipscale.parallel.precision import towers_policy
from clipscale.parallel.recompute import checkpoint_blocks


@dataclass(frozen=True)
class Parallelized:
    """``model`` holds the parameters, under their own names; ``module`` is what a training step calls."""

    model: CLIP
    module: Callable[..., Any]
    without_sync: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Context in which backward passes, and the forward passes that belong to them, keep their gradients on this rank;
    the first backward pass outside of it takes the mean over ranks of all that has gathered."""


@dataclass(frozen=True)
class Plan:
    """What a strategy is told beside the model: its ``units`` are what is gathered, and freed, as one."""

    config: Parallel
    device: torch.device
    precision: PrecisionName
    one_pass: bool
    units: list[nn.Module]


def parallelize(
    model: CLIP,
    config: Parallel,
    device: torch.device,
    precision: PrecisionName = PrecisionName.fp32,
    *,
    one_pass: bool = False,
) -> Parallelized:
    """Lay a model out over the default process group (or this process alone).

    ``one_pass``: a step is one forward and one backward pass, which go the same way each time. Parameters that have no
    storage yet (``build_model(…, drawn=False)``) get it, and their first values, shard by shard. Raises ConfigError
    when the image tower has no blocks to checkpoint or shard by, and for a ``parallel.shard_size`` that does not divide
    the ranks.
    """
    use_global_batch_statistics(model, precision)
    blocks = find_blocks(model)
    needs_blocks = config.activation_checkpointing != "none" or config.compile or config.strategy.shards
    if needs_blocks and not blocks["visual"]:
        raise ConfigError(
            f"model.vision.timm={model.config.vision.timm}: no blocks found to work by; use parallel=ddp, "
            "parallel.activation_checkpointing=none and parallel.compile=false"
        )
    checkpoint_blocks([*blocks.values()], config.activation_checkpointing)
    if config.compile:
        for block in blocks["visual"]:
            block.compile()
        if device.type == "cuda":  # attention within captions of any lengths is one operation there
            model.text.compile_blocks()
    if dist.is_initialized():
        units = [block for tower in blocks.values() for block in tower]
        return STRATEGIES[config.strategy.value](model, Plan(config, device, precision, one_pass, units))
    return Parallelized(model.to(device), model)


def find_blocks(model: CLIP) -> dict[str, list[nn.Module]]:
    """The repeated blocks of each tower: what is recomputed, compiled and sharded as one."""
    trunk: Any = model.visual.trunk
    blocks = [*trunk.blocks] if hasattr(trunk, "blocks") else []
    classic = [getattr(trunk, f"layer{i}") for i in range(1, 5) if hasattr(trunk, f"layer{i}")]  # timm's plain ResNets
    for stage in [*getattr(trunk, "stages", []), *classic]:
        blocks += [*getattr(stage, "blocks", stage.children())]
    return {"visual": blocks, "text": [*model.text.blocks]}


def _ddp(model: CLIP, plan: Plan) -> Parallelized:
    model.to(plan.device)
    # Buffers are equal by construction: every BatchNorm takes its statistics over all ranks.
    with warnings.catch_warnings():
        # The newest torch renames this argument; the oldest supported one does not know the new name.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
        module = DistributedDataParallel(
            model,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,
            # Several passes of a step do not go one way: some reduce nothing. What is locked has no gradient, and is
            # none of its parameters.
            static_graph=plan.one_pass,
        )
    if plan.config.bf16_reduce:
        module.register_comm_hook(None, bf16_compress_hook)
    return Parallelized(model, module, module.no_sync)


def _fsdp(model: CLIP, plan: Plan) -> Parallelized:
    mesh = build_mesh(plan.config, plan.device)
    offload = OffloadPolicy()
    if plan.config.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=plan.device.type == "cuda")
    policy = towers_policy(plan.precision)
    shard = partial(
        fully_shard, mesh=mesh if plan.config.strategy is Strategy.hsdp else mesh[SHARD], offload_policy=offload
    )
    for unit in plan.units:
        shard(unit, mp_policy=policy)
    for unit in model.full_precision:
        shard(unit, mp_policy=MixedPrecisionPolicy())
    # The root too: left gathered after an evaluation, it would hide its shards from whoever changes or reads them then.
    # Its output alone is cast back: a block's is the next one's input.
    root = shard(model, mp_policy=towers_policy(plan.precision, output=torch.float32), reshard_after_forward=True)
    for method in ("encode_image", "encode_text", "classify"):
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)
    _fill_shards(model, torch.device("cpu") if plan.config.cpu_offload else plan.device)
    return Parallelized(model, model, partial(_unreduced, root))


@torch.no_grad()
def _fill_shards(model: CLIP, device: torch.device) -> None:
    """Give the parameters without storage their first values: each is drawn whole, on the CPU, and cut at once, so that
    no more than one of them is ever whole here, and nothing is sent."""
    cut: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            assert isinstance(parameter, DTensor)
            drawn = model.first[name].values(parameter.shape)
            shard = distribute_tensor(drawn, parameter.device_mesh, parameter.placements, src_data_rank=None)
            cut[name] = shard.to(device)
    model.load_state_dict(cut, strict=False, assign=True)


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


STRATEGIES: dict[str, Callable[[CLIP, Plan], Parallelized]] = {"ddp": _ddp, "fsdp": _fsdp, "hsdp": _fsdp}
