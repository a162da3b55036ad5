"""Validation loss and retrieval both ways, on pairs of which several may show the same thing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clipscale.data.evalset import EvalSet
from clipscale.distributed.collectives import rank, total, world_size
from clipscale.evals.protocol import EvalContext
from clipscale.evals.ranking import chance, hits

KS = (1, 5, 10)
CHUNK = 1024  # queries ranked at a time, so that memory does not grow with their square


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

    def run(self, context: EvalContext) -> dict[str, float]:
        """Evaluate; raises nothing for bad samples, which are counted as ``val/bad_samples``."""
        image, items, bad = context.encode_images(self.data)
        captions = [item.fields[0][0] for item in items]
        texts = list(dict.fromkeys(text for item in items for text in item.fields[1]))
        place = {text: i for i, text in enumerate(texts)}
        pairs = {(i, place[text]) for i, item in enumerate(items) for text in item.fields[1]}
        right = torch.tensor(sorted(pairs)).T  # Int[2, P]: image, text
        metrics = {"val/loss": self._loss(context, image, context.encode_captions(captions))}
        text = context.encode_captions(texts)
        metrics |= self._recall("i2t", image, text, right)
        metrics |= self._recall("t2i", text, image, right.flip(0))
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

    def _recall(
        self, way: str, queries: torch.Tensor, candidates: torch.Tensor, right: torch.Tensor
    ) -> dict[str, float]:
        """Recall of ``queries`` among ``candidates``; ``right`` Int[2, P] holds the right pairs of both."""
        found = dict.fromkeys(KS, 0.0)
        for start in range(0, len(queries), CHUNK):
            scores = queries[start : start + CHUNK] @ candidates.T
            here = right[:, (right[0] >= start) & (right[0] < start + CHUNK)]
            is_right = torch.zeros_like(scores, dtype=torch.bool)
            is_right[here[0] - start, here[1]] = True
            for k, count in hits(scores, is_right, KS).items():
                found[k] += count
        luck = chance(torch.bincount(right[0], minlength=len(queries)), len(candidates), KS)
        metrics: dict[str, float] = {}
        for k in KS:
            metrics[f"val/retrieval/{way}_r{k}"] = found[k] / len(queries)
            metrics[f"val/retrieval/{way}_r{k}_chance"] = luck[k]
        return metrics
