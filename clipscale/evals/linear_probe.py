"""Linear probe: multinomial logistic regression on frozen features (CLIP paper, section 3.2 and appendix A.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from clipscale.data.order import permutation
from clipscale.errors import DataError

ITERATIONS = 1000
CHUNK = 1 << 24  # logits held at a time: those of a million images of a thousand classes would fill the memory
HISTORY, FIRST_ROUND = 20, 50
EXACT, ROUGH = 1e-8, 1e-6  # tolerances: of what is kept, and of what is only compared with others
_FINEST = {torch.float64: 0.0, torch.float32: 1e-5}
DECADES, PER_DECADE = 6, 8  # the sweep: 10^-6 to 10^6 in 96 steps
FIRST_STEP = 2 * PER_DECADE  # it begins at every second power of ten
HELD_BACK = 0.2  # of the training images, where no validation images are given


class Labelled(NamedTuple):
    """``features`` Float[N, D] of images and their classes ``labels`` Int64[N]."""

    features: torch.Tensor
    labels: torch.Tensor

    def at(self, places: torch.Tensor) -> Labelled:
        """Some of them, by Int64[M]."""
        return Labelled(self.features[places], self.labels[places])

    def with_(self, other: Labelled) -> Labelled:
        """These and others."""
        return Labelled(*(torch.cat(pair) for pair in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Probe:
    """A linear classifier, and how it was found; a class without training images has the bias -inf."""

    weight: torch.Tensor  # Float[K, D]
    bias: torch.Tensor  # Float[K]
    c: float
    objective: float
    iterations: int
    converged: bool

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Float[N, K] of Float[N, D]."""
        return F.linear(features.to(self.weight), self.weight, self.bias)


