from __future__ import annotations

import time
from itertools import combinations

import numpy as np
import pytest

from autocompress import schedule
from autocompress.front import hypervolume
from autocompress.policy import DistillSpec, Policy
from autocompress.ranks import partial_rank_correlation, rank_correlation
from autocompress.records import Failure, Measurement, Outcome, Score
from autocompress.schedule import Clock, Division, extended, full_runs, full_seconds, profiling_seconds, promoted, reserve_seconds


def outcome(id, score, latency_s, **changes):
    latency = Measurement(median=latency_s, low=latency_s, high=latency_s, p95=latency_s, n=9)
    policy = Policy(distill=DistillSpec(temperature=1 + len(id) / 10))
    made = Outcome(id=id, policy=policy, rung="short", val_score=Score(value=score), latency_s=latency, artifact="a.onnx")
    return made.model_copy(update=changes)


def ids(outcomes):
    return [o.id for o in outcomes]


FRONT = [outcome("a", 0.70, 0.001), outcome("b", 0.80, 0.002), outcome("c", 0.90, 0.004), outcome("d", 0.93, 0.008)]


def test_all_climb_when_there_is_room():
    assert set(ids(promoted(FRONT, 10))) == {"a", "b", "c", "d"}
    assert set(ids(promoted([*FRONT, outcome("e", 0.1, 0.01)], 10))) == {"a", "b", "c", "d", "e"}, "a dominated one comes last, but comes"


def test_a_dominated_policy_comes_after_those_that_dominate_it():
    dominated = outcome("e", 0.69, 0.0075)
    assert ids(promoted([dominated, *FRONT], 5))[-1] == "e"


@pytest.mark.parametrize("n", [0, -1])
def test_nobody_climbs_without_room(n):
    assert promoted(FRONT, n) == []


def test_nobody_climbs_without_candidates():
    assert promoted([], 3) == []
    assert promoted([], 3, FRONT) == []
    failed = outcome("f", 0.9, 0.001, failure=Failure(stage="train", reason="diverged"), artifact=None)
    assert promoted([failed], 3) == []


def test_the_greedy_choice_is_close_to_the_best_subset():
    """Greedy selection reaches 1 - 1/e of the best subset (Nemhauser et al. 1978); here it is far closer."""
    draw = np.random.default_rng(3)
    for _ in range(10):
        outcomes = [outcome(f"{i}", float(s), float(t)) for i, (s, t) in enumerate(draw.uniform(0.01, 1.0, (8, 2)))]
        points = np.array([[o.val_score.gain, np.log(o.latency_s.median)] for o in outcomes])
        reference = (schedule.halfway(points[:, 0]), points[:, 1].max() + np.log(schedule.WORST_SLOWNESS))
        volume = {o.id: p for o, p in zip(outcomes, points, strict=True)}
        chosen = hypervolume(np.array([volume[o.id] for o in promoted(outcomes, 3)]), reference)
        best = max(hypervolume(np.array(subset), reference) for subset in combinations(points, 3))
        assert chosen >= 0.9 * best


def test_the_best_comes_first_and_then_what_dominates_most_of_what_scores_above_halfway():
    tiny = [outcome(f"tiny{i}", 0.3 + i / 100, 1e-5) for i in range(4)]
    outcomes = [*tiny, outcome("knee", 0.9, 0.0015), outcome("high", 0.91, 0.01), outcome("low", 0.7, 0.001)]
    assert ids(promoted(outcomes, 2)) == ["high", "knee"]
    assert ids(promoted(outcomes, 1, [outcome("s", 0.95, 0.02)])) == ["knee"], "a better one is settled"


def test_who_climbs_does_not_depend_on_where_many_were_tried():
    """Copies of one network, or many beside it, are no reason to leave out the fast half of the front."""
    line = [outcome(f"{i}", 0.7 + 0.02 * i, 0.001 * 1.4**i) for i in range(11)]
    crowd = [outcome(f"crowd{i}", 0.87 + i / 1000, 0.001 * 1.4**9 * (1 + i / 100)) for i in range(8)]
    fast = {"5", "6", "7"}
    assert set(ids(promoted(line, 3))) & fast
    assert set(ids(promoted([*line, *crowd], 3))) & fast


