"""What the losses take beside the features, from sizes alone; importing this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

# Rows and columns: on a CPU, large enough for the multiplications' full speed and small enough for its caches.
CPU_TILE = (1024, 4096)
CUDA_TILE = (4096, 16384)


@dataclass(frozen=True)
class LossMemory:
    """Bytes on one rank, beside the rank's own features.

    ``gathered`` are the texts of all ranks; ``gradients`` those of the rank's images and of all texts, fp32; ``tiles``
    the logits that exist at a time, with masks and copies of features for their products; ``kept`` the exponentials
    that were asked for, and vectors; ``returned`` the gradients in the shape and type in which autograd gets them.
    """

    gathered: int
    gradients: int
    tiles: int
    kept: int
    returned: int
    peak: int
    """What exists at once, at most."""


def loss_memory(
    pairs: int,
    ranks: int,
    dim: int,
    *,
    loss: str = "clip",
    feature_bytes: int = 4,
    cuda: bool = False,
    kernels: bool = False,
    tile: tuple[int, int] | None = None,
    extra: int = 0,
    cache_mb: float = 0,
    smoothing: bool = False,
    masked: bool = False,
) -> LossMemory:
    """Of ``clip_loss``, or ``siglip_loss`` with ``loss="siglip"``, without teachers, where nothing leaves fp32's range.

    Args:
        pairs, ranks, dim: n of a rank, W, D.
        feature_bytes: of a number in the features: 4, or 2 for halves.
        cuda, kernels: on a GPU, and with Triton's kernels, which form a tile in the features' own type.
        tile: rows and columns; None is what ``tile="auto"`` takes.
        extra: texts of a rank without an image.
        cache_mb, smoothing, masked: as ``cache_mb``, ``label_smoothing`` and ``pair_ids`` of the loss, with duplicates.

    Measured on CPUs; what the kernels take follows from their code.
    """
    columns = ranks * (pairs + extra)
    most = tile or (CUDA_TILE if cuda else CPU_TILE)
    rows, width = min(most[0], pairs), min(most[1], columns)
    siglip, half = loss == "siglip", feature_bytes < 4
    gathered = columns * dim * feature_bytes if ranks > 1 or extra else 0
    gradients = 4 * (pairs + columns) * dim
    logits = rows * width * (feature_bytes if kernels else 4 * (3 if smoothing and not siglip else 2))
    # Scaled rows, or rows times their gradient; halves also as fp32, or on a GPU their products before they are added.
    copies = 4 * max(rows, min(pairs, CPU_TILE[0])) * dim + (4 * width * dim if half else 0)
    mask = rows * width if masked and not kernels else 0
    tile_bytes = 4 * rows * width
    cached = min(int(cache_mb * 2**20) // tile_bytes * tile_bytes, 4 * pairs * columns)
    if siglip or kernels:
        cached = 0
    vectors = 64 * (pairs + columns)
    returned = _returned(pairs, pairs + extra, ranks, dim, feature_bytes, siglip=siglip, cuda=cuda)
    working = max(2 * mask, mask + copies)
    kept = cached + vectors
    if siglip:  # its tiles and the texts are gone when the backward pass begins
        peak = gradients + kept + max(gathered + logits + working, returned)
    else:
        peak = gradients + kept + gathered + logits + max(working, returned)
    positives = gathered + 24 * min(pairs, CPU_TILE[0]) * dim  # formed first, in float64, some rows at a time
    return LossMemory(gathered, gradients, logits + working, kept, returned, max(peak, positives))


def _returned(pairs: int, own: int, ranks: int, dim: int, feature_bytes: int, *, siglip: bool, cuda: bool) -> int:
    """Bytes of the gradients that autograd gets of a rank's images and its ``own`` texts."""
    half = feature_bytes < 4
    scattered = 4 * own * dim if ranks > 1 else 0
    cast = feature_bytes * dim if half else 0  # per row
    copy = 4 * ranks * own * dim if ranks > 1 and not cuda else 0  # gloo adds up a copy of all that it scatters
    if not siglip:
        return scattered + cast * pairs + max(copy, cast * own)
    # Multiplies its gradients, one after the other, by what comes from above.
    multiplied = 0 if half else 4 * pairs * dim
    return scattered + cast * pairs + multiplied + max(copy, (4 * dim + cast) * own)
