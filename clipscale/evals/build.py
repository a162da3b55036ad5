"""The evaluators that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from clipscale.config.data import Data
from clipscale.data.evalset import EvalSet
from clipscale.data.manifest import expand_shards
from clipscale.data.samples import Member, find_captions, find_field
from clipscale.errors import DataError
from clipscale.evals.protocol import Evaluator
from clipscale.evals.retrieval import RetrievalEvaluator
from clipscale.evals.zeroshot import Classes, ZeroshotEvaluator


def build_evaluators(data: Data, image_size: int, loss_batch_size: int) -> list[Evaluator]:
    """Evaluators for ``data.val`` and ``data.zeroshot``; a set whose shards are null has none.

    Raises DataError for shards or class files that are not there.
    """
    found: list[Evaluator] = []
    if data.val.shards:
        fields = (partial(_first_caption, key=data.caption_key), partial(_group, data=data))
        pairs = _eval_set(data, data.val.shards, "data.val.shards", image_size, fields)
        found.append(RetrievalEvaluator(pairs, loss_batch_size))
    if data.zeroshot.shards:
        classes = Classes.load(Path(data.root or ".", str(data.zeroshot.classes)).expanduser())
        label = (partial(find_field, key=data.zeroshot.label_key),)
        images = _eval_set(data, data.zeroshot.shards, "data.zeroshot.shards", image_size, label)
        found.append(ZeroshotEvaluator(images, classes))
    return found


def _eval_set(data: Data, shards: Any, key: str, size: int, fields: tuple[Callable[[Member], Any], ...]) -> EvalSet:
    files = expand_shards(shards, data.root, key)
    evalset = EvalSet(files, data.image_keys, size, data.max_pixels, fields)
    if not len(evalset):
        raise DataError(f"{key}={shards} holds no samples; null turns this evaluation off")
    return evalset


def _first_caption(sample: Member, key: str) -> str:
    return find_captions(sample, key)[0]


def _group(sample: Member, data: Data) -> Any:
    key = data.val.group_key
    return _first_caption(sample, data.caption_key) if key == "caption" else find_field(sample, key)
