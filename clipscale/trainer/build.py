"""What a run builds from its configuration before it trains: data, sample order, loader."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from clipscale.checkpoint import TOKENIZER
from clipscale.checkpoint.pretrained import check_tokenizer, load_pretrained, read_pretrained, read_text_tower
from clipscale.config import Config
from clipscale.config.data import Builtin, Data
from clipscale.config.optim import LossName, MaskDuplicates
from clipscale.data.augment import ColorOptions
from clipscale.data.embeddings import StoredTeacher
from clipscale.data.io import ShardStore, resolve
from clipscale.data.loader import Skipped, TrainLoader
from clipscale.data.manifest import ShardFile, Summary, damages, expand_shards, summarise
from clipscale.data.order import SampleOrder, Shard
from clipscale.data.prepare import SampleOptions
from clipscale.data.samples import ImageOptions
from clipscale.data.shapes import ShapesSpec, ensure_shapes, train_shards
from clipscale.data.stream import read_samples
from clipscale.data.synthetic import SyntheticLoader
from clipscale.data.tokenizer import Tokenizer, build_tokenizer
from clipscale.distributed.collectives import ALONE, fill, whole
from clipscale.distributed.runtime import Runtime
from clipscale.errors import ClipscaleError, ConfigError, DataError
from clipscale.evals import Classes, EvalContext
from clipscale.losses import LOSSES
from clipscale.models import CLIP, Classifier
from clipscale.models.hf import HFTextTower, read_hf_config
from clipscale.parallel import towers_autocast
from clipscale.trainer.probe import probe

T = TypeVar("T")

WINDOW_BYTES = 2 * 1024**3
WINDOW_RANGE = (16, 4096)
PROBED = 16  # samples that tell how large the others are


@dataclass(frozen=True)
class TrainData:
    """The training shards and the order over their samples."""

    files: list[ShardFile]
    order: SampleOrder
    damaged: dict[str, str]
    """What is wrong with the archives in which something is, by file name."""
    teachers: tuple[StoredTeacher, ...] = ()
    """Those of ``loss.teachers`` whose embeddings stand with the samples."""

    @property
    def samples(self) -> int:
        """Samples in all shards, each counted once."""
        return sum(shard.samples for shard in self.order.shards)

    def reads(self, epochs: int) -> Counter[str]:
        """How many samples of each shard, by name, so many epochs read at most; parts and namesakes together."""
        found: Counter[str] = Counter()
        for shard in self.order.shards:
            found[shard.name] += shard.samples * math.ceil(epochs * self.order.weights[shard.source])
        return found


def place_data(data: Data, runtime: Runtime) -> Data:
    """The data with root and shards filled in: built-in scenes are rendered if this machine does not have them yet."""
    if data.builtin is not Builtin.shapes:
        return data
    spec = ShapesSpec(**vars(data.shapes))
    root = once_per_node(runtime, lambda: ensure_shapes(spec))
    return replace(data, root=str(root), train=replace(data.train, shards=train_shards(spec)))


def build_store(config: Config, world: int = 1) -> ShardStore:
    """What opens the shards; what the streams of one of ``world`` ranks read ahead stays within a gigabyte."""
    streams = max(1, (config.data.streams or 1) // world)
    return ShardStore(config.storage, burst=int(np.clip(2**30 // streams, 2**21, 2**26)))


def build_train_data(config: Config, data: Data, store: ShardStore, runtime: Runtime) -> TrainData:
    """Count the shards (by their cached indexes) and build the sample order.

    Chooses ``data.window`` if it is null, and records it in ``config``. Raises DataError or ConfigError for shards that
    are absent, empty or unreadable, for weights that do not match the sources, and where nothing is found of what the
    loss needs beside pairs.
    """
    if data.builtin is Builtin.synthetic:
        config.data.window = config.data.window or WINDOW_RANGE[0]
        return TrainData([], _order(config, [Shard("synthetic", data.synthetic.samples)], None), {})
    files = once_per_node(
        runtime, lambda: expand_shards(data.train.shards, data.root, "data.train.shards", store, data.index)
    )
    summaries = once_per_node(runtime, lambda: summarise(files))
    samples = sum(summary.samples for summary in summaries)
    damaged = damages(files, summaries)
    if not samples:
        why = "".join(f"\n  {name} {damage}" for name, damage in islice(damaged.items(), 5))
        raise DataError(f"data.train.shards={data.train.shards}: the {len(files)} shards hold no sample{why}")
    if config.data.window is None:
        assert config.data.streams is not None, "open_run records the number of streams"
        mean_bytes = _mean_bytes(files, summaries)
        config.data.window = int(np.clip(WINDOW_BYTES / (config.data.streams * mean_bytes), *WINDOW_RANGE))
    shards = [Shard(file.name, found.samples, file.source) for file, found in zip(files, summaries, strict=True)]
    order = _order(config, shards, data.train.weights)
    _agree(order.fingerprint, runtime)
    teachers = once_per_node(runtime, lambda: probe(config, files, summaries))
    return TrainData(files, order, damaged, teachers)


def _agree(fingerprint: str, runtime: Runtime) -> None:
    """Raise DataError when ranks see other data: one may have met another index, or other files of the same name."""
    if runtime.world > 1:
        everyone = [fingerprint] * runtime.world
        dist.all_gather_object(everyone, fingerprint)
        if other := next((rank for rank, one in enumerate(everyone) if one != everyone[0]), None):
            raise DataError(
                f"ranks 0 and {other} see other shards, or other numbers of samples in them, by the same names; make "
                "data.root the same data on all nodes"
            )


def _order(config: Config, shards: Sequence[Shard], weights: Sequence[float] | None) -> SampleOrder:
    streams, window = config.data.streams, config.data.window
    assert streams is not None and window is not None
    try:
        return SampleOrder(shards, weights, config.seed, streams, window)
    except ValueError as error:
        raise ConfigError(f"data.train.shards, data.train.weights: {error}") from None


def _mean_bytes(files: Sequence[ShardFile], summaries: Sequence[Summary]) -> float:
    """Bytes of a sample, over the shards whose size is known; where none is, over the first samples that there are."""
    known = [summary for summary in summaries if summary.size and summary.samples]
    if known:
        return sum(summary.size or 0 for summary in known) / sum(summary.samples for summary in known)
    file = next(file for file, summary in zip(files, summaries, strict=True) if summary.samples)
    first = list(read_samples(file, 0, min(PROBED, file.summary.samples)))
    return max(1.0, sum(len(data) for sample in first for data in sample.members.values()) / len(first))


def build_loader(
    config: Config,
    train: TrainData,
    positions: NDArray[np.int64],
    tokenizer: Tokenizer,
    runtime: Runtime,
    skipped: Skipped = (),
) -> TrainLoader | SyntheticLoader:
    """This rank's batches from ``positions`` Int64[V] on, but for the ``skipped`` stretches."""
    data = config.data
    image_ids = config.loss.mask_duplicates in (MaskDuplicates.image, MaskDuplicates.both)
    if data.builtin is Builtin.synthetic:
        return SyntheticLoader(
            train.order,
            positions,
            rank=runtime.rank,
            world=runtime.world,
            global_batch_size=config.global_batch_size,
            image_size=config.model.vision.image_size,
            tokenizer=tokenizer,
            pin_memory=runtime.device.type == "cuda",
            image_ids=image_ids,
            skipped=skipped,
        )
    return TrainLoader(
        train.order,
        train.files,
        positions,
        rank=runtime.rank,
        world=runtime.world,
        global_batch_size=config.global_batch_size,
        options=_sample_options(config, train.teachers, image_ids),
        tokenizer=tokenizer,
        workers=data.workers,
        pin_memory=runtime.device.type == "cuda",
        skipped=skipped,
    )


