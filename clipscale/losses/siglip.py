"""The pairwise sigmoid loss (SigLIP, Zhai et al. 2023, algorithm 1)."""

from __future__ import annotations

from typing import Any

import torch

from clipscale.distributed.collectives import Gathering, Group
from clipscale.losses.globalbatch import PairIds
from clipscale.losses.inputs import Backend, Scalar, as_vector, prepare
from clipscale.losses.sigmoid import SigmoidLoss
from clipscale.losses.tiles import TileShape


@torch.compiler.disable  # type: ignore[untyped-decorator]
def siglip_loss(
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale: Scalar,
    logit_bias: Scalar,
    *,
    group: Group = None,
    pair_ids: PairIds | None = None,
    extra_text: torch.Tensor | None = None,
    tile: TileShape = "auto",
    comm_dtype: torch.dtype | None = None,
    gathering: Gathering | None = None,
    backend: Backend = "auto",
    stats: bool = False,
) -> Any:
    """Sum over all N x N combinations of the global batch of ``-log sigmoid(±(s x·y + b))``, divided by N.

    Args and Returns as in :func:`clipscale.losses.clip_loss`; ``logit_bias`` is b, a number or a tensor of one. The
    gradients are formed in the forward pass, in which no logit needs another, so there is nothing to cache.

    Raises:
        ValueError: shapes that do not fit each other, or differ between ranks; kernels where none can run.
    """
    with torch.autocast(image.device.type, enabled=False):
        given = prepare(
            image,
            text,
            logit_scale,
            group=group,
            pair_ids=pair_ids,
            extra_text=extra_text,
            tile=tile,
            comm_dtype=comm_dtype,
            gathering=gathering,
            backend=backend,
            stats=stats,
        )
        bias = as_vector(logit_bias, image)
        return given.outcome(SigmoidLoss.apply(given.image, given.columns, given.scale, bias, given.task), bias)
