"""The evaluators that a configuration asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from clipscale.config.data import Data
from clipscale.config.model import Model, Vision
from clipscale.data.collections import Shards
from clipscale.data.evalset import BadItem, EvalSet
from clipscale.data.io import ShardStore, resolve
from clipscale.data.manifest import expand_shards
from clipscale.data.samples import Member, find_captions, find_field, find_label
from clipscale.errors import DataError
from clipscale.evals.classifier import ClassifierEvaluator
from clipscale.evals.protocol import Evaluator
from clipscale.evals.retrieval import RetrievalEvaluator
from clipscale.evals.zeroshot import Classes, ZeroshotEvaluator

PROBED = 16  # samples read before training, so that a wrong key is known then


def build_evaluators(data: Data, store: ShardStore, model: Model, loss_batch_size: int) -> list[Evaluator]:
    """Evaluators for ``data.val`` and ``data.zeroshot``; a set whose shards are null has none.

    On labelled images, a model with a head is asked for its classes, another one for the best prompt. Raises DataError
    for shards or class files that are not there, samples of which none can be used, labels outside the classes, and
    classes that are not the head's.
    """
    vision = model.vision
    found: list[Evaluator] = []
    if data.val.shards:
        fields = (partial(find_captions, caption_key=data.caption_key), partial(_answers, data=data))
        pairs = _eval_set(data, store, data.val.shards, "data.val.shards", vision, fields)
        found.append(RetrievalEvaluator(pairs, loss_batch_size))
    if data.zeroshot.shards:
        classes = Classes.load(store, resolve(str(data.zeroshot.classes), data.root))
        label = (partial(find_label, key=data.zeroshot.label_key),)
        images = _eval_set(data, store, data.zeroshot.shards, "data.zeroshot.shards", vision, label)
        classes.check([item.fields[0] for item in images.read(0, PROBED) if not isinstance(item, BadItem)])
        if model.classes is None:
            found.append(ZeroshotEvaluator(images, classes))
        else:
            classes.agree(model.classes)
            found.append(ClassifierEvaluator(images, classes))
    return found


def damaged_shards(evaluators: Sequence[Evaluator]) -> dict[str, str]:
    """What is wrong with the held-out archives in which something is, by file name."""
    return {name: damage for evaluator in evaluators for name, damage in evaluator.data.damaged.items()}


def _eval_set(
    data: Data, store: ShardStore, shards: Any, key: str, vision: Vision, fields: tuple[Callable[[Member], Any], ...]
) -> EvalSet:
    files = expand_shards(shards, data.root, key, store, data.index)
    evalset = EvalSet(Shards(files), data.image_keys, vision, data.max_pixels, fields)
    if not len(evalset):
        raise DataError(f"{key}={shards} holds no samples; null turns this evaluation off")
    bad: Counter[str] = Counter()
    for start in range(0, len(evalset), PROBED):
        probed = evalset.read(start, start + PROBED)
        bad += Counter(item.reason for item in probed if isinstance(item, BadItem))
        if bad.total() < start + len(probed):
            return evalset
    reasons = ", ".join(f"{count} x {reason}" for reason, count in bad.items())
    raise DataError(
        f"{key}={shards}: none of the {len(evalset)} samples can be used ({reasons}); check data.image_keys, "
        "data.caption_key, data.val.group_key and data.zeroshot.label_key; null turns this evaluation off"
    )


def _answers(sample: Member, data: Data) -> list[str]:
    key = data.val.group_key
    return find_captions(sample, data.caption_key) if key == "caption" else [str(find_field(sample, key))]
