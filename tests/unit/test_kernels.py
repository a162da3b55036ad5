"""Triton's kernels equal torch's tiles in Triton's interpreter, and compile for GPUs. On a card: ``tests/gpu``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from clipscale.losses import clip_loss, siglip_loss
from tests.kernels import CASES, WORLD, too_far

triton = pytest.importorskip("triton")

SHARED_BYTES = 99 * 1024  # of a program, on the smallest of the GPUs


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, in processes that chose the interpreter before they imported triton."""
    directory = tmp_path_factory.mktemp("kernels")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    answers = [directory / f"{rank}.json" for rank in range(WORLD)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.kernels", str(rank), directory / "store", answer],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank, answer in enumerate(answers)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=300)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert not any(process.returncode for process in ranks), "\n".join(said)
    return [json.loads(answer.read_text()) for answer in answers]


@pytest.mark.parametrize("name", CASES)
def test_equal_the_tiles(measured: list[dict[str, Any]], name: str) -> None:
    found = [answer[name] for answer in measured if name in answer]
    assert len(found) == CASES[name].world
    for errors in found:
        assert errors and not too_far(CASES[name], errors)


def test_torch_does_what_kernels_cannot(measured: list[dict[str, Any]]) -> None:
    assert all(answer["not as tiles"] == [] for answer in measured)


def test_a_backend_that_there_is_not() -> None:
    features = torch.eye(3)
    with pytest.raises(ValueError, match='cpu: backend="torch"'):
        clip_loss(features, features, 1.0, backend="triton")
    with pytest.raises(ValueError, match="backend='cuda' must be"):
        clip_loss(features, features, 1.0, backend="cuda")  # type: ignore[arg-type]


WITHOUT = """
import sys
sys.modules["triton"] = None
import torch
from clipscale.losses import clip_loss
features = torch.eye(3)
clip_loss(features, features, 1.0)
try:
    clip_loss(features, features, 1.0, backend="triton")
except ValueError as error:
    print(error)
"""


def test_without_triton() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    assert done.stdout == 'backend="triton" needs triton, which is not installed: backend="torch"\n'


def _step_on_a_fake_gpu(loss: Callable[..., Any], backend: str, hidden: bool) -> None:
    """Forward and backward over tensors that have shapes only, so that reading a number of one is an error."""
    image, text, extra = (torch.empty(n, 64, device="cuda", dtype=torch.bfloat16) for n in (5000, 5000, 300))
    scale, bias = (torch.empty(1, device="cuda", requires_grad=True) for _ in range(2))
    ids = torch.empty(5000, device="cuda", dtype=torch.int64)
    more = {"pair_ids": (ids, ids), "extra_text": extra} if hidden else {}
    given = image.requires_grad_(), text.requires_grad_(), scale, *([bias] if loss is siglip_loss else [])
    value = loss(*given, backend=backend, **more)
    with torch.no_grad():  # as the engine does, which itself wants a real device
        image_gradient, *_ = value.grad_fn.apply(torch.empty_like(value), None)
    assert image_gradient.shape == image.shape


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_nothing_waits_for_the_device(loss: Callable[..., Any], hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    launched: list[str] = []
    monkeypatch.setattr(triton.JITFunction, "run", lambda kernel, *_, **__: launched.append(kernel.fn.__name__))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    with FakeTensorMode():
        if loss is clip_loss:
            with pytest.raises(DataDependentOutputException):  # as torch's tiles do wait, this would show it
                _step_on_a_fake_gpu(loss, "torch", hidden)
        assert not launched
        _step_on_a_fake_gpu(loss, "auto", hidden)
        assert launched


KERNELS = ("_sums", "_weights", "_sigmoid", "_exact_sums", "_exact_weights")
QUICK = [(name, 90, torch.bfloat16) for name in KERNELS] + [("_sums", 80, torch.float32)]
ALL = [
    (name, capability, dtype)
    for capability in (80, 86, 90, 100, 120)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for name in KERNELS
    if (name, capability, dtype) not in QUICK
]


@pytest.mark.parametrize(
    ("name", "capability", "dtype"), [*QUICK, *(pytest.param(*row, marks=pytest.mark.slow) for row in ALL)]
)
def test_compiles(
    name: str, capability: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To machine code, which needs no card: what the interpreter lets pass shows here."""
    from triton.backends.compiler import GPUTarget

    from clipscale.losses import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    products = torch.float64 if name.startswith("_exact") else dtype
    blocks = kernels.blocks(products, dimensions=512)
    source = _source(getattr(kernels, name), kernels.constants(products, blocks, 512), kernels.TYPES[dtype].name)
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= SHARED_BYTES
    assert "tf32" not in compiled.asm["ptx"]


def _source(kernel: Any, constants: dict[str, Any], features: str) -> Any:
    """A kernel for aligned features of a type, two lists of ids and extra texts."""
    types = dict.fromkeys(("x", "y", "out"), f"*{features}")
    types |= dict.fromkeys(("u", "v", "row_sums", "column_sums"), "*fp64")
    types |= dict.fromkeys(("scale", "shift", "bias", "values", "totals", "row_parts", "column_parts"), "*fp32")
    types |= {"flag": "*i1", "hidden": ("*i64",) * 4 + ("*i1",) * 2} | dict.fromkeys(constants, "constexpr")
    signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(kernel.arg_names)
        if argument in ("x", "y", "out", "pitch")
    }
    return triton.compiler.ASTSource(kernel, signature, constants, aligned)
