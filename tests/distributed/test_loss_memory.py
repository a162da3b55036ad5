"""No matrix of logits: what is kept for the backward pass, what is allocated, and what is sent, counted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.dense import Case, leaves, make
from tests.distributed.test_losses import ours, place, run

KINDS = ["clip", "siglip", "distill"]
D = 16


def kept_bytes(call: Any) -> int:
    """Of all distinct storages that autograd keeps for the backward pass of ``call()``."""
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(storages.values())


def _kept(case: Case) -> int:
    data = make(case).part(*place())
    given = leaves(replace(case, extra=0), data, case.torch_dtype)
    return kept_bytes(lambda: ours(case, data, given))


def case_of(loss: str, pairs: int, **options: Any) -> Case:
    return Case(loss, "float32", pairs=pairs, dim=D, tile=(64, 128), **options)


def allowed(case: Case, world: int) -> int:
    """Bytes: features of rows and columns, for teachers too, in fp32; some numbers in float64 per row and column."""
    n, m = case.pairs // world, case.pairs + case.extra
    dims = D + ((D + 3) + (D - 5) if case.loss == "distill" else 0)
    return 4 * (n + m) * dims + 8 * 8 * (n + m)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_what_is_kept_grows_with_the_features_alone(pools: Any, world: int) -> None:
    for loss in KINDS:
        sizes = {}
        for pairs in (128, 512):
            case = case_of(loss, pairs, extra=64, ids="both")
            sizes[pairs] = max(run(pools, world, _kept, case))
            assert sizes[pairs] <= allowed(case, world), (loss, pairs)
        assert 4 * sizes[128] >= sizes[512] < 4 * (512 // world) * 512, "as much as a matrix of logits"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_cache_keeps_to_its_size(pools: Any, world: int) -> None:
    for loss in ("clip", "distill"):
        bare = max(run(pools, world, _kept, case_of(loss, 512)))
        grown = []
        for cache_mb in (0.004, 0.1, 0.2, 64, math.inf):
            bytes_kept = max(run(pools, world, _kept, case_of(loss, 512, cache_mb=cache_mb))) - bare
            grown.append(bytes_kept)
            assert bytes_kept <= cache_mb * 2**20
        logits = 4 * (512 // world) * 512 * (3 if loss == "distill" else 1)
        assert grown[0] == 0 < grown[1] < grown[2] and grown[3] == grown[4] == logits


def _kept_by_open_clip(case: Case) -> int:
    from open_clip.loss import ClipLoss

    rank, world = place()
    data = make(case).part(rank, world)
    given = leaves(replace(case, extra=0), data, torch.float32)
    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    return kept_bytes(lambda: loss(given["image"], given["text"], given["scale"].squeeze()))


def test_what_open_clip_keeps_grows_with_the_logits(pool2: Any) -> None:
    """The count sees a matrix of logits where there is one."""
    small, large = (max(pool2.run(_kept_by_open_clip, case_of("clip", pairs))) for pairs in (256, 1024))
    assert large >= 4 * 512 * 1024 and large > 8 * small


class Largest(TorchDispatchMode):
    """Bytes of the largest storage that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def _largest(case: Case) -> int:
    data = make(case).part(*place())
    given = leaves(replace(case, extra=0), data, torch.float32)
    with Largest() as largest:
        ours(case, data, given).backward()
    return largest.bytes


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("geometry", ["random", "opposed"])
def test_nothing_that_is_allocated_is_a_matrix_of_logits(pools: Any, world: int, geometry: str) -> None:
    """Nor in the repetition in float64; a matrix of booleans would be seen too."""
    pairs = 512
    for loss in KINDS:
        case = case_of(loss, pairs, ids="both", extra=64, geometry=geometry)
        if loss != "siglip":
            case = replace(case, smoothing=0.1)
        assert max(run(pools, world, _largest, case)) < pairs * (pairs // world)


SENT = ["all_gather_into_tensor", "all_gather", "all_reduce", "reduce_scatter_tensor", "reduce_scatter", "broadcast",
        "all_to_all_single", "all_to_all", "gather", "scatter", "send", "recv", "isend", "irecv", "barrier",
        "all_gather_object", "broadcast_object_list"]  # fmt: skip


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """Names of the collectives and the number of elements that each brings; they run as ever."""
    found: list[tuple[str, int]] = []
    originals = {name: getattr(dist, name) for name in SENT}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            brought = args[1] if name.endswith("_into_tensor") or name == "reduce_scatter_tensor" else args[0]
            found.append((name, brought.numel()))
            return originals[name](*args, **kwargs)

        return call

    for name in SENT:
        setattr(dist, name, counting(name))
    try:
        yield found
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


def _sent(case: Case, options: dict[str, Any]) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    data = make(case).part(*place())
    given = leaves(replace(case, extra=0), data, torch.float32)
    with counted() as forward:
        loss = ours(case, data, given, **options)
        loss = loss[0] if options.get("stats") else loss
    with counted() as backward:
        loss.backward()
    return forward, backward


N = 64
AGREE = ("all_reduce", 3)
CASES: list[tuple[Case, dict[str, Any], Any, Any]] = [
    # case, options, collectives of the forward and of the backward pass on W ranks
    (
        case_of("clip", N), {},
        lambda n: [AGREE, ("all_gather_into_tensor", n * D), ("all_reduce", 2 * N + 2)],
        [("reduce_scatter_tensor", N * D)],
    ),
    (
        case_of("clip", N, needs=("image", "scale")), {},
        lambda n: [AGREE, ("all_gather_into_tensor", n * D), ("all_reduce", 2 * N + 2)],
        [],
    ),
    (
        case_of("clip", N, ids="both", extra=8), {},
        lambda n: [
            AGREE, *[("all_gather_into_tensor", n + n // (N // 8))] * 3,
            ("all_gather_into_tensor", (n + n // (N // 8)) * D), ("all_reduce", 2 * (N + 8) + 2),
        ],
        [("reduce_scatter_tensor", (N + 8) * D)],
    ),
    (
        case_of("clip", N, geometry="opposed"), {},
        lambda n: [
            AGREE, ("all_gather_into_tensor", n * D), ("all_reduce", 2 * N + 2), ("all_reduce", 1),
            ("all_reduce", 2 * N + 2),
        ],
        [("reduce_scatter_tensor", N * D)],
    ),
    (
        case_of("siglip", N), {},
        lambda n: [AGREE, ("all_gather_into_tensor", n * D), ("all_reduce", 1)],
        [("reduce_scatter_tensor", N * D)],
    ),
    (
        case_of("distill", N), {},
        lambda n: [
            AGREE, ("all_gather_into_tensor", n * (D + 3)), ("all_gather_into_tensor", n * (D - 5)),
            ("all_gather_into_tensor", n * D), ("all_reduce", 8 * N + 2),
        ],
        [("reduce_scatter_tensor", N * D)],
    ),
    (
        case_of("clip", N), {"stats": True},
        lambda n: [
            AGREE, ("all_gather_into_tensor", n * D), ("all_reduce", 2 * N + 2), ("all_reduce", N),
            ("all_reduce", 3 + 2 * D),
        ],
        [("reduce_scatter_tensor", N * D)],
    ),
]  # fmt: skip


@pytest.mark.parametrize("world", [2, 4])
def test_what_is_sent(pools: Any, world: int) -> None:
    """Texts once there, their gradients once back, and vectors; how many columns a rank has is all that grows."""
    for case, options, forward, backward in CASES:
        for found in pools[world].run(_sent, case, options):
            assert found == (forward(N // world), backward), case
