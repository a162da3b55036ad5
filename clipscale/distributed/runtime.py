"""Where this process runs: rank, world size, device, and the process group."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from clipscale.distributed.watchdog import record_collectives
from clipscale.errors import ConfigError

T = TypeVar("T")
log = logging.getLogger("clipscale")


SAVING_GROUP = "saving"  # what the group is called in which checkpoints are written
SPARES = "clipscale/spares"  # key of the store that lets them end
ENDED = "clipscale/ended"  # key under which ranks are counted that end on purpose
KNOWN = "clipscale/known"  # and those that know that all do


@dataclass(frozen=True)
class Runtime:
    """This process among its peers."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    spares: int = 0
    """Processes beside these that idle, because the streams cannot be shared evenly by all."""
    began: float = field(default_factory=time.perf_counter)
    """When this process came to be one of them."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0


def under_torchrun() -> bool:
    """Whether torchrun (or any launcher that sets its variables) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def restarts_left() -> int:
    """Times that torchrun will start the ranks again if one of them fails."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) - int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def is_restarted() -> bool:
    """Whether torchrun has started the ranks again because one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def restarts_may_fail() -> bool:
    """Whether torchrun would start ranks again that can meet the address of a dead peer in the agent's store."""
    return restarts_left() > 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def processes_per_node() -> int:
    """How many processes the launcher started on this node; without one, or where it does not say, all there are."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))


def spans_nodes() -> bool:
    """Whether the launcher started processes on several nodes; the same on all of them."""
    agents = os.environ.get("GROUP_WORLD_SIZE")  # torchrun's own count
    return int(agents) > 1 if agents else int(os.environ.get("WORLD_SIZE", 1)) > processes_per_node()


def connect() -> dist.Store:
    """The store that torchrun's ranks share; usable before there is a process group."""
    store, _, _ = next(iter(dist.rendezvous("env://", timeout=timedelta(minutes=5))))
    return store


def share(store: dist.Store, key: str, make: Callable[[], str]) -> str:
    """Let rank 0 make a text and all ranks have it."""
    key = _of_this_attempt(key)
    if int(os.environ["RANK"]) == 0:
        text = make()
        store.set(key, text)
        return text
    return store.get(key).decode()


def says_first(text: str) -> bool:
    """Whether this rank is the first of those that torchrun started to say a text; a process by itself is."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # a store of the ranks' own may be gone, or never come
        return True
    try:
        return connect().add(_of_this_attempt(f"said/{hashlib.sha256(text.encode()).hexdigest()}"), 1) == 1
    except (RuntimeError, OSError):  # torchrun is gone
        return True


def _of_this_attempt(key: str) -> str:
    # A restarted attempt meets the agent's store again; where ranks make their own, it is new each time, and the counts
    # of nodes that came and went differ.
    same = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return f"{key}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}" if same else key


def stand_by(store: dist.Store) -> None:
    """Idle, as a spare, until the ranks that train have ended."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: os._exit(0))  # there is nothing to save here
    for key in (ENDED, KNOWN):
        store.add(_of_this_attempt(key), 1)  # nobody need wait for it
    while True:
        try:
            return store.wait([_of_this_attempt(SPARES)], timedelta(minutes=1))
        except dist.DistStoreError:  # not yet
            continue
        except RuntimeError:  # rank 0 is gone, and the store with it
            return


def all_end(store: dist.Store, seconds: float) -> bool:
    """Say that this rank ends on purpose, and wait for the others. Returns whether all of them do."""
    world = int(os.environ["WORLD_SIZE"])
    all_do = _arrive(store, ENDED, world, seconds)
    if all_do:  # rank 0 has the store, and so is the last to go
        _arrive(store, KNOWN, world if os.environ["RANK"] == "0" else 1, min(seconds, 5.0))
    return all_do


def _arrive(store: dist.Store, key: str, count: int, seconds: float) -> bool:
    """Add this rank to those that are somewhere; whether as many as ``count`` are there in time."""
    key, deadline = _of_this_attempt(key), time.monotonic() + seconds
    try:
        there = store.add(key, 1)
        while there < count and time.monotonic() < deadline:
            time.sleep(0.1)
            there = store.add(key, 0)
    except RuntimeError:  # rank 0 is gone, and the store with it
        return False
    return there >= count


def release_spares(store: dist.Store) -> None:
    """Let the spares end."""
    with suppress(RuntimeError):
        store.set(_of_this_attempt(SPARES), "1")


def start(
    device: str,
    timeout_s: float,
    store: dist.Store | None = None,
    spares: int = 0,
    *,
    sharded: bool = False,
    on_host: bool = False,
) -> Runtime:
    """Choose the device and start the process group (nccl on CUDA, gloo elsewhere), under torchrun or if ``sharded``.

    The last ``spares`` of torchrun's processes do not take part. A process alone has a group of its own where its
    weights are to be ``sharded``. Tensors that stay ``on_host`` beside those on CUDA are reduced by gloo.

    Raises ConfigError when CUDA is asked for and there is none.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)) - spares
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no CUDA device here; use device=cpu or device=auto")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local_rank} of this node has no GPU of its own ({torch.cuda.device_count()} here); "
            f"use cluster.processes_per_node={torch.cuda.device_count()}"
        )
    place = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(place)
    if under_torchrun():
        record_collectives()
    if under_torchrun() or sharded:
        backend = ("cpu:gloo,cuda:nccl" if on_host else "nccl") if use_cuda else "gloo"
        dist.init_process_group(
            backend,
            store=store or (connect() if under_torchrun() else dist.HashStore()),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout_s),
            device_id=place if use_cuda else None,
        )
    return Runtime(rank, world, local_rank, place, spares)


@contextmanager
def waiting_up_to(during_s: float, after_s: float) -> Iterator[None]:
    """Ranks wait ``during_s`` seconds for each other inside, and ``after_s`` behind it: a collective that does not
    complete within that raises."""
    _wait_up_to(during_s)
    try:
        yield
    finally:
        _wait_up_to(after_s)


def _wait_up_to(seconds: float) -> None:
    if dist.is_initialized():
        library: Any = dist.distributed_c10d
        change = getattr(library, "set_timeout", None) or library._set_pg_timeout  # its name in older versions
        for group in list(library._world.pg_map):
            if group.group_desc == SAVING_GROUP:
                continue  # it waits for disks, not for steps
            change(timedelta(seconds=seconds), group)


def stop() -> None:
    """End the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