def _sample_options(config: Config, teachers: tuple[StoredTeacher, ...], image_ids: bool) -> SampleOptions:
    data, vision = config.data, config.model.vision
    jitter, scale = data.color_jitter, data.crop_scale
    image = ImageOptions(
        vision.image_size,
        None if scale is None else (scale[0], scale[1]),
        (data.crop_ratio[0], data.crop_ratio[1]),
        data.max_pixels,
        vision.resize_mode,
        ColorOptions(
            None if jitter is None else (jitter[0], jitter[1], jitter[2], jitter[3]),
            data.color_jitter_prob,
            data.grayscale_prob,
        ),
    )
    return SampleOptions(
        tuple(data.image_keys),
        data.caption_key,
        image,
        config.seed,
        data.clean_captions,
        data.long_caption,
        image_ids,
        data.negatives_key,
        data.negatives_per_sample,
        teachers,
        data.label_key,
        len(config.model.classes or ()),
    )


def read_classes(config: Config, data: Data, store: ShardStore, runtime: Runtime) -> Classes | None:
    """The classes of a run that trains a classifier; None for another.

    Records their names in ``config``. Raises DataError when they cannot be read, or are not those that are recorded.
    """
    if config.loss.name is not LossName.cross_entropy:
        return None
    classes = once_per_node(runtime, lambda: Classes.load(store, resolve(str(data.zeroshot.classes), data.root)))
    classes.agree(config.model.classes or classes.names)
    config.model.classes = classes.names
    return classes


