"""How a model is laid out over the ranks, and in which arithmetic it computes."""

from clipscale.parallel.batchnorm import takes_statistics, use_global_batch_statistics
from clipscale.parallel.layers import heights, layer_groups, lock
from clipscale.parallel.parallelize import STRATEGIES, Parallelized, parallelize
from clipscale.parallel.precision import PRECISIONS, build_scaler, computed_in, towers_autocast, unsharded

__all__ = [
    "PRECISIONS",
    "STRATEGIES",
    "Parallelized",
    "build_scaler",
    "computed_in",
    "heights",
    "layer_groups",
    "lock",
    "parallelize",
    "takes_statistics",
    "towers_autocast",
    "unsharded",
    "use_global_batch_statistics",
]
