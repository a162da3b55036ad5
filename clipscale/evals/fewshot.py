"""Few-shot linear probes (CLIP paper, figure 6): how many labelled images are worth a model's zero-shot answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clipscale.data.order import permutation
from clipscale.errors import DataError
from clipscale.evals.bootstrap import share_interval
from clipscale.evals.linear_probe import Labelled, Regression, choose_c

SHOTS = (1, 2, 4, 8, 16)
DRAWS = 3
MOST_HELD = 4  # further images of a class by which C is chosen (Zhou et al. 2022, CoOp: as many as shots, 4 at most)


@dataclass(frozen=True)
class Shots:
    """Test accuracy after ``shots`` images of each class: of each draw, their mean, and its interval.

    The interval is over draws and test images, both drawn again.
    """

    shots: int
    draws: list[float]
    mean: float
    low: float
    high: float
    c: list[float]


def few_shot(
    train: Labelled,
    test: Labelled,
    names: Sequence[str],
    shots: int,
    draws: int = DRAWS,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Shots:
    """Probes on ``shots`` images of each class, drawn anew ``draws`` times; more shots of a draw hold fewer.

    C is chosen by further images of each class, as many as shots and at most four, which the probe is not fitted on.
    Raises DataError for a class, by its name in ``names``, that has too few images.
    """
    hits, chosen = [], []
    for draw in range(draws):
        places, others = draw_shots(train.labels, names, shots, seed, draw)
        c, _ = choose_c(train.at(places), train.at(others), len(names), dtype)
        logits = Regression(train.at(places), len(names), dtype).fit(c).logits(test.features)
        hits.append((logits.argmax(dim=1) == test.labels).double())
        chosen.append(c)
    table = torch.stack(hits)
    return Shots(shots, table.mean(dim=1).tolist(), table.mean().item(), *share_interval(table), chosen)


def draw_shots(
    labels: torch.Tensor, names: Sequence[str], shots: int, seed: int, draw: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places Int64[K * shots] to fit on, and those to choose C by, of every class that ``labels`` Int64[N] have."""
    fitted, held = [], []
    more = min(shots, MOST_HELD)
    for label in labels.unique().tolist():
        places = torch.nonzero(labels == label).flatten()
        if len(places) < shots + more:
            raise DataError(
                f"--shots {shots}: class {names[label]!r} has {len(places)} training images; {shots} to fit and {more} "
                f"to choose the penalty by are {shots + more}; use fewer shots"
            )
        order = places[torch.from_numpy(permutation(len(places), seed, draw, label))]
        fitted.append(order[:shots])
        held.append(order[shots : shots + more])
    return torch.cat(fitted), torch.cat(held)
