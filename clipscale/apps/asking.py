"""A model ready to be asked, for the commands that use what was trained."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from clipscale.apps.devices import check_device
from clipscale.checkpoint.loading import open_model
from clipscale.distributed.collectives import rank, world_size
from clipscale.distributed.runtime import Runtime, start
from clipscale.errors import ConfigError
from clipscale.evals import EvalContext
from clipscale.parallel import unsharded
from clipscale.trainer.build import eval_context, once_per_node

TIMEOUT_S = 1800.0  # for which ranks wait for each other: one may decode large images while another is done


def ask(where: str, device: str = "auto", batch_size: int | None = None) -> EvalContext:
    """The model at ``where`` (see :func:`clipscale.load`), as evaluators take it, on this process's device.

    Under torchrun every rank calls it, and the context deals batches to the ranks. ``batch_size`` None is the model's
    own ``eval.batch_size``. Raises ClipscaleError, in one line, for a model or a device that is not there.
    """
    runtime = here(device)
    model, config, tokenizer = once_per_node(runtime, lambda: open_model(where))
    config.precision.name = unsharded(config.precision.name)
    if batch_size is not None:
        if batch_size < 1:
            raise ConfigError(f"--batch-size {batch_size}: choose at least 1")
        config.eval.batch_size = batch_size
    return eval_context(config, model.eval().to(runtime.device), tokenizer, runtime.device)


def here(device: str) -> Runtime:
    """This process among its peers; the first call starts the process group, where torchrun started the process.

    Raises ConfigError for a device that there is not.
    """
    check_device(device)
    if not dist.is_initialized():
        return start(device, TIMEOUT_S)
    where = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    return Runtime(rank(), world_size(), int(os.environ.get("LOCAL_RANK", rank())), where)
