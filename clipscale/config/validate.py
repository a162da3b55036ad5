"""Cross-field checks: every mistake at once, each with the override that mends it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from clipscale.config.data import Builtin, Data
from clipscale.config.model import HeadStart, ImageProjection, Text
from clipscale.config.optim import Loss, LossName, PrecisionName
from clipscale.config.running import RECOMPUTED, Strategy
from clipscale.config.schema import Config
from clipscale.errors import ConfigError

MAX_STREAMS = 512


def default_streams(global_batch_size: int, world: int = 1) -> int:
    """The largest divisor of the global batch up to 512, so that many numbers of ranks may share the order.

    A multiple of ``world``, the number of processes that a run begins with, where the batch is one.
    """
    unit = world if global_batch_size % world == 0 else 1
    most = min(max(MAX_STREAMS, world), global_batch_size)
    return next(v for v in range(most // unit * unit, 0, -unit) if global_batch_size % v == 0)


def usable_processes(streams: int, world: int) -> int:
    """How many of ``world`` processes can share the streams evenly: the largest divisor of their number."""
    return next(count for count in range(min(world, streams), 0, -1) if streams % count == 0)


def validate(config: Config, world: int | None = None) -> None:
    """Check that this configuration can be run, by ``world`` processes, or those that the cluster has.

    Raises ConfigError that lists all that is wrong.
    """
    if found := all_mistakes(config, world):
        raise ConfigError.of(found)


def all_mistakes(config: Config, world: int | None = None) -> list[str]:
    """What is wrong with a configuration, for so many processes, or those that the cluster has; each with what mends
    it."""
    checks = (_sizes, _batch, _evaluation, _checkpoint, _microbatches, _data, _text, _loss, _training, _lock)
    found = [mistake for check in (*checks, _classifier) for mistake in check(config)]
    started = max(1, world or config.cluster.nodes * config.cluster.processes_per_node)
    streams = config.data.streams
    found += _parallel(config, usable_processes(streams, started) if streams and streams > 0 else started)
    return found


def _positive(**values: float | int) -> Iterator[str]:
    for key, value in values.items():
        if not value > 0:
            yield f"{key.replace('__', '.')}={value} must be above 0"


def _sizes(config: Config) -> Iterator[str]:
    yield from _positive(
        global_batch_size=config.global_batch_size,
        total_samples=config.total_samples,
        optim__lr=config.optim.lr,
        cluster__nodes=config.cluster.nodes,
        cluster__processes_per_node=config.cluster.processes_per_node,
        eval__batch_size=config.eval.batch_size,
        tracking__log_every_steps=config.tracking.log_every_steps,
        checkpoint__keep_last=config.checkpoint.keep_last,
        storage__timeout_s=config.storage.timeout_s,
        storage__cache_gib=config.storage.cache_gib,
        distributed__timeout_s=config.distributed.timeout_s,
        eval__timeout_s=config.eval.timeout_s,
        loss__init_logit_scale=config.loss.init_logit_scale,
        optim__eps=config.optim.eps,
        model__context_length=config.model.context_length,
        model__embed_dim=config.model.embed_dim,
        model__vision__image_size=config.model.vision.image_size,
        model__text__width=config.model.text.width,
        model__text__layers=config.model.text.layers,
        model__text__vocab_size=config.model.text.vocab_size,
        model__text__norm_eps=config.model.text.norm_eps,
        model__text__mlp_ratio=config.model.text.mlp_ratio,
    )
    vision = config.model.vision
    given = {"patch_size": vision.patch_size, "width": vision.width, "layers": vision.layers}
    yield from _positive(**{f"model__vision__{key}": value for key, value in given.items() if value is not None})
    if vision.patch_size and vision.patch_size > 0 and vision.image_size % vision.patch_size:
        least = max(1, vision.image_size // vision.patch_size) * vision.patch_size
        yield (
            f"model.vision.image_size={vision.image_size} is no multiple of model.vision.patch_size="
            f"{vision.patch_size}; use model.vision.image_size={least}"
        )
    if config.init.weights == "":
        yield "init.weights is to be given: init.weights=RUN, or open_clip:NAME/TAG; null starts from the seed alone"
    if config.name == "":
        yield "name='' is no name; null makes one of the configuration"
    if not 0 <= config.seed < 2**63:
        yield f"seed={config.seed} must lie between 0 and 2^63 - 1"
    if config.distributed.watchdog_s is not None:
        yield from _positive(distributed__watchdog_s=config.distributed.watchdog_s)
    if config.cluster.max_restarts < 0:
        yield f"cluster.max_restarts={config.cluster.max_restarts} must be 0 or more"
    if config.data.workers < 0:
        yield f"data.workers={config.data.workers} must be 0 or more"
    if config.data.window is not None and config.data.window < 1:
        yield f"data.window={config.data.window} must be 1 or more; null chooses it"


def _evaluation(config: Config) -> Iterator[str]:
    patience = config.eval.patience
    if patience and (patience < 0 or not config.eval.every_samples):
        yield f"eval.patience={patience} must be above 0, with eval.every_samples set; null: train to total_samples"


def _checkpoint(config: Config) -> Iterator[str]:
    given = config.checkpoint
    for key in ("every_samples", "every_minutes", "keep_every_samples"):
        if (getattr(given, key) or 0) < 0:
            yield f"checkpoint.{key}={getattr(given, key)} must be above 0; null turns it off"
    for key in ("dir", "resume_from", "best_metric"):
        if getattr(given, key) == "":
            yield f"checkpoint.{key}='' names nothing; null turns it off"
    if given.dir is not None and "://" in given.dir and not given.dir.startswith(("s3://", "gs://", "az://")):
        yield f"checkpoint.dir={given.dir} cannot be written to; use a directory, s3://…, gs://… or az://…"
    if given.best_metric is not None and not given.best_metric.startswith("val/"):
        yield f"checkpoint.best_metric={given.best_metric} is no metric of an evaluation, e.g. val/zeroshot/top1"


def _batch(config: Config) -> Iterator[str]:
    batch, streams = config.global_batch_size, config.data.streams
    if batch >= 1 and streams is not None and (streams < 1 or batch % streams):
        yield (
            f"data.streams={streams} does not divide global_batch_size={batch}; use data.streams="
            f"{default_streams(batch)}, or, for a run that has them, global_batch_size="
            f"{-(-batch // max(streams, 1)) * max(streams, 1)}"
        )


def _microbatches(config: Config) -> Iterator[str]:
    count, most = config.optim.microbatches, config.optim.max_microbatch
    if count != "auto" and (type(count) is not int or count < 1):
        yield f"optim.microbatches={count}: choose auto or a number, 1 or more"
    if most is not None and most < 1:
        yield f"optim.max_microbatch={most} must be above 0"
    if count != "auto" and most is not None:
        yield f"optim.max_microbatch={most} has no effect without optim.microbatches=auto"
    if count == "auto" and most is None:
        yield "optim.microbatches=auto needs the pairs that a process can hold at once, e.g. optim.max_microbatch=256"


def _data(config: Config) -> Iterator[str]:
    data = config.data
    if data.builtin is Builtin.none and not data.train.shards:
        yield "data.train.shards is empty: give shards, e.g. data.train.shards=/data/{00000..00099}.tar, or data=shapes"
    if data.synthetic.samples < 1:
        yield f"data.synthetic.samples={data.synthetic.samples} must be above 0"
    if data.zeroshot.shards and not data.zeroshot.classes:
        yield "data.zeroshot.shards needs data.zeroshot.classes=FILE.json (or data.zeroshot.shards=null)"
    scale, jitter = data.crop_scale, data.color_jitter
    if scale is not None and (len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1):
        yield f"data.crop_scale={scale} must be two shares of the image, e.g. data.crop_scale=[0.9,1.0], or null"
    if jitter is not None and (len(jitter) != 4 or min(jitter) < 0 or jitter[3] > 0.5):
        yield f"data.color_jitter={jitter} must be four strengths, e.g. data.color_jitter=[0.4,0.4,0.4,0.1]"
    for key, chance in (("color_jitter_prob", data.color_jitter_prob), ("grayscale_prob", data.grayscale_prob)):
        if not 0 <= chance <= 1:
            yield f"data.{key}={chance} must lie in [0, 1]"
    if len(data.crop_ratio) != 2 or not 0 < data.crop_ratio[0] <= data.crop_ratio[1]:
        yield f"data.crop_ratio={data.crop_ratio} must be two aspect ratios, e.g. data.crop_ratio=[0.75,1.3333]"
    budgets = {"max_bad_fraction": data.max_bad_fraction, "max_bad_fraction_per_shard": data.max_bad_fraction_per_shard}
    for key, budget in budgets.items():
        if budget is not None and not 0 <= budget <= 1:
            yield f"data.{key}={budget} must lie in [0, 1]; null is no limit"
    yield from _negatives(data)
    endpoint = config.storage.endpoint_url
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        yield f"storage.endpoint_url={endpoint} is no URL; use storage.endpoint_url=https://{endpoint}"
    elif endpoint is not None and endpoint.startswith("http://") and not config.storage.allow_http:
        yield f"storage.endpoint_url={endpoint} is without TLS; allow it by storage.allow_http=true"
    length = config.tokenizer.context_length
    if length is not None and length > config.model.context_length:
        yield (
            f"tokenizer.context_length={length} exceeds model.context_length={config.model.context_length}; "
            f"use tokenizer.context_length=null or model.context_length={length}"
        )


def _text(config: Config) -> Iterator[str]:
    text, tokenizer = config.model.text, config.tokenizer.name
    if text.hf is None:
        for key in ("hf_pretrained", "hf_pool", "hf_proj"):
            value = getattr(text, key)
            if value != getattr(Text, key):
                yield f"model.text.{key}={getattr(value, 'value', value)} has no effect without model.text.hf=NAME"
    elif not text.hf:
        yield "model.text.hf='' is no name; null is our own text tower"
    elif tokenizer == "clip":
        yield (
            f"tokenizer.name=clip is CLIP's, model.text.hf={text.hf} reads the tokens of its own; use "
            f"tokenizer.name=hf:{text.hf}"
        )
    if tokenizer in ("", "hf:"):
        yield f"tokenizer.name={tokenizer} is no name; e.g. tokenizer.name=clip or tokenizer.name=hf:ORGANISATION/NAME"


def _negatives(data: Data) -> Iterator[str]:
    if data.negatives_per_sample < 1:
        yield f"data.negatives_per_sample={data.negatives_per_sample} must be 1 or more"
    if data.negatives_key is not None and data.negatives_key in ("", data.caption_key):
        yield f"data.negatives_key={data.negatives_key} is not where negatives stand; null for none"
    if data.negatives_key is not None and data.builtin is Builtin.synthetic:
        yield f"data.negatives_key={data.negatives_key}: data=synthetic has no negatives; use data.negatives_key=null"


def _loss(config: Config) -> Iterator[str]:
    loss = config.loss
    for key, share in (("label_smoothing", loss.label_smoothing), ("teacher_weight", loss.teacher_weight)):
        if not 0 <= share <= 1:
            yield f"loss.{key}={share} must lie in [0, 1]"
    if not loss.cache_mb >= 0:
        yield f"loss.cache_mb={loss.cache_mb} must be 0 or more"
    if loss.name is LossName.siglip and loss.label_smoothing:
        yield f"loss.label_smoothing={loss.label_smoothing}: loss=siglip has no labels to smooth"
    if loss.name is not LossName.clip and loss.teachers:
        yield f"loss.teachers={loss.teachers}: only loss=clip has a softmax to distil into"
    if not isinstance(loss.teachers, list):
        yield f"loss.teachers={loss.teachers} must be a list; write loss.teachers=[RUN] or loss.teachers=[]"
        return
    if not loss.teachers and loss.teacher_weight != Loss.teacher_weight:
        yield f"loss.teacher_weight={loss.teacher_weight} has no effect without loss.teachers=[RUN]"
    for teacher in loss.teachers:
        yield from _teacher(config, teacher)


def _teacher(config: Config, teacher: Any) -> Iterator[str]:
    if isinstance(teacher, str):
        return
    keys = set(teacher) if isinstance(teacher, dict) else set()
    members = [teacher[key] for key in ("image", "text") if key in keys]
    scale = teacher.get("logit_scale", 1) if keys else 1
    if (
        len(members) < 2
        or not keys <= {"image", "text", "logit_scale"}
        or not all(isinstance(member, str) for member in members)
        or type(scale) not in (int, float)
        or not 0 < scale < math.inf
    ):
        yield (
            f"loss.teachers: {teacher} is neither a run nor names the members of a teacher's embeddings; write RUN or "
            "{image: MEMBER, text: MEMBER, logit_scale: 100}"
        )
    elif config.data.builtin is Builtin.synthetic:
        yield f"loss.teachers: data=synthetic has no member {teacher['image']}; use loss.teachers=[]"


def _training(config: Config) -> Iterator[str]:
    if config.schedule.warmup_samples >= config.total_samples > 0:
        yield (
            f"schedule.warmup_samples={config.schedule.warmup_samples} is not below total_samples="
            f"{config.total_samples}; use schedule.warmup_samples={config.total_samples // 10}"
        )
    if config.ema.decay is not None and not 0 < config.ema.decay < 1:
        yield f"ema.decay={config.ema.decay} must lie between 0 and 1, e.g. ema.decay=0.999; null turns it off"
    spike = config.divergence.spike_factor
    if spike is not None and not spike > 1:
        yield f"divergence.spike_factor={spike} must be above 1, e.g. divergence.spike_factor=2; null looks for none"
    if config.divergence.max_rollbacks < 0:
        yield f"divergence.max_rollbacks={config.divergence.max_rollbacks} must be 0 or more"
    if not 0 < config.divergence.bad_steps <= config.divergence.within_steps or config.divergence.within_steps < 2:
        yield (
            f"divergence.bad_steps={config.divergence.bad_steps} must lie between 1 and divergence.within_steps="
            f"{config.divergence.within_steps}, which must be 2 or more"
        )
    if config.optim.clip_grad_norm is not None and config.optim.clip_grad_norm <= 0:
        yield f"optim.clip_grad_norm={config.optim.clip_grad_norm} must be above 0; null does not clip"
    if not 0 < config.optim.layer_decay <= 1:
        yield f"optim.layer_decay={config.optim.layer_decay} must lie in (0, 1], e.g. 0.75; 1 gives all layers one rate"
    for key, value in (("beta1", config.optim.beta1), ("beta2", config.optim.beta2)):
        if not 0 <= value < 1:
            yield f"optim.{key}={value} must lie in [0, 1)"
    if not 0 < config.schedule.decay_fraction <= 1:
        yield f"schedule.decay_fraction={config.schedule.decay_fraction} must lie in (0, 1]"
    if config.loss.max_logit_scale is not None and config.loss.max_logit_scale < 1:
        yield f"loss.max_logit_scale={config.loss.max_logit_scale} must be at least 1; null leaves it free"
    if config.schedule.warmup_samples < 0:
        yield f"schedule.warmup_samples={config.schedule.warmup_samples} must be 0 or more"
    if not 0 <= config.schedule.min_lr_ratio <= 1:
        yield f"schedule.min_lr_ratio={config.schedule.min_lr_ratio} must lie in [0, 1]"
    model, vision = config.model, config.model.vision
    if len(model.mean) != 3 or len(model.std) != 3 or min(model.std) <= 0:
        yield f"model.mean={model.mean} and model.std={model.std} must be three numbers each, std above 0"
    if not 0 <= (vision.drop_path or 0) < 1:
        yield f"model.vision.drop_path={vision.drop_path} must lie in [0, 1)"
    if not 0 <= vision.patch_dropout < 1:
        yield f"model.vision.patch_dropout={vision.patch_dropout} must lie in [0, 1), e.g. 0.5"
    elif vision.patch_dropout and not vision.timm.startswith("vit_"):
        yield (
            f"model.vision.patch_dropout={vision.patch_dropout}: model.vision.timm={vision.timm} is no ViT, whose "
            "patches could be left out; use model.vision.patch_dropout=0"
        )
    if vision.heads is not None and (vision.heads < 1 or (vision.width is not None and vision.width % vision.heads)):
        yield f"model.vision.width={vision.width} is not divisible by model.vision.heads={vision.heads}"
    if config.model.text.heads < 1 or config.model.text.width % config.model.text.heads:
        yield (
            f"model.text.width={config.model.text.width} is not divisible by model.text.heads={config.model.text.heads}"
        )
    if not 0 <= config.model.text.pad_id < config.model.text.vocab_size:
        yield (
            f"model.text.pad_id={config.model.text.pad_id} is no token: model.text.vocab_size="
            f"{config.model.text.vocab_size}"
        )


def _parallel(config: Config, world: int) -> Iterator[str]:
    parallel, precision, again = config.parallel, config.precision.name, config.parallel.activation_checkpointing
    strategy = parallel.strategy.value
    if again not in RECOMPUTED and (type(again) is not int or again < 1):
        yield f"parallel.activation_checkpointing={again}: choose {', '.join(RECOMPUTED)} or a number of blocks"
    if parallel.shard_size is not None and parallel.strategy is not Strategy.hsdp:
        yield f"parallel.shard_size={parallel.shard_size} has no effect without parallel.strategy=hsdp"
    elif parallel.shard_size is not None and (parallel.shard_size < 1 or world % parallel.shard_size):
        yield (
            f"parallel.shard_size={parallel.shard_size} does not divide the {world} processes that train, of those "
            "that cluster.nodes and cluster.processes_per_node make; null is those of a node"
        )
    if precision is PrecisionName.bf16 and not parallel.strategy.shards:
        yield (
            f"precision.name=bf16 computes in bf16 over fp32 shards, and parallel.strategy={strategy} has none; use "
            "precision=amp_bf16, or parallel=fsdp or hsdp"
        )
    if parallel.cpu_offload and not parallel.strategy.shards:
        yield f"parallel.cpu_offload=true: {strategy} has no shards to keep on the host; use parallel=fsdp or hsdp"
    if parallel.cpu_offload and precision is PrecisionName.amp_fp16:
        yield "parallel.cpu_offload=true: amp_fp16's gradient scaler wants gradients on the GPU; use precision=amp_bf16"
    if parallel.bf16_reduce and parallel.strategy.shards:
        yield f"parallel.bf16_reduce=true: parallel.strategy={strategy} reduces in fp32; only ddp has the choice"


def _lock(config: Config) -> Iterator[str]:
    lock, trained = config.lock, _pretrained(config)
    classifies = config.loss.name is LossName.cross_entropy
    towers = {"image": (lock.image, lock.image_unlocked_groups), "text": (lock.text, lock.text_unlocked_groups)}
    for tower, (locked, unlocked) in towers.items():
        if unlocked < 0:
            yield f"lock.{tower}_unlocked_groups={unlocked} must be 0 or more"
        elif unlocked and not locked:
            yield f"lock.{tower}_unlocked_groups={unlocked} has no effect without lock.{tower}=true"
        if tower == "text" and classifies:
            continue
        if locked and not trained[tower]:
            yield f"lock.{tower}=true locks weights that nothing has trained; use init.weights=…, or lock.{tower}=false"
    if classifies and lock.text:
        yield "lock.text=true has no effect: loss=cross_entropy trains no text tower; use lock.text=false"
    elif all(locked and not unlocked for locked, unlocked in towers.values()):
        yield "lock.image=true, lock.text=true: nothing is left to train; use lock.text_unlocked_groups=1"
    # The projection is no part of the trunk that would drop patches.
    vision = config.model.vision
    fewest = 1 if vision.proj is ImageProjection.none else 2
    if lock.image and vision.patch_dropout > 0 and lock.image_unlocked_groups < fewest:
        yield (
            f"model.vision.patch_dropout={vision.patch_dropout} has no effect in a locked image tower; use "
            f"model.vision.patch_dropout=0, or lock.image_unlocked_groups={fewest} or more"
        )


def _pretrained(config: Config) -> dict[str, bool]:
    """Which tower starts from weights that were trained; what a path holds is known when it is read."""
    weights, text = config.init.weights, config.model.text
    of_both = weights is not None and not weights.startswith("timm:")
    return {"image": weights is not None, "text": of_both or (text.hf is not None and text.hf_pretrained)}


def _classifier(config: Config) -> Iterator[str]:
    data, loss = config.data, config.loss
    if loss.name is not LossName.cross_entropy:
        if config.model.classes is not None:
            yield "model.classes has no effect without loss=cross_entropy; use model.classes=null"
        if data.label_key is not None:
            yield f"data.label_key={data.label_key} has no effect without loss=cross_entropy"
        return
    if data.val.shards:
        yield (
            f"data.val.shards={data.val.shards}: loss=cross_entropy has no pairs; use data.val.shards=null, and "
            "data.zeroshot.shards for labelled images"
        )
    if config.model.classes is not None:
        return  # a trained one, whose data may lie elsewhere
    if data.builtin is not Builtin.none:
        yield f"data.builtin={data.builtin.value} has no labels to train on; loss=cross_entropy needs data=shards"
    if data.label_key is None:
        yield "loss=cross_entropy needs data.label_key, e.g. data.label_key=json:label or data.label_key=cls"
    if not data.zeroshot.classes:
        yield "loss=cross_entropy needs the names of its classes: data.zeroshot.classes=FILE.json"
    for key, value, off in (
        ("data.negatives_key", data.negatives_key, None),
        ("loss.mask_duplicates", loss.mask_duplicates.value, "none"),
        ("loss.overlap_gather", loss.overlap_gather, False),
    ):
        if value != off:
            yield f"{key}={value}: loss=cross_entropy compares no pairs; use {key}={'null' if off is None else off}"
    if not _pretrained(config)["text"] and config.init.head is HeadStart.zeroshot:
        yield "init.head=zeroshot needs the towers that classify: init.weights=…, or init.head=zeros"
