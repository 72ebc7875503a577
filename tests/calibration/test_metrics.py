"""Figures of every kind of output, against numpy; which kind is which; intervals, against the test they invert."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

import timm_masterkeys as mk
from timm_masterkeys.calibration.metrics import (
    choose_metric,
    classification_figures,
    regression_figures,
    share_intervals,
    wilson_interval,
)


def outputs(*shape, scale=2.0):
    expected = torch.randn(*shape) * scale
    return expected + torch.randn(*shape), expected


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def oracle(out, expected):
    """The figures of (rows, classes), by their definitions."""
    q, p = (softmax(x.double().numpy()) for x in (out, expected))
    same, sure = q.argmax(1) == p.argmax(1), p.max(1) > 0.5
    return {
        "agreement": same.mean(),
        "divergence": (p * (np.log(p) - np.log(q))).sum(1).mean(),
        "sure agreement": same[sure].mean(),
        "sure": sure.sum(),
    }


def test_classification_against_numpy():
    out, expected = outputs(200, 6)
    figures = oracle(out, expected)
    figures["sure images"] = figures.pop("sure")
    assert classification_figures(out, expected) == pytest.approx(figures, rel=1e-12)
    assert 20 < figures["sure images"] < 180 and figures["agreement"] < figures["sure agreement"] < 1


@pytest.mark.parametrize("shape", [(200, 6), (5, 4, 7, 3)])
def test_probabilities_have_the_figures_of_their_logits(shape):
    """A model may end in a softmax, as one with activation="softmax" of segmentation-models-pytorch."""
    out, expected = outputs(*shape)
    figures = classification_figures(out.softmax(1), expected.softmax(1))
    assert figures == pytest.approx(classification_figures(out, expected), rel=1e-4)
    expected.mul_(1e3)  # so that probabilities round to 0
    assert 0 < classification_figures(out.softmax(1), expected.softmax(1))["divergence"] < 100


def test_dense_prediction_is_the_same_at_each_position(monkeypatch):
    out, expected = outputs(5, 4, 7, 3)
    figures = oracle(*(x.movedim(1, -1).flatten(0, -2) for x in (out, expected)))
    figures["sure positions"] = figures.pop("sure")
    for most in (2**22, 100, 1):  # some images at a time, or each alone
        monkeypatch.setattr("timm_masterkeys.calibration.metrics.MOST", most)
        assert classification_figures(out, expected) == pytest.approx(figures, rel=1e-12)


def test_where_the_dense_network_is_never_sure_there_is_no_such_figure():
    figures = classification_figures(*outputs(20, 50, scale=0.1))
    assert figures["sure images"] == 0 and "sure agreement" not in figures


@pytest.mark.parametrize("shape", [(30,), (30, 1), (30, 8), (30, 3, 8), (30, 2, 4, 5)])
def test_regression_against_numpy(shape):
    out, expected = outputs(*shape)
    out, expected = out + 1, expected + 5  # the same for all images: an error, but nothing to explain
    x, y = (tensor.double().numpy().reshape(30, -1) for tensor in (out, expected))
    figures = regression_figures(out, expected)
    assert figures["relative error"] == pytest.approx(((x - y) ** 2).mean(0).sum() / y.var(0).sum(), rel=1e-12)
    r = np.corrcoef((x - x.mean(0)).ravel(), (y - y.mean(0)).ravel())[0, 1]
    assert figures["correlation"] == pytest.approx(r, rel=1e-12)


def test_regression_at_its_ends():
    _, expected = outputs(40, 3)
    assert regression_figures(expected, expected) == {"relative error": 0.0, "correlation": pytest.approx(1)}
    mean = expected.mean(0, keepdim=True).expand(40, 3)
    assert regression_figures(mean, expected)["relative error"] == pytest.approx(1)
    assert regression_figures(torch.zeros(40, 3), expected)["correlation"] == 0
    constant = regression_figures(expected, torch.ones(40, 3))
    assert all(map(math.isfinite, constant.values())) and constant["relative error"] > 1e6


@pytest.mark.parametrize(
    "shape, features, name",
    [
        ((4, 10), False, "classification"),
        ((4, 10, 8, 8), False, "dense prediction"),
        ((4,), False, "regression"),
        ((4, 1), False, "regression"),
        ((4, 1, 8, 8), False, "regression"),
        ((4, 7, 10), False, "features"),
        ((4, 10), True, "embedding"),
        ((4, 10, 8, 8), True, "embedding"),
    ],
)
def test_which_kind_is_which(shape, features, name):
    assert choose_metric(None, torch.randn(shape), features).name == name


def test_the_score_is_one_for_the_dense_network_and_falls():
    for shape in ((60, 10), (60, 1), (60, 4, 3), (20, 4, 6, 6)):
        expected = torch.randn(shape) * 3
        metric = choose_metric(None, expected)
        noise = torch.randn(shape)
        scores = [metric.score(metric.measure(expected + s * noise, expected)) for s in (0, 0.5, 2, 50)]
        distances = [metric.distance(expected + s * noise, expected) for s in (0, 0.5, 2, 50)]
        assert scores[0] == 1 and scores == sorted(scores, reverse=True) and scores[-1] < 0.5 and scores[-1] >= 0
        assert distances[0] == pytest.approx(0, abs=1e-12) and distances == sorted(distances)


def test_a_metric_of_ones_own():
    out, expected = outputs(10, 5)

    def mean_error(out, expected):
        return (out - expected).abs().mean()

    def two(out, expected):
        return {"nearness": 0.5, "other": torch.tensor(2)}

    one = choose_metric(mean_error, expected)
    assert one.name == one.score_name == "mean_error"
    assert one.measure(out, expected) == {"mean_error": float((out - expected).abs().mean())}
    assert one.score({"mean_error": 0.25}) == 0.25
    figures = choose_metric(two, expected).measure(out, expected)
    assert figures == {"nearness": 0.5, "other": 2.0} and choose_metric(two, expected).score(figures) == 0.5
    assert one.distance(out, expected) == classification_figures(out, expected)["divergence"]
    with pytest.raises(mk.CalibrationError, match=r"metric <lambda> gives 'good', expected a number"):
        choose_metric(lambda out, expected: "good", expected).measure(out, expected)


def test_metrics_by_name():
    maps = torch.randn(3, 5, 4, 4)
    assert choose_metric("features", maps).measure is regression_figures
    with pytest.raises(mk.CalibrationError, match="metric is 'accuracy', expected a callable, or one of class"):
        choose_metric("accuracy", maps)
    with pytest.raises(
        mk.CalibrationError, match=r"'classification', which is of \(N, classes\); the model gives \(3, 5"
    ):
        choose_metric("classification", maps)
    with pytest.raises(mk.CalibrationError, match="'classification'"):
        choose_metric("classification", maps[:, 0, 0, :1])


@pytest.mark.parametrize("successes, count", [(0, 10), (1, 15), (7, 15), (30, 49), (19, 20), (20, 20), (2, 2)])
def test_the_interval_holds_the_shares_that_a_score_test_does_not_refuse(successes, count):
    z, seen = NormalDist().inv_cdf(0.975), successes / count
    shares = np.linspace(0, 1, 2_000_001)[1:-1]
    kept = shares[np.abs(seen - shares) <= z * np.sqrt(shares * (1 - shares) / count)]
    assert wilson_interval(successes, count) == pytest.approx((kept.min(), kept.max()), abs=2e-6)


def test_intervals_where_there_are_few_independent_images():
    figures = {"agreement": 0.5, "divergence": 0.1, "sure agreement": 0.75, "sure images": 8.0}
    assert share_intervals("classification", figures, 20) == {
        "agreement": list(wilson_interval(10, 20)),
        "sure agreement": list(wilson_interval(6, 8)),
    }
    assert set(share_intervals("classification", figures, 50)) == {"sure agreement"}
    assert share_intervals("classification", {"agreement": 0.5}, 60) == {}
    assert share_intervals("dense prediction", figures, 20) == share_intervals("mine", figures, 20) == {}