def test_one_score_that_is_beyond_all_others_does_not_move_halfway():
    scores = [-0.3, -0.4, -0.45, -0.5, -0.6]
    assert schedule.halfway(scores) == pytest.approx(-0.45)
    assert schedule.halfway([*scores, -30.0]) > -1.5
    assert schedule.halfway([0.5]) == 0.5


def test_tiny_and_bad_networks_climb_last():
    tiny = [outcome(f"tiny{i}", 0.3 + i / 100, 1e-5) for i in range(4)]
    assert set(ids(promoted([*tiny, *FRONT], 4))) == {"a", "b", "c", "d"}
    assert ids(promoted([*tiny, *FRONT], 5))[-1] == "tiny3", "then the one of the rest that adds most to the whole"


def test_neighbours_of_a_settled_point_wait():
    """The runs spread over the front: what lies beside a policy that is trained already adds little."""
    settled = [outcome("s", 0.901, 0.0039, rung="full")]
    assert "c" in ids(promoted(FRONT, 3))
    chosen = ids(promoted(FRONT, 2, settled))
    assert "c" not in chosen
    assert not set(chosen) & {"s"}, "what is settled does not climb again"


def test_runs_spread_over_clusters():
    clusters = [
        outcome(f"{name}{i}", score + i / 1000, t * (1 + i / 1000))
        for name, score, t in (("x", 0.8, 0.001), ("y", 0.9, 0.01), ("z", 0.1, 0.0005))
        for i in range(4)
    ]
    assert {id[0] for id in ids(promoted(clusters, 2))} == {"x", "y"}


def test_scores_to_be_minimised_climb_by_their_gain():
    loss = [outcome(o.id, 1 - o.val_score.value, o.latency_s.median) for o in FRONT]
    loss = [o.model_copy(update={"val_score": Score(name="loss", value=o.val_score.value, direction="minimize")}) for o in loss]
    assert ids(promoted(loss, 2)) == ids(promoted(FRONT, 2))


def test_promotion_does_not_depend_on_the_unit_of_latency():
    slower = [outcome(o.id, o.val_score.value, 1000 * o.latency_s.median) for o in FRONT]
    assert ids(promoted(slower, 3)) == ids(promoted(FRONT, 3))


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


@pytest.mark.parametrize(("telling_s", "training"), [(0.0, 24.0), (20.0, 24.0), (80.0, 80.0), (500.0, 199.0)])
def test_where_steps_are_slow_fewer_short_runs_train_until_they_tell(telling_s, training):
    """Seen on a slow machine: seventeen runs of thirty to ninety steps, which ranked policies by how many steps they had."""
    division = Division.of(left=1200.0, overhead=1.0, telling_s=telling_s)
    assert division.training == pytest.approx(training)
    assert schedule.FEWEST_SHORT_RUNS * division.short_each <= division.short_total <= schedule.MOST_SHORT_SHARE * 1200.0


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


def test_full_runs_share_the_time_unless_trials_are_what_is_limited():
    assert full_seconds(900.0, [1e-3] * 3, 4.0) == pytest.approx(300.0)
    assert full_seconds(900.0, [1e-3] * 3, 36.0, trials=2) == 36.0
    assert full_seconds(9.0, [1e-3] * 3, 36.0, trials=2) == pytest.approx(3.0)


def test_full_runs_see_the_data_equally_often():
    assert full_seconds(900.0, [2e-3, 1e-3], 4.0) == pytest.approx(600.0)
    assert full_seconds(300.0, [1e-3], 4.0) == pytest.approx(300.0)
    assert full_seconds(900.0, [1e-6, 1e-3], 4.0) == pytest.approx(180.0), "a tiny one is not left without time"


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
