"""The Pareto front: dominance and hypervolume. NumPy only.

A point is (gain, cost): gain is better when larger (accuracy), cost when smaller (latency in seconds).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from autocompress.errors import AutocompressError
from autocompress.records import Outcome

Points = NDArray[np.float64]
OUTLIER = 8.0
"""Times the distance of the median from the best score: scores further off are accidents, not the end of a range."""
COUNTED = 0.75
"""Share of the scores' range, from the best on, that counts before all else."""


def _finite(points: Points) -> Points:
    points = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    if not np.isfinite(points).all():
        raise AutocompressError("a Pareto front holds finite values only, but got NaN or infinity")
    return points


def non_dominated(points: Points) -> NDArray[np.bool_]:
    """Which rows of `points` (n x 2: gain, cost) no other row dominates. Of equal rows the first stays.

    Raises AutocompressError for NaN or infinity: an unmeasured point has no place on a front.
    """
    points = _finite(points)
    order = np.lexsort((-points[:, 0], points[:, 1]))
    keep = np.zeros(len(points), dtype=bool)
    best = -np.inf
    for index in order:
        if points[index, 0] > best:
            keep[index] = True
            best = points[index, 0]
    return keep


def hypervolume(points: Points, reference: tuple[float, float]) -> float:
    """Area that the points dominate up to `reference` (gain, cost): worst gain, largest cost that counts.

    Raises AutocompressError for NaN or infinity.
    """
    points = _finite(points)
    points = points[(points[:, 0] > reference[0]) & (points[:, 1] < reference[1])]
    front = points[non_dominated(points)]
    front = front[np.argsort(front[:, 1])]
    right = np.append(front[1:, 1], reference[1])
    return float(np.sum((front[:, 0] - reference[0]) * (right - front[:, 1])))


def least_counted(scores: Sequence[float]) -> float:
    """The score below which a policy is chosen only after all others: COUNTED of the way from the best score to the worst.

    The worst counts as OUTLIER times as far from the best as the median is, at most. Unlike a median this does not move where many scores
    are equal.
    """
    best = max(scores)
    worst = max(min(scores), best - OUTLIER * (best - float(np.median(scores))))
    return best - COUNTED * (best - worst)


def gain(outcome: Outcome) -> float:
    """Score on validation where more is better; below all others where there is none."""
    return outcome.val_score.gain if outcome.val_score is not None and outcome.failure is None else -math.inf


def cost(outcome: Outcome) -> float:
    """Median latency in units of what the original took in turns with the file; in seconds where it was not measured beside it.

    What was measured while the machine was slow can so be compared with what was measured while it was not.
    """
    assert outcome.latency_s is not None
    return outcome.latency_s.relative(1.0)


def measured(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """The outcomes that became an artifact with a score and a measurement."""
    return [o for o in outcomes if o.failure is None and o.val_score and o.latency_s and o.artifact]


def pareto_front(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """The outcomes that none dominates in gain and cost, fastest first."""
    candidates = measured(outcomes)
    if not candidates:
        return []
    keep = non_dominated(np.array([(gain(o), cost(o)) for o in candidates]))
    front = [o for o, kept in zip(candidates, keep, strict=True) if kept]
    return sorted(front, key=cost)