class Regression:
    """Labelled images, to be fitted with one C after another.

    The objective is scikit-learn's, divided by C N: the mean over N images of the cross-entropy of softmax(W x + b),
    and ||W||^2 / (2 C N); the biases are free. Two classes have one vector there and two opposite ones here, whose
    squares therefore count twice. It is minimised by L-BFGS with a strong Wolfe line search.

    The search runs in other variables, which changes no minimum: features are centred (the free biases take that up)
    and rotated to their principal axes, and each weight is scaled by the root of its curvature, anew after 50, 100,
    200, ... iterations. Features whose axes differ a hundredfold in size, on which L-BFGS would be far from the end
    after a thousand iterations, so need some dozens.

    Args:
        data: of at least two classes.
        classes: K, the number of classes, of which some may be absent.
        dtype: of all computation.
    """

    def __init__(self, data: Labelled, classes: int, dtype: torch.dtype = torch.float64) -> None:
        self._classes = classes
        self._present, self._targets = data.labels.unique(return_inverse=True)
        if len(self._present) < 2:
            raise DataError(f"a linear probe needs images of two classes or more, these are of {len(self._present)}")
        features = data.features.to(dtype)
        if not features.isfinite().all():
            raise DataError("a linear probe needs finite features, the model gives others: has its training diverged?")
        self._mean = features.mean(dim=0)
        features = features - self._mean
        self._axes = torch.linalg.eigh(features.T @ features).eigenvectors
        # The last column is the biases'. Filled in place: beside the features, whole, there is one copy, not three.
        self._inputs = features.new_ones(len(features), features.shape[1] + 1)
        torch.mm(features, self._axes, out=self._inputs[:, :-1])
        self._chunk = max(1, CHUNK // len(self._present))

    def fit(self, c: float, iterations: int = ITERATIONS, tolerance: float = EXACT) -> Probe:
        """The minimum for scikit-learn's ``C``, or what ``iterations`` reach of it (``converged`` is false then).

        It is reached when no gradient (by a scaled weight) exceeds ``tolerance``, or an iteration gains less than its
        thousandth.
        """
        inputs, count = self._inputs, len(self._present)
        decay = inputs.new_full((inputs.shape[1],), (2 if count == 2 else 1) / (c * len(inputs)))
        decay[-1] = 0
        weight, used, length, value = inputs.new_zeros(count, inputs.shape[1]), 0, FIRST_ROUND, 0.0
        while used < iterations:
            length = min(length, iterations - used)
            weight, taken, value = self._search(weight, decay, length, max(tolerance, _FINEST[inputs.dtype]))
            used += taken
            if taken < length:
                break
            length *= 2
        vectors = weight[:, :-1] @ self._axes.T
        full = inputs.new_zeros(self._classes, vectors.shape[1]), inputs.new_full((self._classes,), -torch.inf)
        full[0][self._present], full[1][self._present] = vectors, weight[:, -1] - vectors @ self._mean
        return Probe(*full, c, value, used, used < iterations)

    def _search(
        self, weight: torch.Tensor, decay: torch.Tensor, length: int, tolerance: float
    ) -> tuple[torch.Tensor, int, float]:
        """Up to ``length`` iterations from ``weight`` on: where they end, how many they were, and the objective."""
        count = len(self._inputs)
        curvature = decay * count
        for inputs, _ in self._chunks():
            shares = (inputs @ weight.T).softmax(dim=1)
            curvature = curvature + (shares * (1 - shares)).T @ inputs.square()
        curvature = curvature / count
        scale = (curvature + 1e-12 * curvature.max()).rsqrt()
        scaled = torch.nn.Parameter(weight / scale)

        @torch.no_grad()
        def objective() -> torch.Tensor:
            weight = scaled * scale
            gradient, value = decay * weight * count, (decay * weight.square()).sum() / 2 * count
            for inputs, targets in self._chunks():
                logs = (inputs @ weight.T).log_softmax(dim=1)
                value += F.nll_loss(logs, targets, reduction="sum")
                wrong = logs.exp_()
                wrong[torch.arange(len(targets)), targets] -= 1
                gradient += wrong.T @ inputs
            scaled.grad = gradient / count * scale
            return value / count

        optimizer = torch.optim.LBFGS(
            [scaled], max_iter=length, max_eval=3 * length, history_size=HISTORY, line_search_fn="strong_wolfe",
            tolerance_grad=tolerance, tolerance_change=tolerance / 1000,
        )  # fmt: skip
        optimizer.step(objective)
        value = objective().item()
        return scaled.detach() * scale, int(optimizer.state[scaled]["n_iter"]), value

    def _chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return zip(self._inputs.split(self._chunk), self._targets.split(self._chunk), strict=True)


def sweep(score: Callable[[float], tuple[float, ...]]) -> tuple[float, dict[float, tuple[float, ...]]]:
    """The C with the highest score, and the scores of all C that were tried.

    The paper's parametric binary search over 10^-6 ... 10^6: begin with every second power of ten, and halve the steps
    around the peak until there are eight a decade. Of equal scores the smallest C, the strongest penalty, counts.
    """
    most = DECADES * PER_DECADE
    known: dict[int, tuple[float, ...]] = {}
    step, places = FIRST_STEP, list(range(-most, most + 1, FIRST_STEP))
    while True:
        known |= {place: score(10 ** (place / PER_DECADE)) for place in places if place not in known}
        peak = max(sorted(known), key=lambda place: known[place])
        step //= 2
        if not step:
            return 10 ** (peak / PER_DECADE), {10 ** (place / PER_DECADE): known[place] for place in sorted(known)}
        places = [place for place in (peak - step, peak + step) if abs(place) <= most]


def choose_c(
    train: Labelled, held_out: Labelled, classes: int, dtype: torch.dtype = torch.float64
) -> tuple[float, dict[float, float]]:
    """The C of the sweep that classifies held-out images best, and the accuracy of each that was tried.

    Of equally accurate ones, the one with the lower cross-entropy of the held-out images that have a trained class.
    """
    regression = Regression(train, classes, dtype)

    def score(c: float) -> tuple[float, ...]:
        probe, step = regression.fit(c, tolerance=ROUGH), max(1, CHUNK // classes)
        right, finite, total = 0, 0, 0.0
        for features, labels in zip(held_out.features.split(step), held_out.labels.split(step), strict=True):
            logits = probe.logits(features)
            losses = F.cross_entropy(logits, labels, reduction="none")
            losses = losses[losses.isfinite()]
            right += int((logits.argmax(dim=1) == labels).sum())
            finite, total = finite + len(losses), total + losses.sum().item()
        return right / len(held_out.labels), -total / finite if finite else -torch.inf

    c, scores = sweep(score)
    return c, {tried: accurate for tried, (accurate, _) in scores.items()}


def linear_probe(
    train: Labelled, held_out: Labelled, classes: int, dtype: torch.dtype = torch.float64
) -> tuple[Probe, dict[float, float]]:
    """Choose C on held-out images, then fit on all: the probe, and held-out accuracy by C."""
    c, scores = choose_c(train, held_out, classes, dtype)
    return Regression(train.with_(held_out), classes, dtype).fit(c), scores


def hold_out(labels: torch.Tensor, share: float = HELD_BACK, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Places Int64[N - M], Int64[M] to train on and to choose by: of every class a share, and never all of it."""
    kept, held = [], []
    for label in labels.unique().tolist():
        places = torch.nonzero(labels == label).flatten()
        places = places[torch.from_numpy(permutation(len(places), seed, label))]
        cut = int(np.floor(len(places) * share))
        held.append(places[:cut])
        kept.append(places[cut:])
    if not any(len(part) for part in held):
        raise DataError(
            f"none of {len(labels)} training images can be held back to choose the penalty, as their classes have less "
            f"than {round(1 / share)} each; name validation images"
        )
    return torch.cat(kept).sort().values, torch.cat(held).sort().values


def accuracy(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of Float[N, K] whose highest score is at the label."""
    return (scores.argmax(dim=1) == labels).double().mean().item()
