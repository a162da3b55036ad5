"""Scores against scikit-learn's, and against the formulas written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn import metrics

from clipscale.evals.bootstrap import wilson
from clipscale.evals.outcomes import Classified, Labelled, Retrieved, intervals, resampled, score_intervals
from clipscale.evals.scores import Ranked, calibration_error, class_recalls, macro_f1, mean


@pytest.fixture(params=[0, 1, 2])
def random(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(request.param)


def weights(random: np.random.Generator, count: int, weighted: bool) -> np.ndarray:
    return random.integers(0, 4, count).astype(float) if weighted else np.ones(count)


@pytest.mark.parametrize("weighted", [False, True])
def test_of_classes(random: np.random.Generator, weighted: bool) -> None:
    count, classes = 300, 12
    labels = random.integers(0, classes - 2, count)  # two classes have no sample
    answers = np.where(random.random(count) < 0.5, labels, random.integers(0, classes, count))
    weight, right = weights(random, count, weighted), (labels == answers).astype(float)
    assert mean(right, weight) == pytest.approx(metrics.accuracy_score(labels, answers, sample_weight=weight))
    recalls = class_recalls(labels, right, weight, classes)
    balanced = metrics.balanced_accuracy_score(labels, answers, sample_weight=weight)
    assert np.nanmean(recalls) == pytest.approx(balanced) and np.isnan(recalls[-2:]).all()
    there = weight > 0
    f1 = metrics.f1_score(
        labels[there], answers[there], sample_weight=weight[there], average="macro", labels=np.unique(labels[there])
    )  # as WILDS calls it
    assert macro_f1(labels, answers, weight, classes) == pytest.approx(f1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("levels", [5, 100_000])
def test_of_yes_and_no(random: np.random.Generator, weighted: bool, levels: int) -> None:
    count = 200
    labels, weight = random.integers(0, 2, count).astype(float), weights(random, count, weighted)
    scores = random.integers(0, levels, count) / levels + 0.1 * labels  # few levels: many ties
    ranked = Ranked(scores, labels)
    expected = metrics.average_precision_score(labels, scores, sample_weight=weight)
    assert ranked.average_precision(weight) == pytest.approx(expected)
    assert ranked.auroc(weight) == pytest.approx(metrics.roc_auc_score(labels, scores, sample_weight=weight))


def test_of_one_kind_alone_there_is_none() -> None:
    for labels in (np.ones(3), np.zeros(3)):
        assert np.isnan(Ranked(np.arange(3.0), labels).auroc(np.ones(3)))
    assert np.isnan(Ranked(np.arange(3.0), np.zeros(3)).average_precision(np.ones(3)))


def test_of_scores_that_are_no_numbers_there_is_none() -> None:
    ranked = Ranked(np.array([np.nan, 0.1, 0.2]), np.array([1.0, 0.0, 1.0]))
    assert np.isnan(ranked.auroc(np.ones(3))) and np.isnan(ranked.average_precision(np.ones(3)))


def test_calibration_by_its_definition(random: np.random.Generator) -> None:
    confidence, hits = random.random(500), random.integers(0, 2, 500).astype(float)
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(hits[inside].mean() - confidence[inside].mean())
    assert calibration_error(confidence, hits, np.ones(500)) == pytest.approx(expected, abs=1e-12)
    assert calibration_error(np.ones(4), np.ones(4), np.ones(4)) == 0


def test_unknown_labels_are_left_out(random: np.random.Generator) -> None:
    score, label = random.random((50, 2)), random.integers(0, 2, (50, 2)).astype(float)
    label[::3, 1] = np.nan
    outcome = Labelled({"score": score, "label": label}, ("a", "b"), "")
    found, known = outcome.scores(outcome.all), ~np.isnan(label[:, 1])
    assert found["auroc/b"] == pytest.approx(metrics.roc_auc_score(label[known, 1], score[known, 1]))
    assert found["map"] == pytest.approx((found["ap/a"] + found["ap/b"]) / 2)


def test_intervals_cover_as_often_as_they_say() -> None:
    """Of 100 draws of 100 queries that hit in 40 %: 95 % of the intervals hold 40 %, give or take."""
    random, covered = np.random.default_rng(5), 0
    for seed in range(100):
        hits = (random.random((2, 100)) < 0.4).astype(float)
        arrays = {f"{way}_r{k}": hits[i] for i, way in enumerate(("i2t", "t2i")) for k in (1, 5, 10)}
        low, high = intervals(resampled(Retrieved(arrays, (), ""), 100, seed))["mean_r1"]
        covered += low <= 0.4 <= high
    assert 88 <= covered <= 100


def test_queries_that_are_all_alike_are_not_sure() -> None:
    """Of ten right answers, none is wrong in any draw, and yet another ten could be."""
    ten, label = np.ones(10), np.arange(10) % 4
    arrays = {"label": label, "answer": label, "top1": ten, "top5": ten, "confidence": ten, "group": np.arange(10) // 8}
    outcome = Classified(arrays, tuple("abcd"), "")
    found = score_intervals(outcome, resampled(outcome, 50))
    assert found["top1"] == pytest.approx(wilson(1.0, 10)) and 0.7 < found["top1"][0] < 0.75
    assert found["mean_per_class_recall"] == found["macro_f1"] and found["macro_f1"][1] == 1
    assert found["worst_group_top1"] == pytest.approx(wilson(1.0, 2)), "the smaller group has two"
    assert found["top5"] == (1, 1), "four classes are among the first five for certain"
    hits = {f"{way}_r1": np.zeros(size) for way, size in (("i2t", 3), ("t2i", 5))}
    ranked = Retrieved(hits | {f"{name}_chance": array + 0.1 for name, array in hits.items()}, (), "")
    bounds = score_intervals(ranked, resampled(ranked, 50))
    assert bounds["i2t_r1"] == wilson(0.0, 3) and bounds["t2i_r1"] == wilson(0.0, 5)
    assert bounds["mean_r1"][1] == pytest.approx(math.hypot(wilson(0.0, 3)[1], wilson(0.0, 5)[1]) / 2)


def test_a_rare_class_that_is_right_is_not_sure() -> None:
    """And a group of which all are wrong is surely bad, however small the others are."""
    label = np.array([0] * 999 + [1])
    arrays = {
        "label": label,
        "answer": label,
        "top1": np.ones(1000),
        "top5": np.ones(1000),
        "confidence": np.ones(1000),
    }
    outcome = Classified(arrays, tuple("abcdefgh"), "")
    low, high = score_intervals(outcome, resampled(outcome, 5))["mean_per_class_recall"]
    assert high == 1 and 0.6 < low < 0.61
    top1 = np.array([0.0] * 500 + [1.0] * 2)
    arrays = {"label": np.zeros(502, int), "answer": np.zeros(502, int), "top1": top1, "top5": top1,
              "confidence": top1, "group": 1 - top1.astype(int)}  # fmt: skip
    outcome = Classified(arrays, tuple("abcdefgh"), "")
    assert score_intervals(outcome, resampled(outcome, 5))["worst_group_top1"] == (0, wilson(0.0, 500)[1])


def test_a_share_is_inside_its_interval() -> None:
    for count in range(1, 300):
        assert wilson(1.0, count)[1] == 1 and wilson(0.0, count)[0] == 0
