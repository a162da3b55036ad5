"""Accuracy of a classifier's own head on labelled images."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clipscale.data.evalset import EvalSet
from clipscale.distributed.collectives import whole
from clipscale.evals.examples import Answers
from clipscale.evals.protocol import EvalContext
from clipscale.evals.ranking import hits
from clipscale.evals.zeroshot import Classes
from clipscale.models import Classifier

KS = (1, 5)


@dataclass(frozen=True)
class ClassifierEvaluator:
    """``val/loss`` and ``val/top{1,5}`` of a classifier; the items of ``data`` carry one field, the class index."""

    data: EvalSet
    classes: Classes

    @property
    def measures(self) -> tuple[str, ...]:
        """See :class:`Evaluator`."""
        return ("val/loss", *(f"val/top{k}" for k in KS))

    def run(self, context: EvalContext) -> dict[str, float]:
        """Evaluate. Raises DataError for a label outside the classes."""
        assert isinstance(context.model, Classifier)
        image, items, bad = context.encode_images(self.data)
        self.classes.check([item.fields[0] for item in items])
        labels, count = torch.tensor([item.fields[0] for item in items]), len(self.classes.names)
        weight, bias = (whole(p.detach()).cpu() for p in (context.model.head.weight, context.model.head.bias))
        logits = torch.nn.functional.linear(image.to(weight.dtype), weight, bias)
        context.examples.answers = Answers(self.classes.names, labels, logits.argmax(dim=1))
        found = hits(logits, labels[:, None] == torch.arange(count), KS)
        metrics = {"val/loss": torch.nn.functional.cross_entropy(logits, labels).item()}
        for k in KS:
            metrics[f"val/top{k}"] = found[k].mean().item()
            metrics[f"val/top{k}_chance"] = min(k / count, 1.0)
        return metrics | {"val/bad_samples": float(len(bad))}
