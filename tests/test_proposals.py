from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.policy import DistillSpec, Policy, PruneSpec, StudentSpec
from autocompress.proposals import LevelSuggester, Proposal, spread_over_latency, without_growth
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


def test_each_latency_gets_the_largest_network_and_the_one_that_inherits_most():
    candidates = [proposal(f"{i}", 1e-3 * 2 ** (i // 4), outputs=1 + i % 4, inherited=4 - i % 4) for i in range(32)]
    chosen = spread_over_latency(candidates, 4, 0.128)
    assert {(c.workload.params, c.inherited_macs) for c in chosen} == {(4, 1), (1, 4)}
    assert len({c.latency_s for c in chosen}) == 4


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
