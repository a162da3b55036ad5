"""``lock``, ``optim``, ``schedule``, ``precision``, ``ema`` and ``loss``: how the weights move."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from clipscale.config.fields import event, fixed, free
from clipscale.errors import ConfigError


class LossName(Enum):
    """Losses over the global batch: contrastive ones, and that of a classifier."""

    clip = "clip"
    siglip = "siglip"
    cross_entropy = "cross_entropy"


class MaskDuplicates(Enum):
    """Which pairs off the diagonal of the similarities are no negatives."""

    none = "none"
    text = "text"
    image = "image"
    both = "both"


class LossDtype(Enum):
    """What features are rounded to before they are compared; sums are fp32 in each."""

    fp32 = "fp32"
    bf16 = "bf16"


class ScheduleName(Enum):
    """Learning-rate schedules, all in samples."""

    cosine = "cosine"
    constant = "constant"
    wsd = "wsd"


class PrecisionName(Enum):
    """Arithmetic of the towers; the loss and the master weights are fp32 in each."""

    fp32 = "fp32"
    amp_bf16 = "amp_bf16"
    amp_fp16 = "amp_fp16"
    bf16 = "bf16"


@dataclass
class Loss:
    """The contrastive loss and the start of its temperature."""

    name: LossName = fixed(LossName.clip)
    """Softmax (`clip`) or pairwise sigmoid (`siglip`) loss of pairs; `cross_entropy` trains the image tower with a
    linear head over the classes of `data.zeroshot.classes`, on images with labels."""
    init_logit_scale: float = fixed(14.285714285714285)
    """First value of the multiplier on cosine similarities: 1/0.07 in CLIP, 10 in SigLIP."""
    init_logit_bias: float = fixed(0.0)
    """First value of the bias on logits; only the sigmoid loss has one (-10 in SigLIP)."""
    max_logit_scale: float | None = fixed(100.0)
    """The multiplier is clamped to [1, this] after every step; null leaves it free (SigLIP)."""
    mask_duplicates: MaskDuplicates = fixed(MaskDuplicates.none)
    """Pairs off the diagonal that leave the denominators, for they are no negatives: those of equal captions (`text`),
    of equal images (`image`), or of either (`both`); `none` keeps all."""
    label_smoothing: float = fixed(0.0)
    """Part of the target of a softmax loss, or of cross entropy, that is spread evenly over all that an image or a text
    is compared with."""
    teachers: Any = fixed([])
    """Teachers to distil from: checkpoints of clipscale or runs (the newest checkpoint at the student's start), or
    `{image: MEMBER, text: MEMBER, logit_scale: 100}`, embeddings that are stored with the samples and the multiplier
    on their similarities."""
    teacher_weight: float = fixed(0.5)
    """Part of the target that is the teachers' mean softmax; the rest is the pair itself."""
    dtype: LossDtype = event(LossDtype.fp32)
    """What features are rounded to before the loss: `bf16` sends half as much between ranks and multiplies on tensor
    cores; its sums are fp32 all the same."""
    cache_mb: float = free(64.0)
    """Megabytes of the softmax loss's exponentials that are kept for the backward pass, to make it faster."""
    overlap_gather: bool = free(False)
    """Send the texts' features to all ranks while the images are still in their tower, with the same values and
    gradients; of no effect with more than one microbatch. What it saves on several GPUs has not been measured."""

    @property
    def first_bias(self) -> float | None:
        """What the model's ``logit_bias`` starts from; None for a loss without one."""
        return self.init_logit_bias if self.name is LossName.siglip else None


@dataclass
class Optim:
    """AdamW."""

    lr: float = event(5e-4)
    """Peak learning rate."""
    weight_decay: float = event(0.2)
    """Decoupled weight decay; gains, biases, class tokens and the temperature are exempt."""
    beta1: float = event(0.9)
    """AdamW's first decay rate."""
    beta2: float = event(0.98)
    """AdamW's second decay rate (CLIP: 0.98 for ViT, 0.999 for ResNet)."""
    eps: float = event(1e-6)
    """AdamW's epsilon (CLIP: 1e-6 for ViT, 1e-8 for ResNet)."""
    clip_grad_norm: float | None = event(None)
    """Largest global gradient norm; null does not clip."""
    layer_decay: float = fixed(1.0)
    """Learning rate of a group of layers over that of the group above it, e.g. 0.75; groups are those of
    `lock.image_unlocked_groups`. Projections and the temperature have the full rate; 1 gives it to all."""
    microbatches: Any = free(1)
    """Parts in which a process takes its pairs of a batch through the towers, so that the batch need not fit into its
    memory: a number, or `auto` for as few as `max_microbatch` allows. The gradient is that of the whole batch; more
    than 1 repeat all but one part's forward pass. What the image tower drops is each sample's own, whatever
    their number."""
    max_microbatch: int | None = free(None)
    """Most pairs that a process takes through the towers at once, where `microbatches=auto`."""

    def count_microbatches(self, pairs: int) -> int:
        """How many microbatches a process makes of its ``pairs`` of a batch. Raises ConfigError for more than pairs."""
        if self.microbatches == "auto":
            assert self.max_microbatch is not None, "validate refuses it"
            return -(-pairs // self.max_microbatch)
        if self.microbatches > pairs:
            raise ConfigError(
                f"optim.microbatches={self.microbatches} is more than the {pairs} pairs of a batch that a process has; "
                f"use optim.microbatches={pairs} or less, or optim.microbatches=auto with optim.max_microbatch"
            )
        return self.microbatches


@dataclass
class Divergence:
    """What happens when training goes wrong: a step whose loss or gradient is not finite moves nothing and is counted;
    too many of them, and the run goes back to a checkpoint and around the batches on which it went wrong."""

    bad_steps: int = event(3)
    """Bad steps among `within_steps` after which the run goes back. A step is bad if its loss or its gradient is not
    finite (under `amp_fp16`: beyond what the loss scale can mend), or by `spike_factor`."""
    within_steps: int = event(100)
    """Steps over which bad ones are counted; when the run goes back, the batches of that many are passed over, counted
    as `train/diverged_samples` and named in RUN/diverged."""
    spike_factor: float | None = event(None)
    """A loss above this many times the median of the last `within_steps` losses is bad too; null: none is. No factor
    suits all runs, whose losses fall by a factor of ten and more."""
    max_rollbacks: int = event(3)
    """Times that a run goes back, in all; then it stops with exit code 3, and the same command goes on from the last
    checkpoint."""


@dataclass
class Lock:
    """Weights that are not trained: locked-image tuning (LiT, Zhai et al. 2022), and its like for texts."""

    image: bool = fixed(False)
    """Leave the image tower as it starts (`init.weights`), but for its `image_unlocked_groups`; what is locked computes
    as in evaluation."""
    image_unlocked_groups: int = fixed(0)
    """Groups of a locked image tower, from its output on, that are trained all the same: 1 is the projection, 2 the
    last block too, and so on down to the embedding; 1 is the last block where there is no projection."""
    text: bool = fixed(False)
    """Leave the text tower as it starts, but for its `text_unlocked_groups`."""
    text_unlocked_groups: int = fixed(0)
    """The same groups of a locked text tower."""
    batchnorm: bool = fixed(True)
    """Locked BatchNorms normalise by their running statistics and leave them alone; false: by those of the batch, and
    they go on averaging them (open_clip's default)."""


@dataclass
class Schedule:
    """Learning rate against samples seen."""

    name: ScheduleName = event(ScheduleName.cosine)
    """`cosine` decays to min_lr_ratio, `constant` stays, `wsd` stays and then decays linearly at the end."""
    warmup_samples: int = event(0)
    """Samples over which the rate rises linearly from 0."""
    min_lr_ratio: float = event(0.0)
    """Last learning rate over the peak (cosine and wsd)."""
    decay_fraction: float = event(0.2)
    """Share of the run over which `wsd` decays."""


@dataclass
class Precision:
    """Arithmetic of the towers."""

    name: PrecisionName = event(PrecisionName.fp32)
    """fp32; autocast to bf16 / fp16 (`amp_bf16`, `amp_fp16`, the latter with a gradient scaler); or `bf16`, all of the
    towers in bf16 over shards of fp32 (`parallel=fsdp` and `hsdp` only)."""


@dataclass
class Ema:
    """Exponential moving average of the weights; evaluation and `clipscale.load` use it when it is on."""

    decay: float | None = fixed(None)
    """Decay per step; null keeps no average."""
