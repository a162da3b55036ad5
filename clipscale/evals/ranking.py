"""Recall at k under a ranking, and what a random ranking would score.

Ties share their places: a model that maps everything to one point scores chance, not 100 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, isnan, nan

import torch


def hit_probability(k: int, better: torch.Tensor, tied: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Chance that a random order of the ties puts a right answer into the first k.

    Args:
        k: places.
        better: Int[Q], wrong candidates that score above the best right one.
        tied: Int[Q], candidates that score the same as the best right one, itself included.
        right: Int[Q], how many of the tied are right, at least 1.

    Returns:
        Float64[Q].
    """
    places = (k - better).clamp(min=0).minimum(tied)
    missed = torch.ones_like(better, dtype=torch.float64)
    for drawn in range(k):  # draw without replacement until the places are full
        left = (tied - drawn).clamp(min=1)
        wrong = (tied - right - drawn).clamp(min=0)
        missed = torch.where(drawn < places, missed * wrong / left, missed)
    return 1 - missed


def hits(scores: torch.Tensor, right: torch.Tensor, ks: tuple[int, ...]) -> dict[int, torch.Tensor]:
    """Whether each query is a hit at each k, Float64[Q]: ``scores`` Float[Q, C] of C candidates, ``right`` Bool[Q, C].

    A query is a hit at k when any of its right candidates is among the k highest.
    """
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    better, tied = (scores > best).sum(1), (scores == best).sum(1)
    among = ((scores == best) & right).sum(1)
    return {k: hit_probability(k, better, tied, among) for k in ks}


def chance(right_counts: torch.Tensor, candidates: int, ks: tuple[int, ...]) -> dict[int, torch.Tensor]:
    """Chance that a random ranking hits at each k, Float64[Q], where Int[Q] of ``candidates`` are right."""
    nothing = torch.zeros_like(right_counts)
    everything = torch.full_like(right_counts, candidates)
    return {k: hit_probability(k, nothing, everything, right_counts) for k in ks}


def jaccard(scores: Sequence[float], right: Sequence[bool]) -> float:
    """Jaccard index of the right candidates and the highest, of which as many are chosen as are right.

    Its expectation, where candidates of the same score compete for the last places; NaN where a score is NaN. Raises
    ValueError where none is right.
    """
    if any(map(isnan, scores)):
        return nan
    places = sum(right)
    if not places:
        raise ValueError("none of the candidates is right")
    last = sorted(scores, reverse=True)[places - 1]
    sure = [answer for score, answer in zip(scores, right, strict=True) if score > last]
    tied = [answer for score, answer in zip(scores, right, strict=True) if score == last]
    drawn, among = places - len(sure), sum(tied)
    found = 0.0
    for more in range(max(0, drawn - (len(tied) - among)), min(drawn, among) + 1):
        share = comb(among, more) * comb(len(tied) - among, drawn - more) / comb(len(tied), drawn)
        both = sum(sure) + more
        found += share * both / (2 * places - both)
    return found
