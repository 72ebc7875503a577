"""How near a network's outputs are to the dense network's, in figures that suit the kind of output."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import CalibrationError

Figures = dict[str, float]
MetricLike = str | Callable[[torch.Tensor, torch.Tensor], Mapping[str, float] | float] | None

SURE = 0.5  # a network is sure of a class if its probability is larger than this
FEW = 50  # images; a share of fewer gets an interval
MOST = 2**22  # numbers converted to float64 at a time
Z = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution


@dataclass(frozen=True)
class Metric:
    """Figures that compare a network's outputs with those of the dense network.

    Attributes:
        name: "classification", "dense prediction", "regression", "embedding", "features", or a callable's name.
        measure: A function of outputs and expected outputs that returns the figures by name.
        by_default: The same function of the metric that suits the outputs, whatever metric was chosen.
    """

    name: str
    measure: Callable[[torch.Tensor, torch.Tensor], Figures]
    by_default: Callable[[torch.Tensor, torch.Tensor], Figures]

    def distance(self, out: torch.Tensor, expected: torch.Tensor) -> float:
        """One number, 0 for equal outputs, by which layers are compared."""
        figures = self.by_default(out, expected)
        return figures["divergence" if self.by_default is classification_figures else "relative error"]

    @property
    def score_name(self) -> str:
        """The name of ``score``."""
        if self.measure is classification_figures:
            return "agreement"
        return "R2" if self.measure is regression_figures else self.name

    def score(self, figures: Mapping[str, float]) -> float:
        """The number that ``convert_to_agreement`` compares; 1 for equal outputs."""
        if self.measure is regression_figures:
            return max(0.0, 1 - figures["relative error"])
        return next(iter(figures.values()))


def choose_metric(metric: MetricLike, expected: torch.Tensor, features: bool = False) -> Metric:
    """The given metric, or else the one that suits the dense network's outputs.

    - "classification", of (N, C) with more than one class: the figures of ``classification_figures``;
    - "dense prediction", of (N, C, H, W) with more than one class: the same at each position;
    - "regression", of one output, (N,), (N, 1) or (N, 1, H, W); "embedding", of a model without a head
      (``gives_features``); and "features", of anything else: the figures of ``regression_figures``.

    Args:
        metric: A name from above; a callable on outputs and expected outputs that returns a number, or numbers by name,
            of which the first is the score; or None.
        expected: The dense network's outputs.
        features: Whether the network has no head.

    Raises:
        CalibrationError: No such metric, or one that does not suit the outputs.
    """
    kinds = {2: "classification", 4: "dense prediction"}
    if expected.ndim == 1 or (expected.ndim in kinds and expected.shape[1] == 1):
        by_shape = "regression"
    else:
        by_shape = kinds.get(expected.ndim, "features")
    suited = "embedding" if features else by_shape
    if callable(metric):
        return _metric_of(metric, _FIGURES[suited])
    name = suited if metric is None else metric
    if name not in _FIGURES:
        raise CalibrationError(f"metric is {metric!r}, expected a callable, or one of {', '.join(_FIGURES)}.")
    if name in kinds.values() and name != by_shape:
        shape = "(N, classes)" if name == kinds[2] else "(N, classes, H, W)"
        raise CalibrationError(f"metric is {name!r}, which is of {shape}; the model gives {tuple(expected.shape)}.")
    return Metric(name, _FIGURES[name], _FIGURES[name])


def classification_figures(out: torch.Tensor, expected: torch.Tensor) -> Figures:
    """Compares the classes of two networks, from outputs (N, C) or, with a class at each position, (N, C, H, W).

    Outputs are logits, or probabilities if those of the dense network are: not negative, with a sum of 1.

    Returns:
        "agreement": the share of images (positions) for which both have the same top class; "divergence": the
        Kullback-Leibler divergence of the probabilities from the expected ones, in nats, the mean over images
        (positions); "sure images" ("sure positions"): how many have a class to which the dense network gives a
        probability above one half; and, if there are any, "sure agreement": the agreement on those.
    """
    count = same = sure = both = 0
    divergence = 0.0
    some = max(1, MOST // expected[0].numel())  # images at a time
    normalise = _log_of_probabilities if _are_probabilities(expected.detach()) else partial(torch.log_softmax, dim=1)
    for parts in zip(out.detach().split(some), expected.detach().split(some), strict=True):
        log_p, log_q = (normalise(part.double()) for part in parts)
        top, (largest, expected_top) = log_p.argmax(1), log_q.max(1)
        is_sure, is_same = largest > math.log(SURE), top == expected_top
        count += top.numel()
        same, sure, both = (a + int(b.sum()) for a, b in ((same, is_same), (sure, is_sure), (both, is_same & is_sure)))
        divergence += float(F.kl_div(log_p, log_q, reduction="sum", log_target=True))
    figures = {"agreement": same / count, "divergence": max(0.0, divergence / count)}  # rounding may give -1e-17
    if sure:
        figures["sure agreement"] = both / sure
    figures["sure images" if expected.ndim == 2 else "sure positions"] = float(sure)
    return figures


def _are_probabilities(out: torch.Tensor) -> bool:
    """Whether outputs come from a softmax in the model; that of another one would have other figures."""
    return bool((out >= 0).all()) and bool(((out.sum(1) - 1).abs() < 1e-3).all())


def _log_of_probabilities(out: torch.Tensor) -> torch.Tensor:
    return out.clamp_min(torch.finfo(torch.float32).tiny).log()  # a softmax may round to 0


def regression_figures(out: torch.Tensor, expected: torch.Tensor) -> Figures:
    """How near outputs of any shape are to the expected ones.

    Variances are taken around each output's mean over the images: what all images have in common explains nothing.

    Returns:
        "relative error": the squared error over the variance of the expected outputs, both summed over all outputs; it
        is 1 for a network that always gives the mean. "correlation": Pearson's, over all values, each less the mean of
        its output; 0 where nothing varies.
    """
    x, y = (tensor.detach().double().reshape(len(tensor), -1) for tensor in (out, expected))
    error = (x - y).square().sum()
    x, y = x - x.mean(0), y - y.mean(0)
    variance = y.square().sum()
    norm = (x.square().sum() * variance).sqrt()
    return {
        "relative error": float(error / variance.clamp_min(1e-30)),
        "correlation": float((x * y).sum() / norm) if norm > 0 else 0.0,
    }


def share_intervals(metric: str, figures: Mapping[str, float], images: int) -> dict[str, list[float]]:
    """The 95 % intervals of agreements on fewer than 50 images; none for positions, which are not independent."""
    counts = {"agreement": images, "sure agreement": int(figures.get("sure images", 0))}
    return {
        name: list(wilson_interval(round(figures[name] * count), count))
        for name, count in counts.items()
        if metric == "classification" and name in figures and 0 < count < FEW
    }


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, from ``successes`` among ``count``."""
    share, spread = successes / count, Z * Z / count
    half = Z * math.sqrt(share * (1 - share) / count + spread / count / 4)
    low, high = (share + spread / 2 - half) / (1 + spread), (share + spread / 2 + half) / (1 + spread)
    return low if successes else 0.0, high if successes < count else 1.0


def _metric_of(function: Any, by_default: Callable[[torch.Tensor, torch.Tensor], Figures]) -> Metric:
    """The metric that a callable measures."""
    name = getattr(function, "__name__", type(function).__name__)

    def measure(out: torch.Tensor, expected: torch.Tensor) -> Figures:
        result = function(out, expected)
        figures = result if isinstance(result, Mapping) else {name: result}
        try:
            return {str(key): float(value) for key, value in figures.items()}
        except (TypeError, ValueError, RuntimeError):
            raise CalibrationError(
                f"The metric {name} gives {result!r}, expected a number or numbers by name."
            ) from None

    return Metric(name, measure, by_default)


_FIGURES = {
    **dict.fromkeys(("classification", "dense prediction"), classification_figures),
    **dict.fromkeys(("regression", "embedding", "features"), regression_figures),
}
