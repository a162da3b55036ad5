"""CLIP's symmetric softmax loss (CLIP paper, figure 3)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from clipscale.distributed.collectives import Gathering, Group
from clipscale.losses.globalbatch import PairIds
from clipscale.losses.inputs import Backend, Scalar, prepare
from clipscale.losses.softmax import SoftmaxLoss
from clipscale.losses.tiles import TileShape


@torch.compiler.disable  # type: ignore[untyped-decorator]
def clip_loss(
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale: Scalar,
    *,
    group: Group = None,
    pair_ids: PairIds | None = None,
    label_smoothing: float = 0.0,
    extra_text: torch.Tensor | None = None,
    tile: TileShape = "auto",
    cache_mb: float = 0,
    comm_dtype: torch.dtype | None = None,
    gathering: Gathering | None = None,
    backend: Backend = "auto",
    stats: bool = False,
) -> Any:
    """Mean of the image-to-text and text-to-image cross entropies over the global batch of N = W·n pairs.

    Memory is O(N·D): logits exist a tile at a time. They are formed in fp32 (float64 for float64 features) whatever the
    autocast; of half-precision features, products are exact and their sums fp32.

    Args:
        image: Float[n, D], of this rank's n pairs, L2-normalised. Every rank brings the same n. Other norms are exact
            as well while logits stay within ±670; where float64's range does not do, the loss is NaN.
        text: Float[n, D], likewise.
        logit_scale: the multiplier on cosine similarities, already exponentiated; a number or a tensor of one.
        group: process group of the global batch; None is the default group, or this process alone.
        pair_ids: ``(image_ids, text_ids)``, Int64[n] or None: a text beside the diagonal whose image or caption has the
            id of the row's own is no negative, and leaves the denominators.
        label_smoothing: part of the target that is spread evenly over all that a row or column is compared with.
        extra_text: Float[k, D], texts of this rank without an image (hard negatives). All images of all ranks are
            compared with them. A row of zeros is none; every rank brings the same k.
        tile: rows and columns of logits at a time: "auto", one number, or two.
        cache_mb: megabytes of exponentials that torch's tiles may keep for the backward pass, which then forms them no
            more; kernels keep none.
        comm_dtype: in which texts are sent to the other ranks, and the gradients back; None sends texts as they are and
            gradients in fp32.
        gathering: of this rank's texts and, behind them, extra texts, as they are to be sent; None begins it here.
        backend: "triton" forms tiles by kernels that make no host wait for its device; "torch" by torch's operations,
            anywhere; "auto" takes kernels on CUDA where triton is installed. What kernels have not (float64 features,
            smoothing, teachers, statistics) is done by torch with any of them.
        stats: return ``(loss, LossStats)``.

    Returns:
        Float[], the loss of the whole batch, the same on every rank. Its gradients are such that their mean over
        ranks, which is what DDP and FSDP2 form, is the gradient of that loss, for the features as for the scale. There
        is no second derivative: a backward pass with ``create_graph=True`` raises RuntimeError.

    Raises:
        ValueError: shapes that do not fit each other or ``gathering``, or differ between ranks; an option out of its
            range; kernels where none can run.
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
            options=f", smoothing {label_smoothing}",
        )
        task = replace(given.task, smoothing=label_smoothing, cache_bytes=cache_mb * 2**20)
        return given.outcome(SoftmaxLoss.apply(given.image, given.columns, given.scale, task))
