"""How a model is laid out over the ranks, and in which arithmetic it computes."""

from clipscale.parallel.batchnorm import has_batchnorm, use_global_batch_statistics
from clipscale.parallel.parallelize import STRATEGIES, Parallelized, parallelize
from clipscale.parallel.precision import PRECISIONS, build_scaler, towers_autocast

__all__ = [
    "PRECISIONS",
    "STRATEGIES",
    "Parallelized",
    "build_scaler",
    "has_batchnorm",
    "parallelize",
    "towers_autocast",
    "use_global_batch_statistics",
]
