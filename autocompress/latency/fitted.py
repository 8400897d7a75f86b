"""FittedLatencyModel: the operator table, corrected on whole networks.

Alone in a loop an operator finds its data in the caches, and a runtime fuses, converts and schedules more than single operators show. So
latency = call overhead + sum over classes of (scale * seconds by the table) + cost an operator + cost of an element that passes from
int8 to float32 or back, with the scales and costs fitted on measured networks, in relative error, pulled towards what the table says
(ridge). Re-fitted as a search measures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from autocompress.graph import Workloads
from autocompress.latency.table import NNLS_STEPS, OperatorTable
from autocompress.ranking.ranks import rank_correlation
from autocompress.records import Prediction
from autocompress.results import PredictionQuality
from autocompress.workload import Operator, Workload

CLASSES = ("conv8", "conv32", "other")
RIDGE = 0.15
OPERATOR_COST_S, CONVERSION_S = 1e-6, 0.5e-9
"""Seconds in which costs are fitted: of an operator, none unless networks tell so, and of an element that is rounded to int8 or back, so
much unless they tell otherwise (`benchmarks/latency_truth.py`: with it the median error on mixed networks is 4.8 instead of 8.7 %)."""
UNFITTED, PRIOR = np.array([1.0] * len(CLASSES) + [0.0, 0.0]), np.array([1.0] * len(CLASSES) + [0.0, 1.0])
UNFITTED_SPREAD = 0.3
UNTRACED_SPREAD = 4.0
UNKNOWN_S = 1.0
COVERAGE = 0.9
LEAST_TO_FIT = 3
LEAST_S = 1e-7
LEAST_SPREAD, MOST_SPREAD = 0.02, 1.0
"""Of three networks that are left out in turn each tells little of the others: beyond a factor of two it is their number that errs."""


class FittedLatencyModel:
    """Predicts whole networks before they exist; `fit` it on (workload, measured seconds) pairs. Only a device measures."""

    def __init__(self, table: OperatorTable) -> None:
        self.table = table
        self._scales = UNFITTED
        self._spread = UNFITTED_SPREAD
        self._errors: list[tuple[float, float]] = []
        self._pairs: list[tuple[Workload, float]] = []

    def predict(self, workload: Workload) -> Prediction:
        """Seconds of one call, with a 90 % interval."""
        if not workload.operators:
            return self._predict_whole(workload)
        value = max(LEAST_S, self.table.call_overhead + sum(seconds for _, seconds in self.seconds_by_operator(workload)))
        return Prediction(value=value, low=value / (1 + self._spread), high=value * (1 + self._spread))

    def values(self, workloads: Workloads) -> NDArray[np.float64]:
        """Predicted seconds of each, as `predict` gives them one by one; many at once take hardly longer than one."""
        if not any(workloads.variants):
            return np.array([self._predict_whole(workload).value for workload in workloads])
        conversions = self._conversion_s * workloads.converted()
        return np.maximum(LEAST_S, self.table.call_overhead + workloads.total([self._seconds])[0] + conversions)

    def _predict_whole(self, workload: Workload) -> Prediction:
        """A network that could not be traced has no operators to add up: the measured one that is nearest in weight bytes, loosely."""
        known = [(other.weight_bytes, seconds) for other, seconds in self._pairs if not other.operators]
        if not known:
            return Prediction(value=UNKNOWN_S, low=0.0, high=1000 * UNKNOWN_S)
        _, seconds = min(known, key=lambda pair: abs(pair[0] - workload.weight_bytes))
        return Prediction(value=seconds, low=seconds / UNTRACED_SPREAD, high=seconds * UNTRACED_SPREAD)

    def seconds_by_operator(self, workload: Workload) -> list[tuple[str, float]]:
        converted = zip(workload.operators, workload.converted, strict=True)
        return [(operator.name, self._seconds(operator) + self._conversion_s * elements) for operator, elements in converted]

    @property
    def _conversion_s(self) -> float:
        return float(self._scales[-1] * CONVERSION_S)

    def _seconds(self, operator: Operator) -> float:
        """What one operator takes inside a network."""
        scale, cost = self._scales[CLASSES.index(_class_of(operator))], self._scales[len(CLASSES)] * OPERATOR_COST_S
        return float(scale * self.table.estimate(operator) + cost)

    def fit(self, pairs: Sequence[tuple[Workload, float]]) -> None:
        """Fit the correction, and the interval from what each pair would have been predicted without itself."""
        self._pairs = list(pairs)
        pairs = [(workload, seconds) for workload, seconds in pairs if workload.operators]
        if len(pairs) < LEAST_TO_FIT:
            return
        features = np.array([self._features(workload) for workload, _ in pairs])
        overhead, measured = self.table.call_overhead, np.array([seconds for _, seconds in pairs])
        seconds = np.maximum(measured - overhead, LEAST_S)
        left_out = []
        for index in range(len(pairs)):
            others = np.arange(len(pairs)) != index
            scales = _solve(features[others], seconds[others])
            left_out.append((max(float(overhead + features[index] @ scales), LEAST_S), float(measured[index])))
        self._scales = _solve(features, seconds)
        self._errors = left_out
        factors = np.array([abs(np.log(predicted / actual)) for predicted, actual in left_out])  # the interval is one of factors too
        rank = min(len(factors) - 1, int(np.ceil(COVERAGE * (len(factors) + 1))) - 1)
        self._spread = min(MOST_SPREAD, max(LEAST_SPREAD, float(np.expm1(np.sort(factors)[rank]))))

    def held_out_error(self) -> PredictionQuality:
        """Of networks that were each predicted by a fit without it."""
        if not self._errors:
            return PredictionQuality()
        predicted, measured = (np.array(side) for side in zip(*self._errors, strict=True))
        error = float(np.median(np.abs(predicted / measured - 1)))
        correlation = rank_correlation(predicted.tolist(), measured.tolist())
        return PredictionQuality(n=len(predicted), median_error=error, spearman=correlation)

    def _features(self, workload: Workload) -> NDArray[np.float64]:
        sums = dict.fromkeys(CLASSES, 0.0)
        for operator in workload.operators:
            sums[_class_of(operator)] += self.table.estimate(operator)
        return np.array([*sums.values(), OPERATOR_COST_S * len(workload.operators), CONVERSION_S * sum(workload.converted)])


def _class_of(operator: Operator) -> str:
    return f"conv{operator.bits}" if operator.macs else "other"


def _solve(features: NDArray[np.float64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Non-negative scales with least relative error; ridge towards PRIOR."""
    rows = np.vstack([features / seconds[:, None], RIDGE * np.eye(len(PRIOR))])
    targets = np.concatenate([np.ones(len(seconds)), RIDGE * PRIOR])
    scales: NDArray[np.float64] = nnls(rows, targets, maxiter=NNLS_STEPS)[0]
    return scales
