"""Generalising or memorising: what every image scores, so that parts of a set can be compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clipscale.data.evalset import EvalItem
from clipscale.data.order import permutation
from clipscale.evals.bootstrap import share_interval, wilson
from clipscale.evals.protocol import EvalContext
from clipscale.evals.retrieval import Matches, recall
from clipscale.evals.zeroshot import Classes, classify

QUARTERS = 4


@dataclass(frozen=True)
class Measured:
    """Float64[N] of N images by score: whether each is a hit; and the chance of a random answer."""

    hits: dict[str, torch.Tensor]
    chance: dict[str, float]


@dataclass(frozen=True)
class Part:
    """The mean of a score over ``count`` images, and its 95 % interval."""

    value: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(hits: torch.Tensor) -> Part | None:
        """Of Float64[N]; None of nothing."""
        if not len(hits):
            return None
        return Part(hits.mean().item(), *share_interval(hits), len(hits))


@dataclass(frozen=True)
class Question:
    """What images are asked for, whose items carry the answer in their first field.

    With ``classes``, their class (zero-shot); without, which of all texts of their set is theirs (image to text).
    """

    context: EvalContext
    classes: Classes | None

    def measure(self, image: torch.Tensor, items: Sequence[EvalItem]) -> Measured:
        """Of Float[N, D] and the N items: ``zeroshot/top1`` and ``top5``, or ``retrieval/i2t_r1`` and ``r5``."""
        answers = [item.fields[0] for item in items]
        if self.classes is None:
            matches = Matches.of(answers)
            found = recall(image, self.context.encode_captions(matches.texts), matches.right)
            hits = {f"retrieval/i2t_r{k}": found.hits[k] for k in (1, 5)}
            return Measured(hits, {f"retrieval/i2t_r{k}": found.chance[k].mean().item() for k in (1, 5)})
        count, labels = len(self.classes.names), torch.tensor(answers)
        answered = classify(image, self.classes.embed(self.context), labels, self.context.scale)
        hits = {f"zeroshot/top{k}": answered.hits[k] for k in (1, 5)}
        return Measured(hits, {f"zeroshot/top{k}": min(k / count, 1.0) for k in (1, 5)})

    def sample(self, items: Sequence[EvalItem], like: Sequence[EvalItem], seed: int) -> torch.Tensor:
        """Places Int64[M] of a random part of ``items``, as hard to answer as the set ``like``.

        Of labelled images, as many. Where texts are ranked, the images of as many different texts: how many there are
        is what makes it hard.
        """
        if self.classes is not None:
            return torch.from_numpy(permutation(len(items), seed)[: len(like)]).sort().values
        texts = list(dict.fromkeys(item.fields[0][0] for item in items))
        wanted = len({item.fields[0][0] for item in like})
        chosen = {texts[place] for place in permutation(len(texts), seed)[:wanted].tolist()}
        return torch.tensor([place for place, item in enumerate(items) if item.fields[0][0] in chosen])


def gap(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float, float]:
    """Mean of Float64[N] hits less that of Float64[M], of other images, and its 95 % interval (Newcombe 1998, "Interval
    estimation for the difference between independent proportions", method 10: from the Wilson intervals of both)."""
    value, other_value = one.mean().item(), other.mean().item()
    (low, high), (other_low, other_high) = wilson(value, len(one)), wilson(other_value, len(other))
    change = value - other_value
    return (
        change,
        change - math.hypot(value - low, other_high - other_value),
        change + math.hypot(high - value, other_value - other_low),
    )


def quarters(values: torch.Tensor) -> list[torch.Tensor]:
    """Places Int64 of the lowest quarter of Float[N], of the next, and so on."""
    return list(values.argsort(stable=True).tensor_split(QUARTERS))
