from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from autocompress.candidates.knapsack import Knapsack


def drawn(seed: int, dimensions: int = 4, resources: int = 2) -> Knapsack:
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 5, size=dimensions)
    return Knapsack([generator.random(size) for size in sizes], [generator.random((size, resources)) - 0.5 for size in sizes])


def every(knapsack: Knapsack) -> np.ndarray:
    return np.array([*itertools.product(*(range(len(losses)) for losses in knapsack.losses))])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.floats(-1.0, 1.0))
@example(93730106, -0.36923076520505)  # something keeps the limits, and something that loses less exceeds them by little
def test_the_best_choice_is_the_one_that_trying_all_finds(seed, limit):
    knapsack, limits = drawn(seed), np.array([limit, limit])
    choices = every(knapsack)
    losses, costs = knapsack.totals(choices)
    within = (costs <= limits).all(1)
    best = np.array([knapsack.best(limits)])
    loss, cost = knapsack.totals(best)
    if within.any():
        assert loss[0] == pytest.approx(losses[within].min(), abs=1e-6)
        assert (cost[0] <= limits + 1e-6).all()
    else:
        excess = np.maximum(0, costs - limits).sum(1)
        assert np.maximum(0, cost[0] - limits).sum() == pytest.approx(excess.min(), abs=1e-3), "what is nearest to the limits"


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(0, 4))
def test_no_more_dimensions_change_than_may(seed, changes):
    knapsack, limits = drawn(seed), np.array([0.2, 0.2])
    near = [0] * len(knapsack.losses)
    best = knapsack.best(limits, near=near, changes=changes)
    reachable = [choice for choice in every(knapsack) if (choice != 0).sum() <= changes]
    losses, costs = knapsack.totals(np.array(reachable))
    within = (costs <= limits).all(1)
    assert (np.array(best) != 0).sum() <= changes
    if within.any():
        assert knapsack.totals(np.array([best]))[0][0] == pytest.approx(losses[within].min(), abs=1e-6)


def test_a_limit_is_kept_where_something_keeps_it_whatever_that_loses():
    knapsack = Knapsack([np.array([0.0, 5.0])], [np.array([[0.0005], [-1.0]])])
    assert knapsack.best(np.array([0.0])) == [1]
    assert knapsack.best(np.array([-2.0])) == [1], "nothing does: what is nearest"


def test_sums_are_those_of_each_choice():
    knapsack = Knapsack([np.array([0.0, 1.0]), np.array([0.0, 2.0, 3.0])], [np.array([[0.0], [-1.0]]), np.array([[0.0], [-2.0], [-4.0]])])
    losses, costs = knapsack.totals(np.array([[0, 0], [1, 1], [1, 2]]))
    assert losses.tolist() == [0.0, 3.0, 4.0]
    assert costs[:, 0].tolist() == [0.0, -3.0, -5.0]


def test_without_dimensions_there_is_one_choice():
    assert Knapsack([], []).totals(np.zeros((3, 0), dtype=np.int64))[0].tolist() == [0.0] * 3
