"""Ranks that stay alive: importing torch takes longer than most distributed tests."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

TIMEOUT_S = 120.0


class Pool:
    """``world`` gloo ranks; ``run(f, *args)`` calls a module-level function on each; results come by rank.

    They start with the first call.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self._pipes: list[Any] = []
        self._ranks: list[Any] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, port, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._ranks.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call ``function(*args)`` on every rank; raises AssertionError with the traceback of the first that failed."""
        if not self._ranks:
            self._start()
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, args)))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT_S):
                self._kill()  # a late answer must not become that of the next test
                raise AssertionError(f"rank {rank} gave no answer within {TIMEOUT_S} s")
            ok, value = pickle.loads(pipe.recv_bytes())
            (results if ok else failures).append(value if ok else f"rank {rank}:\n{value}")
        assert not failures, "\n".join(failures)
        return results

    def close(self) -> None:
        """End the ranks."""
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps(None))
        for process in self._ranks:
            process.join(10)
        self._kill()

    def _kill(self) -> None:
        for process in self._ranks:
            process.kill()
        self._pipes, self._ranks = [], []


def _serve(rank: int, world: int, port: int, pipe: Any) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    while (job := pickle.loads(pipe.recv_bytes())) is not None:
        function, args = job
        # Plain pickle copies tensors; a pipe's own would share them by file descriptors, and run out of those.
        try:
            answer = pickle.dumps((True, function(*args)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        _destroy_groups_of_the_job(dist)
        pipe.send_bytes(answer)
    dist.destroy_process_group()


def _destroy_groups_of_the_job(dist: Any) -> None:
    """Each gloo group polls its connections in a thread. Those of meshes stay: DTensor's caches know them."""
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD and not group.group_desc.startswith("mesh_"):
            dist.destroy_process_group(group)
