"""Validation loss and retrieval both ways, on pairs of which several may show the same thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clipscale.data.evalset import EvalSet
from clipscale.distributed.collectives import rank, total, world_size
from clipscale.evals.examples import Pairs
from clipscale.evals.protocol import EvalContext
from clipscale.evals.ranking import chance, hits

KS = (1, 5, 10)
CHUNK = 1024  # queries ranked at a time, so that memory does not grow with their square


@dataclass(frozen=True)
class Matches:
    """The distinct texts of N items, T of them, and which are right: ``right`` Int64[2, P] of (image, text)."""

    texts: list[str]
    right: torch.Tensor

    @staticmethod
    def of(answers: Sequence[Sequence[str]]) -> Matches:
        """From the texts that are right for each image."""
        texts = list(dict.fromkeys(text for each in answers for text in each))
        place = {text: i for i, text in enumerate(texts)}
        pairs = {(i, place[text]) for i, each in enumerate(answers) for text in each}
        return Matches(texts, torch.tensor(sorted(pairs)).T)


@dataclass(frozen=True)
class Recall:
    """Of each query, Float64[Q]: whether it is a hit at each k, and the chance that a random ranking makes it one."""

    hits: dict[int, torch.Tensor]
    chance: dict[int, torch.Tensor]


def recall(queries: torch.Tensor, candidates: torch.Tensor, right: torch.Tensor) -> Recall:
    """Rank ``candidates`` Float[C, D] for ``queries`` Float[Q, D]; ``right`` Int64[2, P] holds the right pairs.

    A query is a hit at k when any of its right candidates is among the first k.
    """
    found = []
    for start in range(0, len(queries), CHUNK):
        scores = queries[start : start + CHUNK] @ candidates.T
        here = right[:, (right[0] >= start) & (right[0] < start + CHUNK)]
        is_right = torch.zeros_like(scores, dtype=torch.bool)
        is_right[here[0] - start, here[1]] = True
        found.append(hits(scores, is_right, KS))
    luck = chance(torch.bincount(right[0], minlength=len(queries)), len(candidates), KS)
    return Recall({k: torch.cat([one[k] for one in found]) for k in KS}, luck)


@dataclass(frozen=True)
class RetrievalEvaluator:
    """``val/loss`` and ``val/retrieval/{i2t,t2i}_r{1,5,10}``.

    The items of ``data`` carry two fields, their captions and the texts that are right for them: all captions, or the
    one name of what they show. Image to text ranks the distinct texts of all items, and a hit is any right one; text to
    image ranks all images for each text, and a hit is any image it is right for. The loss is that of the first
    captions; it depends on the batch it is taken over, and ``loss_batch_size`` is about that of training.
    """

    data: EvalSet
    loss_batch_size: int

    @property
    def measures(self) -> tuple[str, ...]:
        """See :class:`Evaluator`."""
        return ("val/loss", *(f"val/retrieval/{way}_r{k}" for way in ("i2t", "t2i") for k in KS))

    def run(self, context: EvalContext) -> dict[str, float]:
        """Evaluate; raises nothing for bad samples, which are counted as ``val/bad_samples``."""
        image, items, bad = context.encode_images(self.data)
        captions = [item.fields[0][0] for item in items]
        matches = Matches.of([item.fields[1] for item in items])
        metrics = {"val/loss": self._loss(context, image, context.encode_captions(captions))}
        text = context.encode_captions(matches.texts)
        context.examples.pairs = Pairs(self.data, items, matches.texts, image, text, matches.right)
        metrics |= _named("i2t", recall(image, text, matches.right))
        metrics |= _named("t2i", recall(text, image, matches.right.flip(0)))
        return metrics | {"val/bad_samples": float(len(bad))}

    def _loss(self, context: EvalContext, image: torch.Tensor, text: torch.Tensor) -> float:
        # Nearly equal chunks, none left out, each about a training batch.
        chunks = max(1, round(len(image) / self.loss_batch_size))
        pairs = zip(image.tensor_split(chunks), text.tensor_split(chunks), strict=True)
        mine = torch.zeros((), dtype=torch.float64, device=context.device)
        for number, (x, y) in enumerate(pairs):
            if number % world_size() == rank():
                mine += context.loss(x.to(context.device), y.to(context.device)) * len(x)
        return total(mine).item() / len(image)


def _named(way: str, found: Recall) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for k in KS:
        metrics[f"val/retrieval/{way}_r{k}"] = found.hits[k].mean().item()
        metrics[f"val/retrieval/{way}_r{k}_chance"] = found.chance[k].mean().item()
    return metrics