def start_head(config: Config, model: Classifier, classes: Classes, tokenizer: Tokenizer, device: torch.device) -> None:
    """Make a classifier what its towers are without training: its logits are the similarities to the classes' prompts.

    A collective. The model is left in the mode that it was in.
    """
    training = model.training
    context = eval_context(config, model.eval(), tokenizer, device)
    weight = classes.embed(context) * whole(model.logit_scale.detach()).exp().cpu()
    model.train(training)
    fill(model.head.weight, weight)
    fill(model.head.bias, torch.zeros(len(weight)))


def start_from(model: CLIP, config: Config, tokenizer: Tokenizer, runtime: Runtime) -> tuple[str, list[str]]:
    """Load what a new run starts from into a model that is not laid out over ranks yet; one rank a node downloads it.

    That is ``init.weights``, and those of a text tower of Hugging Face's, unless they have one. Returns what it was,
    empty if nothing, and what was said of weights that are not as they were found. Raises ClipscaleError when it cannot
    be had, or is not of this model.
    """
    weights, name = config.init.weights, config.model.text.hf
    found = None if weights is None else once_per_node(runtime, lambda: read_pretrained(weights))
    if found is not None and isinstance(model.text, HFTextTower) == found.of_hf_text:  # else its text tower stays
        check_tokenizer(found, tokenizer)
    sources, said = [], []
    if isinstance(model.text, HFTextTower) and config.model.text.hf_pretrained and not (found and found.of_hf_text):
        tower = model.text
        tower.transformer.load_state_dict(once_per_node(runtime, lambda: read_text_tower(tower, str(name))))
        sources.append(f"{name} (text)")
    elif isinstance(model.text, HFTextTower) and config.lock.text and found and not found.of_hf_text:
        raise ConfigError(
            f"lock.text=true locks weights that nothing has trained: init.weights={weights} has no text tower of "
            "Hugging Face's; use model.text.hf_pretrained=true, or lock.text=false"
        )
    if found is not None:
        said = load_pretrained(model, found)
        sources.append(found.where)
    return " and ".join(sources), said


def read_tokenizer(config: Config, runtime: Runtime) -> Tokenizer:
    """The run's tokenizer, from its directory where it keeps one, or else downloaded by one rank of a node.

    Reads and records ``model.text.hf_config`` before, where that is needed. Raises ClipscaleError when one of both
    cannot be had, or they do not fit.
    """
    text = config.model.text
    if text.hf is not None and text.hf_config is None:
        text.hf_config = once_per_node(runtime, lambda: read_hf_config(text))
    stored = run_path(config) / TOKENIZER
    return once_per_node(runtime, lambda: build_tokenizer(config.tokenizer, config.model, stored))


def eval_context(config: Config, model: CLIP, tokenizer: Tokenizer, device: torch.device) -> EvalContext:
    """``model``, whatever its layout, as evaluators take it; its temperature is the one of this moment."""
    temperature, loss = model.temperature, LOSSES[config.loss.name.value]
    # To the device: shards may lie on the host.
    scale = whole(temperature.logit_scale.detach()).exp().to(device)
    bias = None if temperature.logit_bias is None else whole(temperature.logit_bias.detach()).to(device)
    return EvalContext(
        model,
        tokenizer,
        device,
        config.eval.batch_size,
        partial(towers_autocast, config.precision.name, device),
        lambda image, text: loss(image, text, scale, bias, group=ALONE),
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
