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

    The items of ``data`` carry two fields, a caption and a group. Image to text ranks the distinct groups, and a hit is
    the image's own; text to image ranks all images for each group, and a hit is any image of it. The loss
    depends on the batch it is taken over: ``loss_batch_size`` is about that of training.
    """

    data: EvalSet
    loss_batch_size: int

    def run(self, context: EvalContext) -> dict[str, float]:
        """Evaluate; raises nothing for bad samples, which are counted as ``val/bad_samples``."""
        image, items, bad = context.encode_images(self.data)
        captions = [item.fields[0] for item in items]
        names = [str(item.fields[1]) for item in items]
        groups = list(dict.fromkeys(names))
        place = {name: i for i, name in enumerate(groups)}
        of_image = torch.tensor([place[name] for name in names])
        metrics = {"val/loss": self._loss(context, image, context.encode_captions(captions))}
        text = context.encode_captions(groups)
        metrics |= self._recall("i2t", image, text, of_image, by_image=True)
        metrics |= self._recall("t2i", text, image, of_image, by_image=False)
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
        self,
        way: str,
        queries: torch.Tensor,
        candidates: torch.Tensor,
        of_image: torch.Tensor,
        by_image: bool,
    ) -> dict[str, float]:
        found = dict.fromkeys(KS, 0.0)
        for start in range(0, len(queries), CHUNK):
            scores = queries[start : start + CHUNK] @ candidates.T
            numbers = torch.arange(start, start + len(scores))[:, None]
            right = of_image[numbers] == torch.arange(len(candidates)) if by_image else of_image == numbers
            for k, count in hits(scores, right, KS).items():
                found[k] += count
        counts = torch.ones(1, dtype=torch.int64) if by_image else torch.bincount(of_image)
        luck = chance(counts, len(candidates), KS)
        metrics: dict[str, float] = {}
        for k in KS:
            metrics[f"val/retrieval/{way}_r{k}"] = found[k] / len(queries)
            metrics[f"val/retrieval/{way}_r{k}_chance"] = luck[k]
        return metrics
