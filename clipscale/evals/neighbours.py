"""Nearest neighbours among features: classification by their vote, and the nearest one itself."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from clipscale.evals.linear_probe import Labelled

KS = (1, 2, 5, 10, 20, 50, 100, 200)
TEMPERATURE = 0.07
CHUNK = 1024  # queries compared at a time, and fewer with so many images that their cosines would fill the memory
COSINES = 1 << 27


def votes(train: Labelled, queries: torch.Tensor, ks: tuple[int, ...], classes: int) -> dict[int, torch.Tensor]:
    """For each k, what the k nearest training images give each class, Float[Q, K].

    A neighbour of cosine s gives exp((s - 1) / 0.07) to its own class (Wu et al. 2018, arXiv:1805.01978, section 3.4;
    Caron et al. 2021). ``queries`` Float[Q, D] and the training features are normalised here.
    """
    parts = list(_votes(train, queries, ks, classes))
    return {k: torch.cat([part[k] for part in parts]) for k in ks}


def _votes(
    train: Labelled, queries: torch.Tensor, ks: tuple[int, ...], classes: int
) -> Iterator[dict[int, torch.Tensor]]:
    known = F.normalize(train.features, dim=-1)
    for some in F.normalize(queries, dim=-1).split(_at_once(len(known))):
        near = (some @ known.T).topk(min(max(ks), len(known)), dim=1)
        weights, labels = ((near.values - 1) / TEMPERATURE).exp().double(), train.labels[near.indices]
        nothing = weights.new_zeros(len(some), classes)
        yield {k: nothing.scatter_add(1, labels[:, :k], weights[:, :k]) for k in ks}


def choose_k(train: Labelled, held_out: Labelled, classes: int) -> tuple[int, dict[int, float]]:
    """The number of neighbours that classifies held-out images best, and the accuracy of each; the fewest of equals."""
    ks = tuple(k for k in KS if k <= len(train.labels))
    right = dict.fromkeys(ks, 0)
    labels = held_out.labels.split(_at_once(len(train.labels)))
    for part, answers in zip(_votes(train, held_out.features, ks, classes), labels, strict=True):
        right = {k: right[k] + int((part[k].argmax(dim=1) == answers).sum()) for k in ks}
    scores = {k: count / len(held_out.labels) for k, count in right.items()}
    return max(ks, key=lambda k: (scores[k], -k)), scores


def nearest(train: torch.Tensor, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine Float[Q] and place Int64[Q] of the nearest of Float[N, D] to each of Float[Q, D]; both are normalised."""
    best = [(some @ train.T).max(dim=1) for some in queries.split(_at_once(len(train)))]
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])


def _at_once(known: int) -> int:
    return min(CHUNK, max(1, COSINES // known))
