"""A Gaussian process with a length scale for each dimension, fitted by maximum a posteriori. NumPy and SciPy only.

Matern-5/2 kernel (Rasmussen & Williams 2006, equation 4.17), gradient of the marginal likelihood (equation 5.9). The prior of the length
scales grows with the number of dimensions (Hvarfner, Hellsten & Nardi 2024, "Vanilla Bayesian optimization performs great in high
dimensions"), so that a few dozen points say something about a policy of 300 dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Array = NDArray[np.float64]

FIRST_ITERATIONS, ITERATIONS = 40, 8
"""Of L-BFGS: from the prior, and from what was found before."""
JITTER = 1e-6
LEAST_VARIANCE = 1e-10


@dataclass(frozen=True)
class Prior:
    """Independent normals over the logarithms of the weights (inverse squared length scales), the amplitude and the noise."""

    mean: Array
    deviation: Array

    @classmethod
    def of(cls, dimensions: int) -> Prior:
        weight = -2.0 * math.sqrt(2.0) - math.log(dimensions)
        return cls(
            np.array([*[weight] * dimensions, 0.0, math.log(1e-3)]),
            np.array([*[2.0 * math.sqrt(3.0)] * dimensions, 1.5, 2.0]),
        )

    @property
    def bounds(self) -> list[tuple[float, float]]:
        """Beyond these nothing changes but the condition of the kernel."""
        *weights, _, _ = self.mean
        return [*((w - 10.0, w + 10.0) for w in weights), (-6.0, 8.0), (-12.0, 1.0)]


class GaussianProcess:
    """The posterior over functions, given points and values.

    Args:
        x: n x p points. y: n values.
        dimension: for each of the p columns, the dimension it belongs to; columns of one dimension share their length scale.
        start: `theta` of an earlier process of the same dimensions; fitting goes on from there.
        fit: False takes `start` as it is.
    """

    def __init__(self, x: Array, y: Array, dimension: NDArray[np.int64], *, start: Array | None = None, fit: bool = True) -> None:
        self._dimension = dimension
        self._prior = Prior.of(int(dimension.max()) + 1)
        self._center, self._scale = float(y.mean()), float(y.std()) or 1.0
        self._x, self._target = x, (y - self._center) / self._scale
        self.theta = self._prior.mean if start is None else start
        if fit:
            self.theta = self._fitted(FIRST_ITERATIONS if start is None else ITERATIONS)
        self._scaled = x * self._roots(self.theta)
        self._inverse = np.linalg.inv(self._covariance(self._scaled, self.theta))
        self._alpha = self._inverse @ self._target

    def predict(self, x: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of the function at each of the m x p points."""
        amplitude = math.exp(self.theta[-2])
        cross = amplitude * _matern(_squared(x * self._roots(self.theta), self._scaled))[0]
        variance = np.maximum(amplitude - ((cross @ self._inverse) * cross).sum(1), LEAST_VARIANCE)
        return self._center + self._scale * (cross @ self._alpha), self._scale * np.sqrt(variance)

    def _roots(self, theta: Array) -> Array:
        return np.exp(0.5 * theta[:-2])[self._dimension]

    def _covariance(self, scaled: Array, theta: Array) -> Array:
        covariance = math.exp(theta[-2]) * _matern(_squared(scaled, scaled))[0]
        covariance[np.diag_indices_from(covariance)] += math.exp(theta[-1]) + JITTER
        return covariance

    def _fitted(self, iterations: int) -> Array:
        options = {"maxiter": iterations}
        return minimize(self._loss, self.theta, jac=True, method="L-BFGS-B", bounds=self._prior.bounds, options=options).x

    def _loss(self, theta: Array) -> tuple[float, Array]:
        """Negative log posterior of the parameters, up to a constant, and its gradient."""
        amplitude, noise = np.exp(theta[-2:])
        scaled = self._x * self._roots(theta)
        matern, slope = _matern(_squared(scaled, scaled))
        covariance = amplitude * matern
        covariance[np.diag_indices_from(covariance)] += noise + JITTER
        try:
            factor = np.linalg.cholesky(covariance)
        except np.linalg.LinAlgError:
            return math.inf, np.zeros_like(theta)
        inverse = np.linalg.inv(covariance)
        alpha = inverse @ self._target
        residual = 0.5 * (inverse - np.outer(alpha, alpha))
        change = amplitude * residual * slope
        columns = 2.0 * (change.sum(1) @ scaled**2 - (scaled * (change @ scaled)).sum(0))
        weights = np.bincount(self._dimension, columns, minlength=len(theta) - 2)
        gradient = np.array([*weights, amplitude * (residual * matern).sum(), noise * np.trace(residual)])
        z = (theta - self._prior.mean) / self._prior.deviation
        loss = 0.5 * self._target @ alpha + np.log(np.diag(factor)).sum() + 0.5 * z @ z
        return float(loss), gradient + z / self._prior.deviation


def _squared(a: Array, b: Array) -> Array:
    return np.maximum((a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2.0 * a @ b.T, 0.0)


def _matern(squared: Array) -> tuple[Array, Array]:
    """Correlation at squared distances, and its derivative by them."""
    r = np.sqrt(5.0 * squared)
    decay = np.exp(-r)
    return (1.0 + r + r * r / 3.0) * decay, -5.0 / 6.0 * (1.0 + r) * decay
