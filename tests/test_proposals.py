from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.policy import DistillSpec, Policy, PruneSpec, StudentSpec
from autocompress.proposals import LevelSuggester, Proposal, outclassed, spread_over_latency, without_growth
from autocompress.records import Operator, Workload

seeds = st.integers(0, 2**32 - 1)


@settings(deadline=None)
@given(seeds, st.floats(0.01, 4), st.floats(0, 4), st.none() | st.floats(0.01, 2))
def test_draws_stay_in_their_range_and_on_their_grid(seed, low, span, step):
    suggester = LevelSuggester(np.random.default_rng(seed))
    value = suggester.suggest_float("prune:a", low, low + span, step=step)
    assert low <= value <= low + span
    if step is not None:
        assert (value - low) / step == pytest.approx(round((value - low) / step), abs=1e-6)
    assert low <= suggester.suggest_float("ratio", low, low + span, log=True) <= low + span
    assert suggester.suggest_int("depth:a", 2, 5) in range(2, 6)
    assert suggester.suggest_categorical("bits:a", [8, 32]) in (8, 32)


def test_a_grid_ends_at_its_end():
    values = {LevelSuggester(np.random.default_rng(seed)).suggest_float("w", 0.0, 0.3, step=0.1) for seed in range(200)}
    assert min(values) == 0.0
    assert max(values) == 0.3
    assert len(values) == 4


def draw(seed):
    suggester = LevelSuggester(np.random.default_rng(seed))
    values = [suggester.suggest_int(f"depth:{i}", 0, 9) for i in range(40)] + [suggester.suggest_float("alpha", 0, 1)]
    return suggester, values


def test_the_same_seed_draws_the_same_and_all_is_remembered():
    (one, values), (_, again), (_, other) = draw(1), draw(1), draw(2)
    assert values == again != other
    assert list(one.params.values()) == values


def test_dimensions_of_a_kind_scatter_around_one_level():
    means = [np.mean(draw(seed)[1][:40]) for seed in range(60)]
    independent_spread = np.std(np.arange(10)) / np.sqrt(40)
    assert np.std(means) > 4 * independent_spread, "independent draws would all look like the average"


@pytest.mark.parametrize(("low", "high", "expected"), [(1.0, 8.0, 4.0), (0.5, 4.0, 4.0)])
def test_first_policies_take_the_usual_distillation_where_the_space_allows_it(low, high, expected):
    for seed in range(5):
        suggester = LevelSuggester(np.random.default_rng(seed))
        assert suggester.suggest_float("temperature", low, high, log=True) == expected == DistillSpec().temperature
        assert suggester.suggest_float("alpha", 0.5, 1.0) == DistillSpec().alpha
        assert suggester.params == {"temperature": expected, "alpha": DistillSpec().alpha}


def test_where_the_space_leaves_the_usual_out_it_is_drawn():
    drawn = {LevelSuggester(np.random.default_rng(seed)).suggest_float("temperature", 5.0, 8.0) for seed in range(20)}
    assert len(drawn) > 10
    assert all(5.0 <= value <= 8.0 for value in drawn)


def proposal(name, latency, outputs, inherited=0):
    linear = Operator(name="l", kind="linear", inputs=((1, 4),), output=(1, outputs), params=outputs)
    policy = Policy(prune=PruneSpec(ratios={name: 0.5}))
    return Proposal(policy, {}, Workload(operators=(linear,), weight_bytes=0), latency, inherited)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(1e-4, 1), st.integers(1, 99), st.integers(0, 99)), max_size=30), st.integers(0, 6), st.floats(1e-4, 1))
def test_the_spread_is_within_the_limit_and_without_twins(triples, n, limit):
    candidates = [proposal(str(i), *triple) for i, triple in enumerate(triples)]
    chosen = spread_over_latency(candidates, n, limit)
    assert len(chosen) <= 2 * n
    assert len({c.policy.structure_digest for c in chosen}) == len(chosen)
    assert all(c.latency_s <= limit for c in chosen)
    assert bool(chosen) == bool(n and any(c.latency_s <= limit for c in candidates))


def test_each_latency_gets_the_network_that_inherits_most_and_every_second_the_largest():
    candidates = [proposal(f"{i}", 1e-3 * 2 ** (i // 4), outputs=1 + i % 4, inherited=4 - i % 4) for i in range(32)]
    chosen = spread_over_latency(candidates, 4, 0.128)
    latencies = sorted({c.latency_s for c in chosen}, reverse=True)
    assert len(latencies) == 4
    for index, latency in enumerate(latencies):
        kinds = {(c.workload.params, c.inherited_macs) for c in chosen if c.latency_s == latency}
        assert kinds == ({(1, 4), (4, 1)} if index % 2 == 0 else {(1, 4)})


def test_the_slow_end_of_the_range_is_left_out():
    candidates = [proposal(str(i), 1e-3 * 2**i, 1 + i, i) for i in range(8)]
    chosen = [c.latency_s for c in spread_over_latency(candidates, 2, 0.128)]
    assert chosen == [0.032, 0.002]


def test_policies_that_differ_in_distillation_only_count_once():
    policies = [Policy(distill=DistillSpec(alpha=a)) for a in (0.1, 0.9)]
    workload = Workload(operators=(), weight_bytes=0)
    twins = [Proposal(policy, {}, workload, latency, 0) for policy, latency in zip(policies, (0.001, 0.1), strict=True)]
    assert len(spread_over_latency(twins, 5, 1.0)) == 1


def test_without_growth_keeps_what_is_narrower():
    policy = Policy(student=StudentSpec(width=2.0, widths={"a": 0.5, "b": 1.5}))
    assert without_growth(policy).student == StudentSpec(widths={"a": 0.5, "b": 1.0})


def test_what_is_slower_smaller_and_keeps_less_is_outclassed_by_the_smaller_difference():
    known = [proposal("k", 0.01, outputs=100, inherited=80)]
    size = 1 - (40 * 40 / (100 * 100)) ** 0.5
    assert outclassed(proposal("a", 0.02, outputs=40, inherited=60), known) == pytest.approx(0.25)
    assert outclassed(proposal("b", 0.02, outputs=40, inherited=10), known) == pytest.approx(size)


@pytest.mark.parametrize(
    ("latency", "outputs", "inherited"),
    [(0.009, 40, 60), (0.02, 101, 60), (0.02, 40, 81), (0.01, 100, 80)],
    ids=["faster", "larger", "nearer", "equal"],
)
def test_what_is_better_in_one_respect_is_not_outclassed(latency, outputs, inherited):
    known = [proposal("k", 0.01, outputs=100, inherited=80), proposal("slow", 1.0, outputs=500, inherited=500)]
    assert outclassed(proposal("a", latency, outputs, inherited), known) == 0.0


def test_nothing_is_outclassed_by_nothing():
    assert outclassed(proposal("a", 0.02, 1), []) == 0.0
