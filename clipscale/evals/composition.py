"""Composition and counting as scores: which caption belongs to which image, of captions that differ in little.

Ties are drawn at random, so that a model which tells nothing apart scores chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import comb

import torch

from clipscale.data.questions import Question
from clipscale.evals.bootstrap import share_interval
from clipscale.evals.protocol import EvalContext, Images

CHANCE = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}


@dataclass(frozen=True)
class Score:
    """The share of ``count`` questions that were answered right, its 95 % interval, and that of guessing."""

    name: str
    value: float
    low: float
    high: float
    chance: float
    count: int


def answer(context: EvalContext, images: Images, questions: Sequence[Question]) -> tuple[list[Score], int]:
    """Scores of all questions of a kind, and of all kinds together; how many were left out for a bad image.

    Two images with two captions have the three scores of Winoground (Thrush et al. 2022, arXiv:2204.03162, equations
    1 to 3): ``text`` (each image prefers its caption), ``image`` (each caption prefers its image), ``group`` (both).
    One image with several captions, the first right, has ``accuracy`` (Hsieh et al. 2023, SugarCrepe,
    arXiv:2306.14610). Names are ``KIND/SCORE``, and ``all/SCORE`` where there are several kinds.
    """
    image, items, _ = context.encode_images(images)
    row = {item.place: number for number, item in enumerate(items)}
    texts = list(dict.fromkeys(caption for question in questions for caption in question.captions))
    place = {text: number for number, text in enumerate(texts)}
    text = context.encode_captions(texts)
    asked = [question for question in questions if all(number in row for number in question.images)]
    found: dict[str, list[tuple[float, float]]] = {}
    for question in asked:
        ours = text[[place[caption] for caption in question.captions]]
        theirs = image[[row[number] for number in question.images]]
        for name, probability, luck in _judge((ours @ theirs.T).tolist()):
            found.setdefault(f"{question.kind}/{name}", []).append((probability, luck))
            if len({question.kind for question in questions}) > 1:
                found.setdefault(f"all/{name}", []).append((probability, luck))
    names = sorted(found, key=lambda name: name.startswith("all/"))  # else as they came
    return [_score(name, found[name]) for name in names], len(questions) - len(asked)


def _judge(scores: list[list[float]]) -> Iterable[tuple[str, float, float]]:
    """Of one question: each score's name, the probability that it is answered right, and chance.

    ``scores[c][i]`` is that of caption c and image i.
    """
    if len(scores[0]) == 1:
        column = [row[0] for row in scores]
        yield "accuracy", exceed(column[:1], column[1:]), 1 / len(column)
        return
    (a, b), (c, d) = scores
    yield "text", exceed([a], [c]) * exceed([d], [b]), CHANCE["text"]
    yield "image", exceed([a], [b]) * exceed([d], [c]), CHANCE["image"]
    yield "group", exceed([a, d], [b, c]), CHANCE["group"]


def exceed(right: Sequence[float], wrong: Sequence[float]) -> float:
    """The probability that all right scores exceed all wrong ones, when equal ones fall in a random order."""
    low, high = min(right), max(wrong)
    if low != high:
        return float(low > high)
    tied, of_right = [*right, *wrong].count(low), right.count(low)
    return 1 / comb(tied, of_right)


def _score(name: str, answers: Sequence[tuple[float, float]]) -> Score:
    values, chances = torch.tensor(answers, dtype=torch.float64).T
    return Score(name, values.mean().item(), *share_interval(values), chances.mean().item(), len(answers))
