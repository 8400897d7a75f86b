from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.policy import DistillSpec, Policy, PruneSpec
from autocompress.proposals import LevelSuggester, Proposal, spread_over_latency
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
    assert low <= suggester.suggest_float("temperature", low, low + span, log=True) <= low + span
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


def proposal(name, latency, outputs):
    linear = Operator(name="l", kind="linear", inputs=((1, 4),), output=(1, outputs), params=outputs)
    policy = Policy(prune=PruneSpec(ratios={name: 0.5}))
    return Proposal(policy, {}, Workload(operators=(linear,), weight_bytes=0), latency)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(1e-4, 1), st.integers(1, 99)), max_size=30), st.integers(0, 6), st.floats(1e-4, 1))
def test_the_spread_is_within_the_limit_and_the_largest_of_each_bin(pairs, n, limit):
    candidates = [proposal(str(i), latency, outputs) for i, (latency, outputs) in enumerate(pairs)]
    within = [c for c in candidates if c.latency_s <= limit]
    chosen = spread_over_latency(candidates, n, limit)
    assert len(chosen) <= n
    assert len({c.policy.structure_digest for c in chosen}) == len(chosen)
    assert all(c.latency_s <= limit for c in chosen)
    assert [c.latency_s for c in chosen] == sorted((c.latency_s for c in chosen), reverse=True)
    assert bool(chosen) == bool(within and n)
    if chosen:
        assert max(c.capacity for c in chosen) == max(c.capacity for c in within)


def test_the_fastest_and_the_slowest_bin_are_both_covered():
    candidates = [proposal(str(i), 1e-3 * 2**i, 1 + i) for i in range(8)]
    chosen = spread_over_latency(candidates, 4, 1.0)
    assert chosen[0].latency_s > 0.06
    assert chosen[-1].latency_s < 0.008


def test_policies_that_differ_in_distillation_only_count_once():
    policies = [Policy(distill=DistillSpec(alpha=a)) for a in (0.1, 0.9)]
    workload = Workload(operators=(), weight_bytes=0)
    twins = [Proposal(policy, {}, workload, latency) for policy, latency in zip(policies, (0.001, 0.1), strict=True)]
    assert len(spread_over_latency(twins, 5, 1.0)) == 1
