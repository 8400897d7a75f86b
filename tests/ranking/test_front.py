from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.errors import AutocompressError
from autocompress.policy import Policy
from autocompress.ranking.front import hypervolume, non_dominated, pareto_front
from autocompress.records import Failure, Measurement, Outcome, Score

REFERENCE = (0.0, 10.0)
numbers = st.integers(-2, 12).map(float) | st.floats(-2, 12, width=32)
point_lists = st.lists(st.tuples(numbers, numbers), max_size=25)


def dominates(a, b):
    return a[0] >= b[0] and a[1] <= b[1] and a != b


def front_values(points):
    return sorted(p for p, kept in zip(points, non_dominated(np.array(points)), strict=True) if kept)


def staircase_area(points):
    """Area by one strip for each pair of neighbouring costs."""
    inside = [p for p in points if p[0] > REFERENCE[0] and p[1] < REFERENCE[1]]
    costs = [*sorted({p[1] for p in inside}), REFERENCE[1]]
    strips = itertools.pairwise(costs)
    return sum((right - left) * (max(p[0] for p in inside if p[1] <= left) - REFERENCE[0]) for left, right in strips)


@settings(deadline=None)
@given(point_lists)
def test_the_front_is_what_brute_force_keeps(points):
    assert front_values(points) == sorted({p for p in points if not any(dominates(q, p) for q in points)})


@settings(deadline=None)
@given(point_lists.flatmap(lambda points: st.tuples(st.just(points), st.permutations(points + points[:3]))))
def test_the_front_ignores_order_and_duplicates(both):
    points, shuffled = both
    assert front_values(points) == front_values(shuffled)
    assert hypervolume(np.array(points), REFERENCE) == pytest.approx(hypervolume(np.array(shuffled), REFERENCE))


@settings(deadline=None)
@given(point_lists, st.sampled_from([2**-10, 0.5, 1024.0]))
def test_the_front_ignores_units(points, unit):
    scaled = np.array(points).reshape(-1, 2) * [1.0, unit]
    assert (non_dominated(scaled) == non_dominated(np.array(points))).all()
    area = hypervolume(scaled, (REFERENCE[0], REFERENCE[1] * unit))
    assert area == pytest.approx(unit * hypervolume(np.array(points), REFERENCE), abs=1e-9)


@settings(deadline=None)
@given(point_lists)
def test_hypervolume_is_the_area_of_the_staircase(points):
    assert hypervolume(np.array(points), REFERENCE) == pytest.approx(staircase_area(points), abs=1e-9)


@settings(deadline=None)
@given(point_lists, st.tuples(numbers, numbers))
def test_another_point_never_lowers_hypervolume(points, point):
    assert hypervolume(np.array([*points, point]), REFERENCE) >= hypervolume(np.array(points), REFERENCE) - 1e-9


def test_of_equal_points_the_first_stays():
    assert non_dominated(np.array([[1.0, 2.0], [1.0, 2.0]])).tolist() == [True, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("function", [non_dominated, lambda points: hypervolume(points, REFERENCE)])
def test_points_that_are_not_finite_are_refused(function, column, bad):
    points = np.array([[1.0, 1.0], [2.0, 2.0]])
    points[1, column] = bad
    with pytest.raises(AutocompressError, match="finite"):
        function(points)


def test_no_points_are_an_empty_front():
    empty = np.empty((0, 2))
    assert non_dominated(empty).tolist() == []
    assert hypervolume(empty, REFERENCE) == 0.0
    assert pareto_front([]) == []


def outcome(name, accuracy, latency, **others):
    seconds = Measurement(median=latency, low=0.9 * latency, high=1.1 * latency, p95=1.2 * latency, n=50)
    values = {"val_score": Score(value=accuracy), "latency_s": seconds, "size_bytes": 100, "artifact": f"{name}.onnx"}
    return Outcome(id=name, policy=Policy(), rung="full", **values | others)


OUTCOMES = [
    outcome("big", 0.95, 0.010),
    outcome("small", 0.80, 0.002),
    outcome("worse", 0.79, 0.003),
    outcome("middle", 0.90, 0.005),
    outcome("twin", 0.90, 0.006),
    outcome("failed", 0.99, 0.001, artifact=None, failure=Failure(stage="export", reason="mismatch")),
    outcome("unmeasured", 0.99, 0.001, latency_s=None),
    outcome("unscored", 0.99, 0.001, val_score=None),
]


def test_the_front_of_outcomes_is_fastest_first_without_failures():
    assert [o.id for o in pareto_front(OUTCOMES)] == ["small", "middle", "big"]
