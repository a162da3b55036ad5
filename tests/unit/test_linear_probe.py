"""Probes on frozen features, held against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from clipscale.errors import DataError
from clipscale.evals.bootstrap import interval, resampled_means
from clipscale.evals.fewshot import draw_shots, few_shot
from clipscale.evals.linear_probe import Labelled, Regression, accuracy, choose_c, hold_out, linear_probe, sweep
from clipscale.evals.neighbours import choose_k, nearest, votes


def clouds(per_class: int, classes: int = 5, dim: int = 24, seed: int = 0) -> Labelled:
    """Overlapping clouds whose axes differ in size a hundredfold, far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(classes).repeat(per_class)
    points = centres[labels] + 1.5 * torch.randn(len(labels), dim, generator=generator)
    return Labelled((points * torch.logspace(-1, 1, dim) + 7).double(), labels)


def objective(data: Labelled, weight: np.ndarray, bias: np.ndarray, c: float) -> float:
    """Scikit-learn's objective over C N, written out."""
    x, y = data.features.numpy(), data.labels.numpy()
    logits = x @ weight.T + bias
    if len(bias) == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    shifted = logits - logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(y)), y]
    return losses.mean() + (weight**2).sum() / (2 * c * len(y))


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("c", [1e-6, 1e-3, 0.3, 3.0])
def test_the_minimum_is_scikit_learns(c: float, classes: int) -> None:
    data, test = clouds(40, classes), clouds(200, classes, seed=2)
    probe = Regression(data, classes).fit(c)
    theirs = LogisticRegression(C=c, tol=1e-10, max_iter=20000).fit(data.features.numpy(), data.labels.numpy())
    expected = objective(data, theirs.coef_, theirs.intercept_, c)
    assert probe.converged
    assert probe.objective == pytest.approx(expected, rel=1e-6)
    weight, bias = probe.weight.numpy(), probe.bias.numpy()
    if classes == 2:
        weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
    assert objective(data, weight, bias, c) == pytest.approx(probe.objective, rel=1e-9), "what it says is what it has"
    answers = probe.logits(test.features).argmax(dim=1).numpy()
    assert (answers == theirs.predict(test.features.numpy())).all()


def test_large_sets_are_added_up_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Regression(clouds(40), 5).fit(0.1)
    monkeypatch.setattr("clipscale.evals.linear_probe.CHUNK", 5 * 33)
    parts = Regression(clouds(40), 5).fit(0.1)
    c, scores = choose_c(clouds(40), clouds(20, seed=3), 5)
    monkeypatch.undo()
    assert (c, scores) == choose_c(clouds(40), clouds(20, seed=3), 5)
    assert parts.objective == pytest.approx(whole.objective, rel=1e-12)
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-4, atol=1e-6)


def test_single_precision_is_near() -> None:
    data = clouds(40)
    fine, coarse = (Regression(data, 5, dtype).fit(0.1) for dtype in (torch.float64, torch.float32))
    assert coarse.weight.dtype == torch.float32
    assert coarse.objective == pytest.approx(fine.objective, rel=1e-4)


def test_absent_classes_are_never_the_answer() -> None:
    data = clouds(20)
    some = data.at(torch.nonzero(data.labels != 3).flatten())
    logits = Regression(some, 5).fit(1.0).logits(data.features)
    assert (logits[:, 3] == -torch.inf).all() and logits[:, :3].isfinite().all()
    with pytest.raises(DataError, match="two classes or more"):
        Regression(data.at(torch.nonzero(data.labels == 3).flatten()), 5)


def test_features_that_are_not_finite_are_one_line() -> None:
    data = clouds(20)
    data.features[3, 3] = torch.nan
    with pytest.raises(DataError, match="finite features"):
        Regression(data, 5)


@pytest.mark.parametrize("peak", [-48, -31, 0, 5, 48])
def test_the_search_finds_the_peak_of_a_hill(peak: int) -> None:
    tried = []

    def score(c: float) -> tuple[float]:
        tried.append(c)
        return (-abs(np.log10(c) * 8 - peak),)

    best, scores = sweep(score)
    assert best == pytest.approx(10 ** (peak / 8))
    assert len(tried) == len(set(tried)) == len(scores) <= 7 + 2 * 4, "far fewer than 97, and none twice"
    assert sweep(lambda c: (0.0,))[0] == pytest.approx(1e-6), "of equals, the strongest penalty"


def test_the_sweep_is_worth_its_time() -> None:
    """Few images and many dimensions: what penalty is chosen matters, and held-out images choose a good one."""
    train, held_out, test = clouds(6, dim=64), clouds(20, dim=64, seed=3), clouds(200, dim=64, seed=4)
    probe, scores = linear_probe(train, held_out, 5)
    assert scores[choose_c(train, held_out, 5)[0]] == max(scores.values())
    assert min(scores) < probe.c < max(scores)
    loose = Regression(train, 5).fit(1e6)
    assert accuracy(probe.logits(test.features), test.labels) > accuracy(loose.logits(test.features), test.labels)


