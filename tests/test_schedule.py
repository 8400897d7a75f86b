from __future__ import annotations

import math
import time

import numpy as np
import pytest

from autocompress import schedule
from autocompress.ranking.ranks import partial_rank_correlation, rank_correlation
from autocompress.schedule import Clock, Division, extended, full_runs, full_seconds, profiling_seconds, reserve_seconds


def test_a_clock_counts_what_was_spent_before():
    clock = Clock.start(100.0, already=30.0)
    assert clock.elapsed == pytest.approx(30.0, abs=1.0)
    assert clock.left == pytest.approx(70.0, abs=1.0)
    assert clock.with_reserve(20.0).left == pytest.approx(50.0, abs=1.0)
    assert clock.with_reserve(1000.0).left == pytest.approx(40.0, abs=1.0), "the reserve takes at most 30 %"
    assert Clock.start(10.0, already=20.0).left == 0.0


@pytest.mark.parametrize("total", [60.0, 480.0, 3600.0])
@pytest.mark.parametrize("latency", [1e-3, 0.5])
@pytest.mark.parametrize("examples", [40, 10_000])
def test_the_end_has_time_to_measure_the_front_and_to_score_a_part_of_the_test_split_at_least(total, latency, examples):
    reserve = reserve_seconds(total, latency, examples, latency)
    measuring = schedule.FINAL_S + schedule.FINAL_CALLS * latency
    whole, least = (3.0 * latency * n for n in (examples, schedule.FEWEST_EXAMPLES))
    assert measuring + least <= reserve <= measuring + whole
    assert reserve == measuring + whole or reserve <= measuring + max(least, schedule.TEST_SHARE * total)


def test_a_clock_is_monotonic(monkeypatch):
    clock = Clock.start(10.0)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 0 <= clock.elapsed < 5


@pytest.mark.parametrize(("total", "expected"), [(100.0, 8.0), (3600.0, 120.0)])
def test_calibration_takes_a_small_share(total, expected):
    assert profiling_seconds(Clock.start(total)) == pytest.approx(expected, rel=0.01)
    assert profiling_seconds(Clock.start(total, already=total)) == 0.0


def test_a_short_run_trains_for_no_less_than_half_of_its_overhead():
    division = Division.of(left=100.0, overhead=1.0)
    assert division.short_total == pytest.approx(100 * schedule.SHORT_SHARE)
    assert division.short_each == pytest.approx(100 * schedule.SHORT_SHARE / schedule.SHORT_RUNS)
    assert division.training == pytest.approx(division.short_each - 1.0)
    division = Division.of(left=100.0, overhead=10.0)
    assert (division.training, division.short_each) == (5.0, 15.0)


def test_short_runs_take_more_than_their_share_where_they_would_be_too_few():
    assert Division.of(left=100.0, overhead=10.0).short_total == pytest.approx(schedule.FEWEST_SHORT_RUNS * 15.0)
    assert Division.of(left=100.0, overhead=20.0).short_total == pytest.approx(100 * schedule.MOST_SHORT_SHARE)
    assert Division.of(left=0.0, overhead=1.0).short_total == 0.0


@pytest.mark.parametrize(("telling_s", "training"), [(0.0, 24.0), (20.0, 24.0), (80.0, 80.0), (250.0, 250.0), (500.0, 500.0)])
def test_where_steps_are_slow_fewer_short_runs_train_until_they_tell(telling_s, training):
    """Seen on a slow machine: seventeen runs of thirty to ninety steps, which ranked policies by how many steps they had."""
    division = Division.of(left=1200.0, overhead=1.0, telling_s=telling_s)
    assert division.training == pytest.approx(training)
    assert division.short_each <= division.short_total <= schedule.MOST_SHORT_SHARE * 1200.0


def test_where_no_short_run_would_tell_one_of_them_leaves_the_time_to_a_full_run():
    division = Division.of(left=1200.0, overhead=1.0, telling_s=700.0)
    assert division.short_each == division.short_total == schedule.SHORT_SHARE * 1200.0
    assert Division.of(left=100.0, overhead=60.0, telling_s=700.0).training == schedule.LEAST_TRAINING_RATIO * 60.0


