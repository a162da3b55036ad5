"""Zero-shot classification with prompt ensembles (CLIP paper, section 3.1)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from clipscale.data.evalset import EvalSet
from clipscale.data.io import ShardStore
from clipscale.errors import DataError
from clipscale.evals.examples import Answers
from clipscale.evals.prompts import fill
from clipscale.evals.protocol import EvalContext
from clipscale.evals.ranking import hits

KS = (1, 5)
CHUNK = 1024  # images scored at a time


@dataclass(frozen=True)
class Classes:
    """Class names, prompt templates with ``{}``, and baselines by name that are printed beside the score."""

    names: list[str]
    templates: list[str]
    baselines: dict[str, float]

    @staticmethod
    def load(store: ShardStore, path: str) -> Classes:
        """Read a JSON file with ``classnames`` and ``templates``; raises DataError when it is not one."""
        try:
            with store.open(path) as file:
                content: Any = json.loads(file.read())
            names = [str(name) for name in content["classnames"]]
            templates = [str(template) for template in content["templates"]]
            usable = all("{}" in template and template.format("name") for template in templates)
            baselines = {str(name): float(score) for name, score in content.get("baselines", {}).items()}
        except (DataError, OSError) as error:
            raise DataError(f"data.zeroshot.classes: {error}; set it, or data.zeroshot.shards=null") from None
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise DataError(
                f"data.zeroshot.classes={path} needs a list classnames, and a list templates with one {{}} each "
                f"({type(error).__name__}: {error})"
            ) from None
        if not names or not templates or not usable:
            raise DataError(f"data.zeroshot.classes={path}: classnames, and templates that hold {{}}, are needed")
        return Classes(names, templates, baselines)

    def check(self, labels: Sequence[int]) -> None:
        """Raise DataError unless every label is the number of a class."""
        if labels and not 0 <= min(labels) <= max(labels) < len(self.names):
            raise DataError(
                f"zero-shot labels run from {min(labels)} to {max(labels)}, there are {len(self.names)} class names; "
                "data.zeroshot.classes and data.zeroshot.shards do not belong together"
            )

    def agree(self, names: Sequence[str]) -> None:
        """Raise DataError unless these are the classes, in their order."""
        if list(names) != self.names:
            differing = [f"{a!r} is not {b!r}" for a, b in zip(self.names, names, strict=False) if a != b]
            first = differing[0] if differing else f"it has {len(self.names)} names"
            raise DataError(
                f"data.zeroshot.classes are not the {len(names)} classes of the model's head ({first}); name the file "
                "that it was trained with"
            )

    def embed(self, context: EvalContext) -> torch.Tensor:
        """Float[C, D] on the CPU: of each class, the normalised mean of its prompts' features."""
        return prompt_features(context, self.names, self.templates)


def prompt_features(context: EvalContext, names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """Float[C, D] on the CPU: of each class, the normalised mean of its prompts' features (CLIP, section 3.1.4)."""
    prompts = [fill(template, name) for name in names for template in templates]
    features = context.encode_captions(prompts).unflatten(0, (len(names), -1)).mean(dim=1)
    return torch.nn.functional.normalize(features, dim=-1)


@dataclass(frozen=True)
class Classification:
    """Of N labelled images: ``labels`` and ``answers`` Int64[N], ``hits`` Float64[N] at each k, and the probability of
    the answer, ``confidence`` Float64[N]."""

    labels: torch.Tensor
    answers: torch.Tensor
    hits: dict[int, torch.Tensor]
    confidence: torch.Tensor


def classify(image: torch.Tensor, classes: torch.Tensor, labels: torch.Tensor, scale: float) -> Classification:
    """Answer Float[N, D] images with the nearest of Float[C, D] classes; ``scale`` is the temperature's multiplier."""
    answers, confidence, found = [], [], []
    for pixels, right in zip(image.split(CHUNK), labels.split(CHUNK), strict=True):
        scores = pixels @ classes.T
        answers.append(scores.argmax(dim=1))
        confidence.append((scale * scores.double()).softmax(dim=1).amax(dim=1))
        found.append(hits(scores, right[:, None] == torch.arange(len(classes)), KS))
    joined = {k: torch.cat([one[k] for one in found]) for k in KS}
    return Classification(labels, torch.cat(answers), joined, torch.cat(confidence))


@dataclass(frozen=True)
class ZeroshotEvaluator:
    """``val/zeroshot/top{1,5}``; the items of ``data`` carry one field, the class index."""

    data: EvalSet
    classes: Classes

    @property
    def measures(self) -> tuple[str, ...]:
        """See :class:`Evaluator`."""
        return tuple(f"val/zeroshot/top{k}" for k in KS)

    def run(self, context: EvalContext) -> dict[str, float]:
        """Evaluate. Raises DataError for a label outside the classes."""
        image, items, bad = context.encode_images(self.data)
        self.classes.check([item.fields[0] for item in items])
        labels = torch.tensor([item.fields[0] for item in items])
        count = len(self.classes.names)
        found = classify(image, self.classes.embed(context), labels, context.scale)
        context.examples.answers = Answers(self.classes.names, labels, found.answers)
        metrics = {"val/zeroshot/bad_samples": float(len(bad))}
        for k in KS:
            metrics[f"val/zeroshot/top{k}"] = found.hits[k].mean().item()
            metrics[f"val/zeroshot/top{k}_chance"] = min(k / count, 1.0)
        for name, value in self.classes.baselines.items():
            metrics[f"val/zeroshot/top1_{name.replace(' ', '_')}"] = value
        return metrics
