"""What a run builds from its configuration before it trains: data, sample order, loader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from clipscale.config import Config
from clipscale.config.data import Builtin, Data
from clipscale.data.loader import SampleOptions, TrainLoader
from clipscale.data.manifest import ShardFile, count_shards, expand_shards, shard_index
from clipscale.data.order import SampleOrder
from clipscale.data.samples import ImageOptions
from clipscale.data.shapes import ShapesSpec, ensure_shapes
from clipscale.data.tokenizer import Tokenizer
from clipscale.distributed.runtime import Runtime
from clipscale.errors import ClipscaleError, ConfigError, DataError

T = TypeVar("T")

WINDOW_BYTES = 2 * 1024**3
WINDOW_RANGE = (16, 4096)


@dataclass(frozen=True)
class TrainData:
    """The training shards and the order over their samples."""

    files: list[ShardFile]
    order: SampleOrder

    @property
    def samples(self) -> int:
        """Samples in all shards, each counted once."""
        return sum(shard.samples for shard in self.order.shards)

    @property
    def damaged(self) -> dict[str, str]:
        """What is wrong with the archives in which something is, by file name."""
        indexes = {file.path.name: shard_index(file.path) for file in self.files}
        return {name: index.damage for name, index in indexes.items() if index.damage}


def place_data(data: Data, runtime: Runtime) -> Data:
    """The data with its root filled in: built-in scenes are rendered if this machine does not have them yet."""
    if data.builtin is Builtin.none:
        return data
    spec = ShapesSpec(**vars(data.shapes))
    return replace(data, root=str(once_per_node(runtime, lambda: ensure_shapes(spec))))


def build_train_data(config: Config, data: Data, runtime: Runtime) -> TrainData:
    """Count the shards (by their cached indexes) and build the sample order.

    Chooses ``data.window`` if it is null, and records it in ``config``. Raises DataError or ConfigError for shards that
    are absent, empty or unreadable, and for weights that do not match the sources.
    """
    files = expand_shards(data.train.shards, data.root, "data.train.shards")
    shards = once_per_node(runtime, lambda: count_shards(files))
    samples = sum(shard.samples for shard in shards)
    if not samples:
        raise DataError(f"data.train.shards={data.train.shards}: the {len(files)} shards hold no sample")
    streams = config.data.streams
    assert streams is not None, "open_run records the number of streams"
    if config.data.window is None:
        mean_bytes = sum(file.path.stat().st_size for file in files) / samples
        config.data.window = int(np.clip(WINDOW_BYTES / (streams * mean_bytes), *WINDOW_RANGE))
    try:
        order = SampleOrder(shards, data.train.weights, config.seed, streams, config.data.window)
    except ValueError as error:
        raise ConfigError(f"data.train.weights={data.train.weights}: {error}") from None
    return TrainData(files, order)


def build_loader(
    config: Config, train: TrainData, positions: NDArray[np.int64], tokenizer: Tokenizer, runtime: Runtime
) -> TrainLoader:
    """This rank's batches from ``positions`` Int64[V] on."""
    data = config.data
    image = ImageOptions(
        config.model.vision.image_size,
        (data.crop_scale[0], data.crop_scale[1]),
        (data.crop_ratio[0], data.crop_ratio[1]),
        data.max_pixels,
    )
    return TrainLoader(
        train.order,
        [file.path for file in train.files],
        positions,
        rank=runtime.rank,
        world=runtime.world,
        global_batch_size=config.global_batch_size,
        options=SampleOptions(tuple(data.image_keys), data.caption_key, image, config.seed),
        tokenizer=tokenizer,
        workers=data.workers,
        pin_memory=runtime.device.type == "cuda",
    )


def once_per_node(runtime: Runtime, make: Callable[[], T]) -> T:
    """Let the first process of each node fill a cache on disk before the others read it."""
    made, failed = None, ""
    if runtime.local_rank == 0:
        try:
            made = make()
        except ClipscaleError as error:
            failed = str(error)
    if runtime.world > 1:
        # What one finds wrong all must know: the others would wait, and end with a remark about their peer.
        everyone = [failed] * runtime.world
        dist.all_gather_object(everyone, failed)
        failed = next(filter(None, everyone), "")
    if failed:
        raise DataError(failed)
    return make() if made is None else made


def run_path(config: Config) -> Path:
    """The run directory."""
    assert config.name is not None, "open_run gives the run its name"
    return Path(config.runs_dir, config.name)
