"""The four questions that a collection asks a model; each gives what was found of every query."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from clipscale.data.associations import Association
from clipscale.data.evalset import EvalItem, EvalSet
from clipscale.errors import DataError
from clipscale.evals.outcomes import Associated, Classified, Labelled, Outcome, Retrieved, digest
from clipscale.evals.protocol import EvalContext
from clipscale.evals.ranking import jaccard
from clipscale.evals.retrieval import Matches, recall
from clipscale.evals.zeroshot import classify, prompt_features


@dataclass(frozen=True)
class Asked:
    """What was found of every query; how many samples could not be used, by reason; ``strange``: of yes-or-no labels
    that samples list, those that were not asked for, and how often."""

    outcome: Outcome
    bad: Counter[str]
    strange: Counter[str] = field(default_factory=Counter)


def ask_classes(
    context: EvalContext, images: EvalSet, names: Sequence[str], templates: Sequence[str], clips: bool = False
) -> Asked:
    """Zero-shot classification; the items of ``images`` carry the class index, a group (or None), and their clip.

    Raises DataError for a label that no class has.
    """
    features, items, bad = _encode(context, images, clips)
    labels = torch.tensor([item.fields[0] for item in items])
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(names):
        raise DataError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, and there are {len(names)} class names; "
            "--classes FILE names those of this data set"
        )
    found = classify(features, prompt_features(context, names, templates), labels, context.scale)
    arrays: dict[str, Any] = {
        "label": labels.numpy(), "answer": found.answers.numpy(), "top1": found.hits[1].numpy(),
        "top5": found.hits[5].numpy(), "confidence": found.confidence.numpy(),
    }  # fmt: skip
    groups = [item.fields[1] for item in items]
    if any(group is not None for group in groups):
        numbers = {group: number for number, group in enumerate(sorted(set(groups), key=str))}
        arrays["group"] = np.array([numbers[group] for group in groups])
    return Asked(Classified(arrays, tuple(names), digest([item.key for item in items])), bad)


def ask_labels(
    context: EvalContext,
    images: EvalSet,
    names: Sequence[str],
    positive: Sequence[str],
    negative: Sequence[str],
    clips: bool = False,
) -> Asked:
    """Yes or no for each of L labels; the items of ``images`` carry L numbers (1 yes, 0 no, NaN unknown), paired with
    the names of those labels of theirs that are none of the L.

    The score of a label is the similarity with its positive prompts, less that with its negative ones where there are
    some (Tiu et al. 2022, whose softmax over the pair has the same order).
    """
    features, items, bad = _encode(context, images, clips)
    scores = features @ prompt_features(context, names, positive).T
    if negative:
        scores = scores - features @ prompt_features(context, names, negative).T
    labels = np.array([item.fields[0][0] for item in items], dtype=np.float64)
    arrays = {"score": scores.double().numpy(), "label": labels}
    strange = Counter(name for item in items for name in item.fields[0][1])
    return Asked(Labelled(arrays, tuple(names), digest([item.key for item in items])), bad, strange)


def ask_pairs(context: EvalContext, images: EvalSet, clips: bool = False) -> Asked:
    """Retrieval both ways; the items of ``images`` carry the texts that are right for them.

    Image to text ranks the distinct texts of all items, and a hit is any right one; text to image ranks all images for
    each text, and a hit is any image it is right for.
    """
    features, items, bad = _encode(context, images, clips)
    matches = Matches.of([item.fields[0] for item in items])
    text = context.encode_captions(matches.texts)
    ways = {
        "i2t": recall(features, text, matches.right),
        "t2i": recall(text, features, matches.right.flip(0)),
    }
    arrays = {f"{way}_r{k}": hits.numpy() for way, found in ways.items() for k, hits in found.hits.items()}
    arrays |= {f"{way}_r{k}_chance": luck.numpy() for way, found in ways.items() for k, luck in found.chance.items()}
    return Asked(Retrieved(arrays, (), digest([*(item.key for item in items), *matches.texts])), bad)


def ask_associations(
    context: EvalContext, images: EvalSet, questions: Sequence[Association], templates: Sequence[str] | None
) -> Asked:
    """Choose, for each cue, as many of its candidates as go with it: those nearest to its prompts.

    Without ``templates`` the prompt is the cue behind its article, "An owl". A question of which an image cannot be
    used is left out, and counted by the reason. The score is the Jaccard index of WinoGAViL (Bitton et al. 2022,
    arXiv:2207.12576). Raises DataError where no question is left.
    """
    features, items, bad = context.encode_images(images)
    row = {item.place: place for place, item in enumerate(items)}
    cues = list(dict.fromkeys(question.cue for question in questions))
    number = {cue: place for place, cue in enumerate(cues)}
    if templates is None:
        text = prompt_features(context, [_with_article(cue) for cue in cues], ["{}"])
    else:
        text = prompt_features(context, cues, templates)
    reasons = {item.place: item.reason for item in bad}
    asked, unusable = [], Counter[str]()
    for question in questions:
        missing = [place for place in question.candidates if place not in row]
        if missing:
            unusable[reasons[missing[0]]] += 1
        else:
            asked.append(question)
    if not asked:
        raise DataError(f"each of {len(questions)} questions has an image that cannot be used: {', '.join(unusable)}")
    found: dict[str, list[float]] = {"jaccard": [], "jaccard_chance": [], "candidates": []}
    for question in asked:
        chosen = features[[row[place] for place in question.candidates]].double()
        scores = (chosen * text[number[question.cue]].double()).sum(1)  # the same for images that are the same
        found["jaccard"].append(jaccard(scores.tolist(), question.right))
        found["jaccard_chance"].append(jaccard([0.0] * len(scores), question.right))
        found["candidates"].append(len(scores))
    arrays = {name: np.array(values) for name, values in found.items()}
    keys = [repr((one.cue, [items[row[place]].key for place in one.candidates], one.right)) for one in asked]
    return Asked(Associated(arrays, (), digest(keys)), unusable)


def _with_article(cue: str) -> str:
    return f"{'An' if cue[0].lower() in 'aeiou' else 'A'} {cue.lower()}"


def _encode(context: EvalContext, images: EvalSet, clips: bool) -> tuple[torch.Tensor, list[EvalItem], Counter[str]]:
    features, items, bad = context.encode_images(images)
    if clips:
        features, items = pool_clips(features, items)
    return features, items, Counter(item.reason for item in bad)


def pool_clips(features: torch.Tensor, items: Sequence[EvalItem]) -> tuple[torch.Tensor, list[EvalItem]]:
    """One feature per clip, Float[V, D]: the normalised mean of those of its frames, and its first frame's item.

    The last field of an item names its clip; frames of one clip need not follow each other.
    """
    order = {name: place for place, name in enumerate(dict.fromkeys(item.fields[-1] for item in items))}
    places = torch.tensor([order[item.fields[-1]] for item in items])
    means = torch.zeros(len(order), features.shape[1]).index_add_(0, places, features)
    first: dict[str, EvalItem] = {}
    for item in items:
        first.setdefault(item.fields[-1], item)
    return torch.nn.functional.normalize(means, dim=-1), [first[name] for name in order]
