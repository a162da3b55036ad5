"""What an evaluation saw and said, to look at: a few answers with their pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from clipscale.data.evalset import EvalItem, EvalSet

ASKED, FOUND = 8, 6  # captions, and images for each
PAIRS = 12  # whose similarities are shown
CLASSES = 16  # that are shown of the confusion
SIDE = 96  # pixels of a picture


@dataclass(frozen=True)
class Pairs:
    """Held-out images and texts as retrieval ranks them.

    ``image`` Float[N, D] and ``text`` Float[T, D] are normalised; ``right`` Int[2, P] holds the right pairs (image,
    text); ``items`` are the N images without pixels, whose captions stand in their first field.
    """

    data: EvalSet
    items: Sequence[EvalItem]
    texts: Sequence[str]
    image: torch.Tensor
    text: torch.Tensor
    right: torch.Tensor


@dataclass(frozen=True)
class Answers:
    """Class indices Int[N] that labelled images have, and those that they were given."""

    names: Sequence[str]
    labels: torch.Tensor
    answers: torch.Tensor


@dataclass
class Examples:
    """Evaluators leave here what they have at hand; only :meth:`shown` reads pictures."""

    pairs: Pairs | None = None
    answers: Answers | None = None

    def shown(self) -> dict[str, Any]:
        """Plain values: ``retrieval``, ``similarity`` and ``confusion``, of what there is; pictures are data URIs.

        The same captions are asked each time, so that one can see a model learn. Raises what reading the data raises.
        """
        found: dict[str, Any] = {}
        if self.pairs is not None:
            found = {"retrieval": _retrieval(self.pairs), "similarity": _similarity(self.pairs)}
        if self.answers is not None:
            found["confusion"] = _confusion(self.answers)
        return found


def _retrieval(pairs: Pairs) -> list[dict[str, Any]]:
    right = {(int(image), int(text)) for image, text in pairs.right.T}
    pictures: dict[int, str] = {}
    shown = []
    for asked in _spread(len(pairs.texts), ASKED):
        scores = pairs.image @ pairs.text[asked]
        best = scores.topk(min(FOUND, len(scores)))
        found = [
            {"image": _picture(pairs, place, pictures), "score": score, "right": (place, asked) in right,
             "caption": str(pairs.items[place].fields[0][0])}
            for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]  # fmt: skip
        shown.append({"caption": pairs.texts[asked], "found": found})
    return shown


def _similarity(pairs: Pairs) -> dict[str, Any]:
    first = {int(image): int(text) for image, text in pairs.right.T.flip(0)}  # of several right texts, the first
    images = [place for place in _spread(len(pairs.items), PAIRS) if place in first]
    texts = [first[place] for place in images]
    values = (pairs.text[texts] @ pairs.image[images].T).tolist()
    return {"captions": [pairs.texts[text] for text in texts], "values": values}


def _confusion(answers: Answers) -> dict[str, Any]:
    count = len(answers.names)
    table = torch.bincount(answers.labels * count + answers.answers, minlength=count * count).view(count, count)
    wrong = table - table.diag().diag()
    mistaken = wrong.sum(0) + wrong.sum(1)
    chosen = mistaken.argsort(descending=True, stable=True)[:CLASSES].sort().values
    return {
        "classes": [str(answers.names[i]) for i in chosen.tolist()],
        "counts": table[chosen][:, chosen].tolist(),
        "classes_in_all": count,
    }


def _spread(count: int, wanted: int) -> list[int]:
    """Up to ``wanted`` of the numbers below ``count``, evenly."""
    return [i * count // wanted for i in range(wanted)] if count > wanted else list(range(count))


def _picture(pairs: Pairs, place: int, made: dict[int, str]) -> str:
    """A data URI; images are read once."""
    if place not in made:
        where = pairs.items[place].place
        (item,) = pairs.data.read(where, where + 1)
        assert isinstance(item, EvalItem), "it was usable a moment ago"
        image = Image.fromarray(item.image.permute(1, 2, 0).numpy())
        if max(image.size) > SIDE:
            image.thumbnail((SIDE, SIDE))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        made[place] = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return made[place]
