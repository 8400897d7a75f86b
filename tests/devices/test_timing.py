from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.budget import Budget
from autocompress.devices.timing import FEWEST_ROUNDS, drift, median_interval, noise, outlier_share, p95_high, summarise

ROUNDS, SAMPLES, REPEATS = 24, 5, 600


def steady(seed=0, spread=0.01):
    return 1e-3 * (1 + spread * np.random.default_rng(seed).standard_normal((ROUNDS, SAMPLES)))


def test_steady_samples_are_not_noisy():
    assert noise(steady()) == ""


@pytest.mark.parametrize(("share", "noisy"), [(0.02, False), (0.15, True)])
def test_spikes(share, noisy):
    samples = steady()
    flat = samples.reshape(-1)
    flat[: round(share * flat.size)] *= 50
    assert ("outliers" in noise(samples)) is noisy
    assert outlier_share(samples) == pytest.approx(share, abs=0.01)
    assert median_interval(samples)[0] == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize(("change", "noisy"), [(0.02, False), (0.2, True), (-0.2, True)])
def test_drift(change, noisy):
    samples = steady(spread=0.001) * np.linspace(1, 1 + change, ROUNDS)[:, None]
    assert drift(samples) == pytest.approx(change * 2 / 3, abs=0.25 * abs(change))
    assert ("drifted" in noise(samples)) is noisy


def test_a_tight_cluster_has_no_outliers():
    samples = steady(spread=1e-6)
    samples[:, 0] *= 1.02
    assert outlier_share(samples) == 0.0
    assert noise(samples) == ""


def test_two_modes():
    samples = steady()
    samples[:, ::2] *= 2
    assert "middle half" in noise(samples)


def test_fewer_rounds_could_not_give_an_interval_of_95_percent():
    """The range of n samples misses the median where all lie on one side of it."""
    assert 1 - 2 / 2 ** (FEWEST_ROUNDS - 1) < 0.95 <= 1 - 2 / 2**FEWEST_ROUNDS


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 1), (FEWEST_ROUNDS - 1, 1), (FEWEST_ROUNDS, 1), (12, 5)])
def test_constant_samples_and_a_single_one_give_themselves(shape):
    samples = np.full(shape, 2e-3)
    assert median_interval(samples) == (2e-3, 2e-3, 2e-3)
    few = f"{shape[0]} of at least {FEWEST_ROUNDS} rounds were measured"
    assert noise(samples) == (few if shape[0] < FEWEST_ROUNDS else "")
    found = summarise(samples, first_call=1.0, environment={"cpu": "x"})
    assert (found.median, found.p95, found.n, found.iqr, found.noisy) == (2e-3, 2e-3, samples.size, 0.0, shape[0] < FEWEST_ROUNDS)


@pytest.mark.parametrize(("odd", "noisy"), [(1, False), (2, True)])
def test_of_few_samples_one_may_be_odd(odd, noisy):
    samples = steady()[:12, :1]
    samples[3 : 3 + odd] *= 1.5
    assert ("outliers" in noise(samples)) is noisy


def coverage(draw):
    """Share of repetitions whose interval holds the true median of 1, and the mean width of the intervals."""
    intervals = np.array([median_interval(draw(np.random.default_rng(seed)))[1:] for seed in range(REPEATS)])
    return np.mean((intervals[:, 0] <= 1) & (intervals[:, 1] >= 1)), np.mean(intervals[:, 1] - intervals[:, 0])


def independent(generator):
    return np.exp(0.05 * generator.standard_normal((ROUNDS, SAMPLES)))


def shared_by_a_round(generator):
    return np.exp(0.05 * generator.standard_normal((ROUNDS, 1)) + 0.01 * generator.standard_normal((ROUNDS, SAMPLES)))


def slow_calls(generator):
    return np.exp(0.05 * generator.standard_normal((12, 1)))


def very_slow_calls(generator):
    return np.exp(0.05 * generator.standard_normal((5, 1)))


def a_single_round(generator):
    return np.exp(0.05 * generator.standard_normal(101))


@pytest.mark.parametrize(
    ("draw", "ideal"),
    [(independent, ROUNDS * SAMPLES), (shared_by_a_round, ROUNDS), (a_single_round, 101), (slow_calls, 12), (very_slow_calls, 5)],
)
def test_the_interval_covers_the_median_at_its_stated_rate(draw, ideal):
    share, width = coverage(draw)
    assert share >= 0.93  # 0.95 less what 24 rounds and 600 repetitions allow
    assert width < 1.6 * 2 * 1.96 * 1.2533 * 0.05 / np.sqrt(ideal), "and it is not much wider than need be"


rounds = st.integers(1, 8).flatmap(lambda n: st.lists(st.lists(st.floats(1e-6, 10), min_size=n, max_size=n), min_size=1, max_size=9))


@settings(deadline=None)
@given(rounds, st.sampled_from([2.0**-20, 0.5, 1024.0]))
def test_intervals_hold_the_median_and_follow_the_unit(samples, unit):
    median, low, high = median_interval(samples)
    assert 0 <= low <= median <= high
    assert median_interval(np.multiply(samples, unit)) == pytest.approx((unit * median, unit * low, unit * high))
    assert outlier_share(np.multiply(samples, unit)) == outlier_share(samples)
    found = summarise(samples, first_call=0.0, environment={})
    assert found.noisy == bool(noise(samples)) == bool(found.noise_reason)
    assert np.min(samples) <= found.median <= np.max(samples)


def test_the_upper_end_of_the_95th_percentile_holds_it():
    """In 95 of 100 repetitions; of fewer than 59 samples the largest is all that can be said."""
    generator = np.random.default_rng(0)
    assert p95_high(np.arange(1.0, 59.0)) == 58.0
    for n in (59, 100, 1000):
        held = [p95_high(generator.exponential(size=n)) >= -np.log(0.05) for _ in range(400)]
        assert 0.92 < np.mean(held) <= 1.0
        assert p95_high(np.full(n, 2.0)) == 2.0
    assert p95_high(generator.uniform(size=10_000)) < 0.96, "not the largest of many"


def test_a_budget_of_the_tail_is_held_against_the_upper_end():
    found = summarise(np.linspace(1e-3, 2e-3, 60).reshape(12, 5), first_call=1e-3, environment={})
    assert found.p95 < found.tail == found.p95_high == 2e-3
    budget = Budget(p95_s=0.5 * (found.p95 + found.tail))
    assert not budget.allows(found, 1)
    assert budget.allows(found.model_copy(update={"p95_high": None}), 1), "as results of before knew it"
    assert found.times(2.0).tail == 4e-3
