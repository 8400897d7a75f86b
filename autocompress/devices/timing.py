"""What samples of a latency say: median with an interval, tail, and whether they can be trusted. Pure functions.

Samples come in rounds; between two rounds of one file every other file had its turn. Neighbouring samples are not independent
(caches, clock, other processes), so the interval of the median comes from the medians of the rounds, not from single samples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from autocompress.ranking.scores import Z95
from autocompress.records import Measurement

MEDIAN_FACTOR = 1.2533  # standard error of a median against that of a mean, for normal data: sqrt(pi / 2)
OUTLIER_SCORE = 14.8  # modified z-score of hyperfine
RELATIVE_FLOOR = 0.01  # the spread below which no sample is called an outlier
MOST_OUTLIERS = 0.05
WIDEST_IQR = 0.25
MOST_DRIFT = 0.05
FEWEST_ROUNDS = 6
"""With fewer, even the range of all samples holds the median with less than 95 %: 1 - 2 / 2^n."""

Samples = NDArray[np.float64]


def median_interval(rounds: ArrayLike) -> tuple[float, float, float]:
    """(median, low, high) of samples of shape rounds x samples.

    The interval is the wider of two: order statistics of all samples as if they were independent (binomial, normal approximation),
    and the median of the round medians plus and minus 1.96 * 1.2533 * their robust spread / sqrt(rounds). One sample gives itself.
    """
    values = np.atleast_2d(np.asarray(rounds, dtype=np.float64))
    flat = np.sort(values, axis=None)
    median = float(np.median(flat))
    n = flat.size
    reach = 0.5 * Z95 * np.sqrt(n)
    low = float(flat[max(0, int(np.floor(n / 2 - reach)))])
    high = float(flat[min(n - 1, int(np.ceil(n / 2 + reach)))])
    medians = np.median(values, axis=1)
    if len(medians) >= 3:
        spread = _robust_spread(medians)
        half = Z95 * MEDIAN_FACTOR * spread / np.sqrt(len(medians))
        low, high = min(low, median - half), max(high, median + half)
    return median, max(low, 0.0), high


def p95_high(samples: ArrayLike) -> float:
    """The smallest sample that the 95th percentile is below with 95 % (order statistics, binomial); else the largest, of fewer than 59."""
    from scipy.stats import binom  # slow to import, and of no use to who reads results

    ordered = np.sort(np.asarray(samples, dtype=np.float64), axis=None)
    above = np.flatnonzero(binom.cdf(np.arange(ordered.size), ordered.size, 0.95) >= 0.95)
    return float(ordered[above[0]] if above.size else ordered[-1])


def _robust_spread(values: Samples) -> float:
    """Standard deviation estimated by the median absolute deviation, or by the quartiles where more than half are equal."""
    deviation = float(np.median(np.abs(values - np.median(values)))) * 1.4826
    quartiles = np.subtract(*np.percentile(values, [75, 25])) / 1.349
    return max(deviation, float(quartiles))


def outlier_share(samples: ArrayLike) -> float:
    """Share of samples further than 14.8 robust standard deviations from the median (MAD with a floor of 1 % of the median)."""
    values = np.asarray(samples, dtype=np.float64).ravel()
    center = np.median(values)
    spread = max(float(np.median(np.abs(values - center))) * 1.4826, RELATIVE_FLOOR * float(center))
    return float(np.mean(np.abs(values - center) > OUTLIER_SCORE * spread)) if spread > 0 else 0.0


def drift(rounds: ArrayLike) -> float:
    """Relative change of the median between the first and the last third of the rounds."""
    medians = np.median(np.atleast_2d(np.asarray(rounds, dtype=np.float64)), axis=1)
    third = len(medians) // 3
    if third == 0:
        return 0.0
    return float(np.median(medians[-third:]) / np.median(medians[:third]) - 1.0)


def noise(rounds: ArrayLike) -> str:
    """Why the samples are not to be trusted, or an empty string."""
    values = np.atleast_2d(np.asarray(rounds, dtype=np.float64))
    median = float(np.median(values))
    iqr = float(np.subtract(*np.percentile(values, [75, 25])))
    reasons = []
    if len(values) < FEWEST_ROUNDS:
        reasons.append(f"{len(values)} of at least {FEWEST_ROUNDS} rounds were measured")
    if outlier_share(values) > max(MOST_OUTLIERS, 1 / values.size):  # of few samples one may be odd: the median outvotes it
        reasons.append(f"{100 * outlier_share(values):.0f} % of the samples are outliers")
    if iqr > WIDEST_IQR * median:
        reasons.append(f"the middle half of the samples spans {100 * iqr / median:.0f} % of the median")
    if abs(drift(values)) > MOST_DRIFT:
        reasons.append(f"the latency drifted by {100 * drift(values):+.0f} %")
    return "; ".join(reasons)


def summarise(rounds: ArrayLike, *, first_call: float, environment: dict[str, str]) -> Measurement:
    """A Measurement of samples in seconds, of shape rounds x samples."""
    values = np.atleast_2d(np.asarray(rounds, dtype=np.float64))
    median, low, high = median_interval(values)
    reason = noise(values)
    return Measurement(
        median=median, low=low, high=high, p95=float(np.percentile(values, 95)), p95_high=p95_high(values), n=int(values.size),
        iqr=float(np.subtract(*np.percentile(values, [75, 25]))), first_call=first_call,
        noisy=bool(reason), noise_reason=reason, environment=environment,
        samples=tuple(map(tuple, values.tolist())),
    )  # fmt: skip
