"""``data`` and ``tokenizer``: where samples come from and how they become tensors."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from clipscale.config.fields import fixed, free, group


class LongCaption(Enum):
    """What is kept of a caption that does not fit."""

    head = "head"
    random_sentence = "random_sentence"
    block = "block"
    random = "random"


class Builtin(Enum):
    """Data that clipscale renders itself."""

    none = "none"
    shapes = "shapes"
    synthetic = "synthetic"  # random tensors, to measure training without its data


@dataclass
class Shapes:
    """Size of the built-in scenes; used when ``data.builtin=shapes``."""

    train: int = fixed(8192)
    """Training samples."""
    val: int = fixed(600)
    """Validation samples, each with a caption of its own."""
    classes: int = fixed(240)
    """Held-out compositions, the zero-shot classes."""
    per_class: int = fixed(4)
    """Zero-shot images per class."""
    image_size: int = fixed(64)
    """Side of the rendered images in pixels."""
    seed: int = fixed(0)
    """Seed of the scenes."""
    shuffle_captions: bool = fixed(False)
    """A control: training captions are dealt to other images, so every metric must stay at chance."""


@dataclass
class Synthetic:
    """Random tensors in place of samples; used when `data.builtin=synthetic`."""

    samples: int = fixed(1_000_000)
    """Samples of an epoch."""


@dataclass
class TrainSet:
    """Training shards."""

    shards: Any = fixed(None)
    """Shard names: brace patterns, `::` between sources, or a YAML list (one source per entry); relative names
    resolve against `data.root`."""
    weights: list[float] | None = fixed(None)
    """Passes over each source per epoch, in the order of the sources; null is 1 for each."""


@dataclass
class ValSet:
    """Held-out pairs for validation loss and retrieval."""

    shards: Any = free(None)
    """Shard names as in `data.train.shards`; null or 0 turns validation off."""
    group_key: str = free("caption")
    """What makes two samples the same in retrieval: `caption`, or `json:FIELD`."""


@dataclass
class ZeroshotSet:
    """Labelled images for zero-shot classification."""

    shards: Any = free(None)
    """Shard names as in `data.train.shards`; null or 0 turns zero-shot evaluation off."""
    classes: str | None = free(None)
    """JSON file with `classnames` and `templates` (and `baselines` to print beside the score)."""
    label_key: str = free("json:label")
    """Where a sample's class index stands: `json:FIELD` or a member such as `cls`."""


@dataclass
class Data:
    """Samples, their order and their decoding."""

    builtin: Builtin = fixed(Builtin.none)
    """Data rendered on this machine instead of shards of yours."""
    shapes: Shapes = group(Shapes)
    synthetic: Synthetic = group(Synthetic)
    root: str | None = free(None)
    """Directory against which relative shard names resolve; data may move between resumes."""
    index: str | None = free(None)
    """Index file of the shards, where none lies beside them as `shards.json`; see `clipscale data index --output`."""
    train: TrainSet = group(TrainSet)
    val: ValSet = group(ValSet)
    zeroshot: ZeroshotSet = group(ZeroshotSet)
    image_keys: list[str] = fixed(["jpg", "jpeg", "png", "webp"])
    """Members of a sample that may hold the image, in order of preference."""
    caption_key: str = fixed("txt")
    """Where the caption stands: a member such as `txt`, or `json:FIELD`; of a list, one caption is drawn per view."""
    label_key: str | None = fixed(None)
    """Where a training sample's class index stands, for `loss=cross_entropy`: `json:FIELD` or a member such as `cls`;
    captions are not read then. null: samples are pairs."""
    negatives_key: str | None = fixed(None)
    """Where texts stand that are wrong about the image on purpose, hard negatives of the training loss: a member or
    `json:FIELD`, a text or a list of them; a sample may lack them. null: none."""
    negatives_per_sample: int = fixed(1)
    """How many different ones of a sample's negatives are drawn each time it is seen."""
    clean_captions: bool = fixed(False)
    """Take web addresses, HTML tags and control characters out of training captions and negatives."""
    long_caption: LongCaption = fixed(LongCaption.head)
    """What training takes of a caption longer than the context: its `head`, what follows from a `random_sentence` on, a
    `block` of tokens from anywhere in it, or `random` ones of its tokens, in their order."""
    crop_scale: list[float] | None = fixed([0.9, 1.0])
    """Area range of the random resized crop, as shares of the image; null: no random crop, training sees pictures as
    evaluation does (`model.vision.resize_mode`)."""
    crop_ratio: list[float] = fixed([0.75, 1.3333333333333333])
    """Aspect-ratio range of the random resized crop."""
    color_jitter: list[float] | None = fixed(None)
    """Strengths of random brightness, contrast, saturation and hue, e.g. [0.4, 0.4, 0.4, 0.1]; null changes none."""
    color_jitter_prob: float = fixed(0.8)
    """How often colours are jittered, where `color_jitter` is set."""
    grayscale_prob: float = fixed(0.0)
    """How often an image loses its colours."""
    max_pixels: int = fixed(100_000_000)
    """Images with more pixels are refused before they are decoded, and counted."""
    max_bad_fraction: float | None = free(0.1)
    """Share of samples that may be unusable; more, after 2,000 samples or at the end, stop the run with exit code 4.
    null is no limit."""
    max_bad_fraction_per_shard: float | None = free(None)
    """The same for every single shard; null is no limit."""
    workers: int = free(2)
    """Loader processes per rank; 0 decodes in the training process."""
    streams: int | None = fixed(None)
    """Canonical streams V: divides global_batch_size, and world sizes divide it. null: the largest divisor of
    global_batch_size up to 512 that the processes which begin the run can share. Recorded for the life of a run."""
    window: int | None = fixed(None)
    """Samples per shuffle window W of a stream. null: as many as keep V windows within 2 GiB a node, 16 to 4,096.
    Recorded for the life of a run."""
    trace: bool = free(False)
    """Write the keys of every batch to RUN/trace/rank*.jsonl."""


@dataclass
class Storage:
    """How remote shards are reached; credentials come from the environment or the cloud's own chain alone."""

    endpoint_url: str | None = free(None)
    """Address of an S3 server that is not Amazon's, e.g. `http://minio:9000`."""
    region: str | None = free(None)
    """Region of the bucket."""
    allow_http: bool = free(False)
    """Let `endpoint_url` be reached without TLS."""
    ca_bundle: str | None = free(None)
    """PEM file of certificate authorities to trust beside the built-in ones, for servers with a certificate of your
    own."""
    anonymous: bool = free(False)
    """Send no credentials, for public buckets."""
    retries: int = free(8)
    """Tries in a row without progress after which a shard counts as unreachable and the run stops."""
    timeout_s: float = free(30.0)
    """Seconds after which an answer that has not ended is broken off and taken up again where it stood."""
    cache_dir: str | None = free(None)
    """Local directory in which remote shards are kept whole, for all processes of a machine; null keeps none."""
    cache_gib: float = free(100.0)
    """Most GiB kept in `cache_dir`; the least recently used shards make room."""


@dataclass
class Tokenizer:
    """The tokenizer, from open_clip_torch or Hugging Face."""

    name: str = fixed("clip")
    """`clip` (OpenAI's byte-pair encoding), any open_clip model name or `hf-hub:` name, whose tokenizer is used, or
    `hf:` and a Hugging Face name or directory, e.g. `hf:FacebookAI/roberta-base`."""
    context_length: int | None = fixed(None)
    """Tokens per caption; null takes the model's. Must not exceed model.context_length."""
