"""What a step makes its device do: few operations over all parameters, and nothing that the host waits for."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import clipscale
from clipscale.config import compose
from tests.distributed.test_parallel import build, make_batch, small

PACKAGE = Path(clipscale.__file__).parent
aten = torch.ops.aten
# Of what such an operation gives, the host must know the value or the size before it goes on.
READS = {
    aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default, aten.nonzero.default,
    aten.masked_select.default, aten.unique_consecutive.default, aten._unique2.default, aten.repeat_interleave.Tensor,
}  # fmt: skip
# Lengths of captions lie on the host, whatever the device. Losses look at their numbers on CPUs alone, but for teachers
# and smoothing: the tests of their kernels take them through a GPU without contents.
ON_THE_HOST = {
    "data/loader.py:<listcomp>", "models/packing.py:of", "models/packing.py:<genexpr>",
    "losses/softmax.py:forward", "losses/softmax.py:exp", "losses/sigmoid.py:_softplus",
    "losses/globalbatch.py:_has_duplicates",
}  # fmt: skip
OVER_ALL = {
    aten._foreach_norm.Scalar,
    aten._foreach_mul_.Tensor,
    aten._fused_sgd_.default,
    aten._fused_adamw_.default,
}


class Watch(TorchDispatchMode):
    """Counts operations, and the places in clipscale at which one is read back."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()
        self.read: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func] += 1
        if func in READS:
            place = [frame for frame in traceback.extract_stack() if frame.filename.startswith(f"{PACKAGE}/")][-1]
            self.read.add(f"{Path(place.filename).relative_to(PACKAGE)}:{place.name}")
        return func(*args, **(kwargs or {}))


OPTIONS = [
    "precision=fp32", "precision=amp_bf16", "precision=amp_fp16", "optim.microbatches=4", "loss=siglip",
    "loss.mask_duplicates=text", "parallel.activation_checkpointing=full",
]  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_a_step_reads_nothing_back(option: str) -> None:
    """Found on a CPU, where reading costs nothing; on a GPU, ``tests/gpu`` has torch itself refuse to wait."""
    config, _ = compose(["optim.clip_grad_norm=1.0", option])
    config.model = small("vit")
    step = build(config)
    first, batch = (make_batch(number, slice(None)) for number in range(2))
    step(first, 0, 1e-3)
    step.zero_grad()
    with Watch() as seen:
        step(batch, 16, 1e-3)
    assert seen.read <= ON_THE_HOST, seen.read
    # One operation for all parameters, or for each group of the optimizer: as many launches, however deep the model.
    assert all(1 <= seen.calls[one] <= 2 for one in OVER_ALL), seen.calls
    with Watch() as seen:
        step.grad_norm()
    assert seen.read == {"trainer/step.py:grad_norm"}  # this one is asked for when a step is logged