@pytest.mark.parametrize(
    ("left", "each", "candidates", "expected"),
    [
        (100.0, 36.0, 10, 3),
        (1000.0, 36.0, 10, schedule.MOST_FULL_RUNS),
        (1000.0, 36.0, 2, 2),
        (1.0, 36.0, 10, 1),
        (100.0, 36.0, 0, 0),
        (9.0, 0.0, 3, 3),
    ],
)
def test_how_many_full_runs_can_be_had(left, each, candidates, expected):
    assert full_runs(left, each, candidates) == expected


@pytest.mark.parametrize(("trials", "expected"), [(1, 1), (4, 1), (5, 2), (1000, schedule.MOST_FULL_RUNS)])
def test_a_limit_on_trials_limits_full_runs(trials, expected):
    assert full_runs(10_000.0, 4.0, 10, trials) == expected
    assert full_runs(10_000.0, 4.0, 10, trials, done=1) == min(expected, math.ceil(trials / schedule.TRIALS_A_FULL_RUN) - 1)


def test_full_runs_share_the_time_unless_trials_are_what_is_limited():
    assert full_seconds(900.0, [1e-3] * 3, [0.1] * 3, 4.0) == pytest.approx(300.0)
    assert full_seconds(900.0, [1e-3] * 3, [0.1] * 3, 36.0, trials=2) == 36.0
    assert full_seconds(9.0, [1e-3] * 3, [0.1] * 3, 36.0, trials=2) == pytest.approx(3.0)
    assert full_seconds(300.0, [1e-3], [0.1], 4.0) == pytest.approx(300.0)


def test_full_runs_leave_the_least_gaps_in_all():
    """Where a gap is narrowed by the root of the number of steps."""
    left, costs, gaps = 900.0, np.array([2e-3, 1e-3, 1.5e-3]), np.array([0.02, 0.08, 0.04])

    def remaining(seconds):
        return float(np.sum(gaps * np.sqrt(costs / seconds)))

    first = full_seconds(left, costs, gaps, 4.0)
    second = full_seconds(left - first, costs[1:], gaps[1:], 4.0)
    divided = np.array([first, second, left - first - second])
    drawn = left * np.random.default_rng(0).dirichlet(np.ones(3), 1000)
    assert remaining(divided) <= min(map(remaining, drawn))
    assert divided[1] > divided[2] > divided[0], "who has most to learn gets most"


def test_no_full_run_is_left_without_time():
    for costs, gaps in (([1e-6, 1e-3], [0.1, 0.1]), ([1e-3, 1e-3], [1e-6, 0.1]), ([1e-3, 1e-3], [-0.1, 0.1])):
        assert 0.2 * 900.0 < full_seconds(900.0, costs, gaps, 4.0) < 450.0
    assert full_seconds(900.0, [1e-3, 1e-3], [-0.1, -0.2], 4.0) == pytest.approx(450.0), "both are better than the original"


def test_rank_correlation():
    assert rank_correlation([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]) == pytest.approx(1.0)
    assert rank_correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    assert rank_correlation([1.0, 2.0], [1.0, 2.0]) is None
    assert rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert rank_correlation([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]) is None


def test_partial_rank_correlation_is_of_what_the_third_does_not_tell():
    latencies = np.arange(40.0)
    noise = np.random.default_rng(0).standard_normal((2, 40))
    left, right = (latencies + 3.0 * part for part in noise)
    assert rank_correlation(left, right) > 0.9
    assert abs(partial_rank_correlation(left, right, latencies)) < 0.35
    assert partial_rank_correlation(left, latencies + 3.0 * noise[0] + 0.1 * noise[1], latencies) > 0.9
    assert partial_rank_correlation(left, right, np.ones(40)) == rank_correlation(left, right)
    assert partial_rank_correlation(left[:5], right[:5], latencies[:5]) is None
    assert partial_rank_correlation(latencies, right, latencies) is None, "nothing is left of it"


def test_a_rung_gets_more_time_where_what_is_below_it_foretells_little():
    assert [extended(10.0, rho) for rho in (None, 0.9, 0.2, -1.0)] == [10.0, 10.0, 15.0, 15.0]
