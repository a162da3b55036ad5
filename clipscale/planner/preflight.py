"""What the ranks of several nodes find out together before a run begins: one wrong node breaks, or slows, all.

Each node looks at itself as :mod:`clipscale.planner.doctor` does; what no node sees alone is compared: the libraries
they run, their clocks, how fast their devices are, and what the network between them carries.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from clipscale.config import Config
from clipscale.distributed.runtime import Runtime, processes_per_node
from clipscale.errors import ClipscaleError, ConfigError
from clipscale.hardware import GIGA, TERA, find
from clipscale.planner.findings import (
    BROKEN_SKEW_S,
    SKEW_S,
    Finding,
    Level,
    disk,
    every,
    files,
    plugins,
    shards,
    shared_memory,
    storage_clock,
    versions,
)
from clipscale.planner.measure import link_seconds, time_products
from clipscale.planner.memory import BUCKET

SLOW_DEVICE = 0.7  # of the median over ranks, below which a GPU holds up all others
LOW_NETWORK = 0.1  # of the catalogue's bandwidth between nodes; a bucket is too small for all of it
SAME = ("torch", "clipscale", "timm", "webdataset")  # of which two versions are two programs
log = logging.getLogger("clipscale")


@dataclass(frozen=True)
class Seen:
    """What a rank knows of its node: findings (those of a node come from its first rank), libraries, clock in seconds,
    and FLOP/s of large products (on a GPU)."""

    node: int
    host: str
    findings: list[Finding]
    libraries: dict[str, str]
    clock_s: float
    products: float | None


def preflight(config: Config, runtime: Runtime) -> None:
    """Look before the run begins, all ranks together; rank 0 prints what is not as it should be, and logs the rest.

    Raises ClipscaleError, on every rank, for what would break the run.
    """
    here = _look(config, runtime)
    seen: list[Any] = [None] * runtime.world
    dist.all_gather_object(seen, here)
    seconds, _ = link_seconds(runtime.device)
    carried = torch.tensor([2 * (runtime.world - 1) / runtime.world * BUCKET / seconds], device=runtime.device)
    dist.all_reduce(carried, dist.ReduceOp.MIN)  # every rank has to come to the same end
    found = [*_of_nodes(seen), *_compared(seen), _network(runtime, carried.item())]
    if runtime.is_main:
        for one in found:
            log.info("preflight: %s: %s: %s", one.level.value, one.check, one.text)
            if one.level is not Level.ok:
                print(f"preflight: {one.level.value}: {one.check}: {one.text}", file=sys.stderr)
    if broken := [one for one in found if one.level is Level.error]:
        raise ClipscaleError(
            f"preflight: {'; '.join(f'{one.check}: {one.text}' for one in broken)} (cluster.preflight=false goes on)"
        )


def _look(config: Config, runtime: Runtime) -> Seen:
    found: list[Finding] = []
    local = processes_per_node()
    here = deepcopy(config)  # of as many processes as there are, whoever started them
    here.cluster.nodes, here.cluster.processes_per_node = -(-runtime.world // local), local
    if runtime.local_rank == 0:
        found += every((versions, plugins))
        found += every((files, shared_memory, storage_clock, shards), here)
    if runtime.is_main:  # a run that goes on has its checkpoints there already: not whether there is room for them
        found += every((disk,), config, None)
    libraries = {name: _version(name) for name in SAME} | {"Python": ".".join(map(str, sys.version_info[:2]))}
    use_cuda = runtime.device.type == "cuda"
    if use_cuda:
        libraries |= {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
    dist.barrier()
    clock_s = time.time()
    node = int(os.environ.get("GROUP_RANK", runtime.rank // local))  # torchrun says it
    return Seen(node, socket.gethostname(), found, libraries, clock_s, time_products(use_cuda) if use_cuda else None)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a checkout
        return "not installed"


def _of_nodes(seen: Sequence[Seen]) -> Iterator[Finding]:
    """What nodes found of themselves: once where several found the like, in the words of the first of them."""
    alike: dict[tuple[str, Level], list[tuple[Seen, str]]] = {}
    for one in seen:
        for found in one.findings:
            alike.setdefault((found.check, found.level), []).append((one, found.text))
    for (check, level), told in alike.items():
        yield Finding(check, level, f"on {_named([one for one, _ in told])}: {told[0][1]}")


def _compared(seen: Sequence[Seen]) -> Iterator[Finding]:
    for name, first in seen[0].libraries.items():
        others = [one for one in seen if one.libraries.get(name) != first]
        if others:
            text = f"{name} is {others[0].libraries.get(name)} on {_named(others)}, and {first} on {_named(seen[:1])}"
            yield Finding("versions", Level.error, f"{text}; install one version")
    early, late = min(seen, key=lambda one: one.clock_s), max(seen, key=lambda one: one.clock_s)
    apart_s = late.clock_s - early.clock_s
    level = Level.error if apart_s > BROKEN_SKEW_S else Level.warning if apart_s > SKEW_S else Level.ok
    mend = "" if level is Level.ok else "; set the one that is wrong (chronyc makestep)"
    text = f"that of {_named([late])} is {apart_s:.1f} s ahead of that of {_named([early])}{mend}"
    yield Finding("clock", level, text)
    rates = [one.products for one in seen if one.products is not None]
    if rates:
        slowest = min(range(len(rates)), key=rates.__getitem__)
        slow = rates[slowest] < SLOW_DEVICE * median(rates)
        text = f"{median(rates) / TERA:.3g} TFLOP/s of large products, the least {rates[slowest] / TERA:.3g}"
        text += f" on rank {slowest}, {_named([seen[slowest]])}" + ("; look at it (nvidia-smi)" if slow else "")
        yield Finding("devices", Level.warning if slow else Level.ok, text)


def _network(runtime: Runtime, carried: float) -> Finding:
    library, low = ("NCCL" if runtime.device.type == "cuda" else "gloo"), False
    if runtime.device.type == "cuda":
        with suppress(ConfigError):  # not of the catalogue
            low = carried < LOW_NETWORK * find(torch.cuda.get_device_name()).network_bandwidth
    text = f"{library} over {runtime.world} processes: {carried / GIGA:.2f} GB/s of 25 MiB"
    mend = "; look at NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME, NCCL_IB_HCA" if low else ""
    return Finding("links", Level.warning if low else Level.ok, text + mend)


def _named(nodes: Sequence[Seen]) -> str:
    hosts = list(dict.fromkeys(f"node {one.node} ({one.host})" for one in nodes))
    return ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more nodes" if len(hosts) > 4 else "")
