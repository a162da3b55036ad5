"""``clipscale doctor``: would this run break on this machine?"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import rich.console
import rich.table
from rich.markup import escape

from clipscale.config import Config, compose, validate
from clipscale.config.running import Scheduler
from clipscale.errors import ClipscaleError, ConfigError
from clipscale.hardware import GIGA, TERA, find
from clipscale.planner.findings import BEFORE, OF_A_RUN, Finding, Findings, Level, disk, every
from clipscale.planner.job import Job
from clipscale.planner.measure import time_links, time_products
from clipscale.planner.memory import BUCKET, state_bytes
from clipscale.planner.plan import make_plan
from clipscale.planner.show import size

LOW_SHARE = 0.3  # of a GPU's peak that large products reach, below which something is wrong with it
LOW_LINK = 0.25  # of the catalogue's bandwidth within a node
COLOURS = {Level.ok: "green", Level.warning: "yellow", Level.error: "red"}


def doctor(overrides: Sequence[str], config_dir: str | None = None, as_json: bool = False) -> bool:
    """Look at everything and print it; returns whether nothing would break the run.

    Raises ConfigError for a configuration that cannot be run at all.
    """
    found = [*every(BEFORE)]
    if not any(one.level is Level.error for one in found):
        config, _ = compose(overrides, config_dir)
        validate(config)
        found += every(OF_A_RUN, config)
        found += every((_disk, _devices), config)
    if as_json:
        print(json.dumps([{"check": one.check, "level": one.level.value, "text": one.text} for one in found], indent=2))
    else:
        _show(found)
    return not any(one.level is Level.error for one in found)


def _show(found: Sequence[Finding]) -> None:
    table = rich.table.Table(show_header=False, box=None, pad_edge=False)
    for _ in range(3):
        table.add_column()
    for one in found:
        table.add_row(f"[{COLOURS[one.level]}]{one.level.value}[/]", one.check, escape(one.text))
    rich.console.Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)


def _disk(config: Config) -> Findings:
    try:
        needed = state_bytes(Job(config, find("cpu")))
    except ConfigError:  # towers that are not known
        needed = None
    yield from disk(config, needed)


def _devices(config: Config) -> Findings:
    """The devices of this machine: whether they are there, as fast and as well joined as they should be, and large
    enough for the run."""
    import torch

    processes = config.cluster.processes_per_node
    use_cuda = config.device.value != "cpu" and torch.cuda.is_available()
    if config.device.value == "cuda" and not use_cuda:
        yield Finding("devices", Level.error, "device=cuda, but torch sees no CUDA device here; use device=cpu")
        return
    if use_cuda and torch.cuda.device_count() < processes:
        count = torch.cuda.device_count()
        text = f"{count} GPUs for cluster.processes_per_node={processes}; use cluster.processes_per_node={count}"
        yield Finding("devices", Level.error, text)
        return
    name = torch.cuda.get_device_name() if use_cuda else "cpu"
    yield from _products(name, use_cuda)
    if processes > 1 and (use_cuda or config.cluster.scheduler is Scheduler.none):
        yield from _links(name, processes, use_cuda)
    yield from _room(config, name, processes)


def _products(name: str, use_cuda: bool) -> Findings:
    rate = time_products(use_cuda)
    text, level = f"{name}: {rate / TERA:.3g} TFLOP/s of large products", Level.ok
    if use_cuda:
        try:
            share = rate / find(name).peak["bf16"]
        except ConfigError:
            pass
        else:
            text += f", {share:.0%} of its bf16 peak"
            if share < LOW_SHARE:
                level, text = Level.warning, f"{text}: look for other processes, heat or a power limit (nvidia-smi)"
    yield Finding("devices", level, text)


def _links(name: str, processes: int, use_cuda: bool) -> Findings:
    library = "NCCL" if use_cuda else "gloo"
    try:
        bucket_s, number_s = time_links(processes, use_cuda)
    except ClipscaleError as error:
        yield Finding("links", Level.error, f"{library} over {processes} processes: {error}")
        return
    bandwidth = 2 * (processes - 1) / processes * BUCKET / bucket_s
    text = (
        f"{library} over {processes} processes: {bandwidth / GIGA:.2f} GB/s of 25 MiB, {1e6 * number_s:.0f} us of 4 B"
    )
    level = Level.ok
    if use_cuda and bandwidth < LOW_LINK * find(name).node_bandwidth * 0.3:  # a bucket is too small for all of it
        level, text = Level.warning, f"{text}: less than NVLink gives (nvidia-smi topo -m, NCCL_DEBUG=INFO)"
    yield Finding("links", level, text)


def _room(config: Config, name: str, processes: int) -> Findings:
    try:
        found = make_plan(Job(config, find(name, processes)))
    except ConfigError as error:
        yield Finding("memory", Level.warning, f"not planned: {error}")
        return
    has = found.job.hardware.usable_bytes
    text = f"a process takes about {size(found.memory.total)} of {size(has)}"
    if found.fits:
        yield Finding("memory", Level.ok, text)
    else:
        mend = "nothing would make it fit" if found.fitting is None else f"use {' '.join(found.fitting.overrides())}"
        yield Finding("memory", Level.error, f"{text}; {mend}")
