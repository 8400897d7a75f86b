from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from autocompress.candidates.proposals import (
    KEPT_EACH,
    LEAST_LEFT,
    LEAST_RANGE,
    Proposal,
    capacity,
    elites,
    inheritance,
    outclassed,
)
from autocompress.graph import Workloads
from autocompress.policy import Policy, PruneSpec
from autocompress.suggesters import LevelSuggester, Variation
from autocompress.workload import Operator, Workload

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


def proposal(name, latency, outputs=1, inherited=0.5):
    linear = Operator(name="l", kind="linear", inputs=((1, 4),), output=(1, outputs), params=outputs)
    policy = Policy(prune=PruneSpec(ratios={name: 0.5}))
    return Proposal(policy, {}, Workload(operators=(linear,), weight_bytes=0), latency, inherited, capacity=outputs)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(1e-4, 1), st.floats(0, 1)), min_size=1, max_size=40), st.floats(1e-4, 1))
@example([(0.49999, 0.0), *[(0.5, 0.9 + i / 100) for i in range(9)]], 1.0)
def test_elites_hold_the_fastest_and_the_best_of_each_latency(drawn, limit):
    pool = [proposal(str(i), latency, inherited=share) for i, (latency, share) in enumerate(drawn)]
    cells = elites(pool, limit, lambda p: p.inheritance)
    kept, fastest = list(itertools.chain(*cells)), min(p.latency_s for p in pool)
    assert min(p.latency_s for p in kept) == fastest
    within = [p for p in pool if p.latency_s <= max(limit, LEAST_RANGE * fastest)]
    assert max(p.inheritance for p in kept) == max(p.inheritance for p in within)
    assert set(map(id, kept)) <= set(map(id, within))
    assert all(len(cell) <= KEPT_EACH for cell in cells[1:])
    assert all(cell == sorted(cell, key=lambda p: -p.inheritance) for cell in cells[1:])


def test_elites_that_are_alike_in_all_that_is_known_are_one():
    twins = [proposal("a", 0.1), proposal("b", 0.1), proposal("c", 0.1, inherited=0.6)]
    (cell,) = elites(twins, 1.0, lambda p: p.inheritance)
    assert [p.policy for p in cell] == [twins[2].policy, twins[0].policy]


def test_of_networks_that_inherit_alike_the_larger_one_leads():
    small, large = proposal("small", 0.0015, outputs=4), proposal("large", 0.0015, outputs=5)
    assert small.promise < large.promise < proposal("kept", 0.0015, outputs=4, inherited=0.7).promise


def test_capacity_is_the_geometric_mean_of_arithmetic_and_weights():
    layer = conv(8, 16)
    once, none = (Workloads(((layer,),), np.array([[which]]), np.zeros(1, dtype=int)) for which in (0, -1))
    assert capacity(once) == pytest.approx([math.sqrt(layer.macs * layer.params)])
    assert capacity(none) == [1.0]


def conv(channels, size, name="c"):
    shape = (1, channels, size, size)
    return Operator(name=name, kind="conv", inputs=(shape,), output=shape, kernel=(3, 3), params=9 * channels * channels)


def work(*operators):
    return Workload(operators=operators, weight_bytes=0)


def inherited(student, teacher):
    """Of one student."""
    n = len(student.operators)
    return inheritance(Workloads(tuple((o,) for o in student.operators), np.zeros((n, 1), dtype=int), np.zeros(1, dtype=int)), teacher)[0]


def test_inheritance_is_the_geometric_mean_over_resolutions():
    teacher = work(conv(8, 16, "a"), conv(8, 16, "b"), conv(16, 8, "c"))
    assert inherited(teacher, teacher) == pytest.approx(1.0)
    assert inherited(work(conv(8, 16, "a"), conv(16, 8, "c")), teacher) == pytest.approx(0.5**0.5)
    assert inherited(work(conv(8, 16, "a"), conv(8, 16, "b"), conv(8, 8, "c")), teacher) == pytest.approx(0.25**0.5)