def test_every_class_holds_its_share_back() -> None:
    labels = torch.tensor([0] * 10 + [1] * 50 + [2] * 4)
    kept, held = hold_out(labels)
    assert sorted(torch.cat([kept, held]).tolist()) == list(range(64))
    assert labels[held].bincount(minlength=3).tolist() == [2, 10, 0]
    assert hold_out(labels)[1].equal(held) and not hold_out(labels, seed=1)[1].equal(held)
    with pytest.raises(DataError, match="name validation images"):
        hold_out(torch.arange(4))


def test_shots_of_a_draw_hold_fewer_shots() -> None:
    labels = torch.arange(3).repeat(30)
    names = ["a", "b", "c"]
    fitted = {shots: draw_shots(labels, names, shots, 0, 1) for shots in (1, 2, 4, 16)}
    for few, many in ((1, 2), (2, 4), (4, 16)):
        assert set(fitted[few][0].tolist()) < set(fitted[many][0].tolist())
    for shots, (some, others) in fitted.items():
        assert labels[some].bincount().tolist() == [shots] * 3
        assert labels[others].bincount().tolist() == [min(shots, 4)] * 3
        assert not set(some.tolist()) & set(others.tolist())
    assert not draw_shots(labels, names, 4, 0, 0)[0].equal(fitted[4][0])
    with pytest.raises(DataError, match=r"class 'a' has 30 training images; 32 to fit and 4 .* 36"):
        draw_shots(labels, names, 32, 0, 0)


def test_more_shots_are_better() -> None:
    train, test, names = clouds(30), clouds(200, seed=5), list("abcde")
    few, many = (few_shot(train, test, names, shots, draws=2) for shots in (1, 8))
    assert len(few.draws) == len(few.c) == 2
    assert few.mean < many.mean and few.low < few.mean < few.high
    assert few_shot(train, test, names, 1, draws=2) == few


def test_neighbours_vote_by_their_cosine() -> None:
    train = Labelled(torch.tensor([[3.0, 0], [0.8, 0.6], [0.6, 0.8], [0, 0.1]]), torch.tensor([0, 1, 1, 2]))
    query = torch.tensor([[2.0, 0.0]])
    found = votes(train, query, (1, 3, 9), 3)
    weights = torch.exp((torch.tensor([1.0, 0.8, 0.6, 0.0], dtype=torch.float64) - 1) / 0.07)
    torch.testing.assert_close(found[1], torch.stack([weights[0], weights[0] * 0, weights[0] * 0])[None])
    expected = torch.stack([weights[0], weights[1] + weights[2], weights[3]])[None]
    torch.testing.assert_close(found[9], expected, rtol=1e-5, atol=1e-9)
    assert found[3][0, 2] == 0


def test_the_number_of_neighbours_is_chosen() -> None:
    train, held_out = clouds(30), clouds(30, seed=6)
    k, scores = choose_k(train, held_out, 5)
    assert scores[k] == max(scores.values()) and max(scores) <= 150
    assert scores[k] == accuracy(votes(train, held_out.features, (k,), 5)[k], held_out.labels)


def test_held_out_images_of_other_classes_choose_nothing() -> None:
    train, other = clouds(10, 3), clouds(4, 5)
    c, scores = choose_c(train, other.at(torch.nonzero(other.labels > 2).flatten()), 5)
    assert c == pytest.approx(1e-6) and set(scores.values()) == {0.0}


def test_the_nearest_is_found_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.nn.functional.normalize(torch.randn(3000, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    cosine, place = nearest(features, features[:2500])
    assert place.tolist() == list(range(2500))
    torch.testing.assert_close(cosine, torch.ones(2500))
    train = Labelled(features, torch.arange(3000) % 5)
    whole = votes(train, features[:50], (3,), 5)[3]
    monkeypatch.setattr("clipscale.evals.neighbours.COSINES", 7 * 3000)  # as if there were far more images
    assert nearest(features, features[:50])[1].tolist() == list(range(50))
    torch.testing.assert_close(votes(train, features[:50], (3,), 5)[3], whole, rtol=1e-4, atol=1e-5)


def test_the_interval_of_a_share_is_the_binomials() -> None:
    hits = torch.zeros(400).index_fill(0, torch.arange(100), 1.0)
    low, high = interval(resampled_means(hits, draws=20000))
    half = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert (low, high) == (pytest.approx(0.25 - half, abs=0.004), pytest.approx(0.25 + half, abs=0.004))
    assert interval(resampled_means(torch.ones(9))) == (1.0, 1.0)


def test_repetitions_are_drawn_again_too() -> None:
    """Two draws of a training set, one lucky and one not: the interval knows that there were only two."""
    alike = torch.zeros(2, 400).index_fill(1, torch.arange(100), 1.0)
    apart = alike.clone()
    apart[1] = 0
    narrow, wide = (interval(resampled_means(table)) for table in (alike, apart))
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])
