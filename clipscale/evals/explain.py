"""Which parts of an image and which words of a caption made their similarity."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clipscale.data.samples import pack
from clipscale.data.tokenizer import Tokenizer
from clipscale.errors import ConfigError
from clipscale.evals.relevance import methods, relevance
from clipscale.models import CLIP

# What stands between spaces; of scripts that put none, each character.
_WORD = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]|[^\s\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]+")


@dataclass(frozen=True)
class Word:
    """A word of a caption, and how much lower the score is without it; below 0, the word speaks against the image."""

    text: str
    value: float


@dataclass(frozen=True)
class Explanation:
    """Why an image and a caption are as similar as they are.

    ``score`` is their cosine similarity, ``against`` those of other captions; ``heat`` Float[rows, columns] is how much
    each cell of the image speaks for the caption (or for it rather than for the others), by ``method``
    (:func:`clipscale.evals.relevance.relevance`); ``words`` are the caption's, in order.
    """

    caption: str
    score: float
    heat: torch.Tensor
    words: tuple[Word, ...]
    against: dict[str, float]
    method: str

    @property
    def explained(self) -> float:
        """What is explained: the score, less the mean of the others where there are some."""
        others = self.against.values()
        return self.score - (sum(others) / len(others) if others else 0.0)


def explain(
    model: CLIP,
    tokenizer: Tokenizer,
    image: torch.Tensor,
    caption: str,
    against: Sequence[str] = (),
    method: str | None = None,
) -> Explanation:
    """Explain the cosine similarity of ``image`` UInt8[3, S, S], as ``preprocess`` gives it, and ``caption``.

    With ``against``, other captions, what is explained is how much more similar the caption is than they are in the
    mean: that shows what tells it from them, and not what they share. ``method`` None is the best that fits the image
    tower. A word's value is the fall of the score when it is taken out, from the other captions too where it stands
    there (erasure: Li, Monroe and Jurafsky 2016, arXiv:1612.08220).

    Raises ConfigError for an empty caption or a method that does not fit, and ClipscaleError for an image tower that
    cannot be explained.
    """
    words = list(_WORD.finditer(caption))
    if not words:
        raise ConfigError("the caption to explain is empty")
    # Row 0 is what was asked, the others what is left of it without each word.
    rows = [
        [caption, *against],
        *([_cut(caption, word), *(_erase(text, word[0]) for text in against)] for word in words),
    ]
    with torch.no_grad():
        pixels = image[None].to(model.logit_scale.device)
        seen = model.encode_image(pixels, normalize=True)[0]
        texts = _encode(model, tokenizer, [text for row in rows for text in row]).unflatten(0, (len(rows), -1))
    directions = contrast(texts[:, 0], texts[:, 1:])
    method = method or methods(model.visual)[0]
    heat = relevance(model.visual, pixels, directions[:1], method)[0].cpu()
    asked, *left = (directions @ seen).tolist()
    first, *others = (texts[0] @ seen).tolist()
    return Explanation(
        caption,
        first,
        heat,
        tuple(Word(word[0], asked - value) for word, value in zip(words, left, strict=True)),
        dict(zip(against, others, strict=True)),
        method,
    )


def contrast(text: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Float[B, D], what tells ``text`` Float[B, D] from ``others`` Float[B, A, D], of which there may be none: its
    product with an image's features is its similarity, less the mean of theirs."""
    return text - others.mean(1) if others.shape[1] else text


def _cut(caption: str, word: re.Match[str]) -> str:
    return " ".join((caption[: word.start()] + caption[word.end() :]).split())


def _erase(caption: str, word: str) -> str:
    """Without the word, wherever it stands."""
    for match in reversed(list(_WORD.finditer(caption))):
        if match[0].casefold() == word.casefold():
            caption = _cut(caption, match)
    return caption


def _encode(model: CLIP, tokenizer: Tokenizer, captions: Sequence[str]) -> torch.Tensor:
    ids, lengths = pack([tokenizer.encode(caption)[0] for caption in captions])
    return model.encode_text(ids.to(model.logit_scale.device), lengths, normalize=True)