def test_what_a_pruned_width_leaves_of_a_layer_on_tokens_counts():
    """The positions at which it computes are the tokens, however many channels it has for each."""

    def mlp(hidden: int) -> Workload:
        shapes = ((1, 49, 16), (1, 49, hidden), (1, 49, 16))
        return work(*(Operator(name=str(i), kind="linear", inputs=(a,), output=b) for i, (a, b) in enumerate(itertools.pairwise(shapes))))

    def read(hidden: int) -> Workload:
        shapes = ((7, 1, 16), (4 * hidden, 16), (4 * hidden, hidden))
        return work(Operator(name="lstm", kind="recurrent", inputs=shapes, output=(7, 1, hidden), function="lstm"))

    assert inherited(mlp(16), mlp(64)) == pytest.approx(0.25)
    assert inherited(read(8), read(16)) == pytest.approx(8 * (16 + 8) / (16 * (16 + 16)))


def test_losing_a_whole_stage_weighs_more_than_the_same_arithmetic_everywhere():
    teacher = work(*(conv(8, size, f"{size}{i}") for size in (32, 16) for i in range(2)))
    spread, lost = work(conv(8, 32), conv(8, 16)), work(conv(8, 32, "a"), conv(8, 32, "b"))
    assert inherited(lost, teacher) < 0.2 * inherited(spread, teacher)
    assert inherited(work(), work()) == 1.0
    assert inherited(work(), teacher) == pytest.approx(LEAST_LEFT), "a student that could not be traced has no operators"


def space(suggester):
    return [suggester.suggest_int(f"depth:{i}", 0, 9) for i in range(10)] + [
        suggester.suggest_float(f"width:{i}", 0.5, 3.0, step=0.25) for i in range(10)
    ]


def variation(parent, seed=0):
    return Variation(parent, LevelSuggester(np.random.default_rng(seed)))


def test_a_variation_changes_a_few_dimensions_and_remembers_all():
    parent = LevelSuggester(np.random.default_rng(0))
    values, changed = space(parent), []
    for seed in range(200):
        child = variation(parent.params, seed)
        drawn = space(child)
        assert list(child.params) == list(parent.params)
        assert list(child.params.values()) == drawn
        changed.append(sum(a != b for a, b in zip(values, drawn, strict=True)))
    assert 0.5 < np.mean(changed) < 2.0
    assert max(changed) < 10


def test_a_variation_draws_what_its_parent_did_not_know():
    child = variation({"a": 1})
    assert child.suggest_categorical("new", ["x", "y"]) in ("x", "y")


def test_a_variation_keeps_to_ranges_that_depend_on_other_draws():
    """As in k = suggest_int("k", 1, n)."""
    for seed in range(100):
        child = variation({"n": 4, "k": 4, "kind": "large"}, seed)
        n = child.suggest_int("n", 1, 4)
        assert 1 <= child.suggest_int("k", 1, n) <= n
        assert child.suggest_categorical("kind", ["small", "tiny"]) in ("small", "tiny")


def test_what_a_space_of_ones_own_may_draw():
    suggester = LevelSuggester(np.random.default_rng(3))
    assert suggester.suggest_categorical("kind", ["small", "large", None]) in ("small", "large", None)
    assert suggester.suggest_categorical("share", [0.25, 0.5]) in (0.25, 0.5)
    assert suggester.suggest_int("even", 2, 9, step=2) in (2, 4, 6, 8)
    assert 1 <= suggester.suggest_int("log", 1, 1000, log=True) <= 1000
    assert len(suggester.params) == 4


def test_what_is_slower_smaller_and_keeps_less_is_outclassed_by_the_smaller_difference():
    known = [proposal("k", 0.01, outputs=100, inherited=0.8)]
    size = 1 - (40 * 40 / (100 * 100)) ** 0.5
    assert outclassed(proposal("a", 0.02, outputs=40, inherited=0.6), known) == pytest.approx(0.25)
    assert outclassed(proposal("b", 0.02, outputs=40, inherited=0.1), known) == pytest.approx(size)


@pytest.mark.parametrize(
    ("latency", "outputs", "inherited"),
    [(0.009, 40, 0.6), (0.02, 101, 0.6), (0.02, 40, 0.81), (0.01, 100, 0.8)],
    ids=["faster", "larger", "nearer", "equal"],
)
def test_what_is_better_in_one_respect_is_not_outclassed(latency, outputs, inherited):
    known = [proposal("k", 0.01, outputs=100, inherited=0.8), proposal("slow", 1.0, outputs=500, inherited=1.0)]
    assert outclassed(proposal("a", latency, outputs, inherited), known) == 0.0


def test_nothing_is_outclassed_by_nothing():
    assert outclassed(proposal("a", 0.02, 1), []) == 0.0
