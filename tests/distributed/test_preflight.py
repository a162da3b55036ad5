"""Nodes look at each other before a run: one wrong node ends it on all ranks, with what mends it."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from clipscale.config import compose
from clipscale.distributed.runtime import Runtime
from clipscale.errors import ClipscaleError
from clipscale.planner.findings import Finding, Level
from clipscale.planner.preflight import Seen, _compared, preflight


def looked(root: str, *overrides: str) -> str:
    """What preflight says on this rank, each a node of its own; only the second one has the data elsewhere."""
    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ["GROUP_RANK"] = str(rank)
    try:
        config, _ = compose([*overrides, f"runs_dir={root}"])
        if rank == 1 and config.data.train.shards:
            config.data.root = "/elsewhere"
        preflight(config, Runtime(rank, world, 0, torch.device("cpu")))
    except ClipscaleError as error:
        return str(error)
    finally:
        del os.environ["GROUP_RANK"]
    return "ok"


def test_nodes_that_are_well(pool2: Any, tmp_path: Any, capfd: Any) -> None:
    assert pool2.run(looked, str(tmp_path)) == ["ok", "ok"]
    assert [*tmp_path.iterdir()] == []


def test_one_node_without_the_data_ends_it_on_all(pool2: Any, tmp_path: Any) -> None:
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(bytes(10240))
    overrides = ["data=shards", f"data.root={tmp_path}", "data.train.shards=[a.tar,b.tar]"]
    for said in pool2.run(looked, str(tmp_path), *overrides):
        assert said.startswith("preflight: shards: on node 1 ("), said
        assert (
            "): data.train.shards: 2 of 2 shards do not exist" in said
            and said.count("on node") == 1
            and "cluster.preflight=false" in said
        )


def seen(node: int, *, torch_version: str = "2.15", clock_s: float = 0.0, products: float | None = 6e14) -> Seen:
    return Seen(node, f"host{node}", [], {"torch": torch_version}, clock_s, products)


def gravest(*nodes: Seen) -> Finding:
    return max(_compared(nodes), key=lambda one: [*Level].index(one.level))


def test_what_no_node_sees_alone() -> None:
    assert gravest(seen(0), seen(1), seen(2)).level is Level.ok
    other = gravest(seen(0), seen(1), seen(2, torch_version="2.11"))
    assert other.level is Level.error and "torch is 2.11 on node 2 (host2), and 2.15 on node 0 (host0)" in other.text
    late = gravest(seen(0), seen(1, clock_s=1.0), seen(2, clock_s=-59.0))
    assert late.level is Level.warning and "node 1 (host1) is 60.0 s ahead of that of node 2 (host2)" in late.text
    assert gravest(seen(0), seen(1, clock_s=1200.0)).level is Level.error
    slow = gravest(seen(0), seen(1), seen(2, products=3e14))
    assert (
        slow.level is Level.warning and "the least 300 on rank 2, node 2 (host2); look at it (nvidia-smi)" in slow.text
    )
