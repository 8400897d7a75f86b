"""What dimensions lose alone, and the policies that are best by it, on a network that is measured by a fake device."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
from optuna.trial import FixedTrial

from autocompress.budget import Budget
from autocompress.candidates.pool import draw_pool
from autocompress.candidates.sensitivity import BITS_LOSS, LEVELS, Sensitivity
from autocompress.policy import Policy, PruneSpec, QuantSpec, StudentSpec
from autocompress.search_space import PruneSpace, QuantSpace, SearchSpace, SpaceSpec
from autocompress.suggesters import MOST_VALUES, DimensionRecorder


@pytest.fixture
def own(forecast):
    """A forecast whose limits a test may change."""
    return replace(forecast, model=copy.copy(forecast.model), networks=dict(forecast.networks))


def of(forecast, worth=lambda policy: None):
    return Sensitivity(forecast, worth)


def pruned(forecast, ratio):
    groups = [group.name for group in forecast.setting.graphs[None].groups if group.prunable and not group.stream]
    return PruneSpec(ratios=dict.fromkeys(groups, ratio))


def test_the_least_compressed_policy_is_the_unchanged_network(own):
    base = of(own).base
    assert own.structure(base.policy) == own.structure(Policy())
    assert base.inheritance == pytest.approx(1.0)


def test_the_least_compressed_policy_of_a_space_that_has_no_unchanged_network_is_the_nearest(own):
    def suggest(trial):
        width = trial.suggest_categorical("width", [3.0, 0.5, 0.75])
        return Policy(student=StudentSpec(width=width), prune=pruned(own, trial.suggest_float("prune", 0.25, 0.75, step=0.25)))

    own.space = suggest
    assert of(own).base.params == {"width": 3.0, "prune": 0.5}, "it keeps all of the teacher, with the fewest channels beside"


def test_every_dimension_is_tried_alone_its_far_end_first_and_what_costs_nothing_is_not_tried(own):
    sensitivity = of(own)
    tried, base = [*sensitivity.untried()], sensitivity.base
    changed = [[name for name in base.params if proposal.params[name] != base.params[name]] for proposal in tried]
    assert all(len(names) == 1 for names in changed)
    dimensions = [names[0] for names in changed]
    assert max(map(dimensions.count, dimensions)) <= LEVELS
    first = dimensions[: len(set(dimensions))]
    assert len(set(first)) == len(first), "once each, before any is tried again"
    assert all(p.latency_s < base.latency_s for p in tried)
    assert all(p.inheritance < 1 or p.policy.quant != base.policy.quant for p in tried), "added channels start as the same function"
    for name in set(dimensions):
        mine = [p.inheritance for p, dimension in zip(tried, dimensions, strict=True) if dimension == name]
        assert mine[0] == min(mine), "its far end"


def test_what_was_tried_is_not_tried_again_and_half_of_the_dimensions_are_enough(own):
    known = set()
    sensitivity = of(own, lambda policy: 0.5 if policy.digest in known else None)
    dimensions = sensitivity.missing
    for count, proposal in enumerate(sensitivity.untried()):
        assert proposal.policy.digest not in known
        known.add(proposal.policy.digest)
        assert sensitivity.missing == max(0, dimensions - count - 1), "each is another dimension, until half of them were tried"
    assert [*sensitivity.untried()] == []


def test_losses_are_what_was_found_and_between_that_in_proportion_to_what_is_lost(own):
    sensitivity = of(own)
    levels = [single for singles in sensitivity.singles for single in singles if single.lost > 0]
    found = {own.structure(single.proposal.policy): math.exp(-2 * single.lost) for single in levels[: len(levels) // 2]}
    sensitivity = of(own, lambda policy: found.get(own.structure(policy)))
    for singles, losses in zip(sensitivity.singles, sensitivity.losses(), strict=True):
        for single, loss in zip(singles, losses, strict=True):
            bits = single.proposal.policy.quant != sensitivity.base.policy.quant
            assert loss == pytest.approx(BITS_LOSS if bits else 2 * single.lost, abs=1e-5), "as much for what was not tried"


def test_the_best_policies_keep_their_limits_and_lose_less_than_others(own):
    own.limits = Budget(latency_s=0.7 * own.setting.baseline.latency_s.median)
    sensitivity = of(own, lambda policy: own.proposal(policy, {}).inheritance)
    best = [*sensitivity.best(6)]
    latencies = [p.latency_s for p in best]
    assert len(best) >= 3
    assert max(latencies) <= own.budget.latency_s
    assert latencies == sorted(latencies, reverse=True)
    pool = own.within_budget(draw_pool(own, 0, 3.0))
    foreseen = sensitivity.foreseen(pool)
    shares = []
    for proposal, worth in zip(best, sensitivity.foreseen(best), strict=True):
        others = [other for other, p in zip(foreseen, pool, strict=True) if p.latency_s <= proposal.latency_s]
        shares.append(worth / max(others, default=worth))
    assert np.mean(shares) > 0.9, "hundreds of policies that were bred for promise are hardly better"


def test_where_bytes_are_limited_the_best_policies_keep_that_limit_too(own):
    own.limits = Budget(size_bytes=int(0.6 * own.setting.baseline.size_bytes))
    best = [*of(own).best(4)]
    assert best
    assert all(own.violation(p.workload, p.latency_s) <= 0 for p in best)


def test_bits_that_were_not_tried_are_not_free(own):
    space = SpaceSpec(name="bits", quant=QuantSpace(bits=(4, 8, 32), storage=True), prune=PruneSpace(low=0, high=0.75, step=0.25))
    own.space = SearchSpace.build(space, own.setting.graphs[None], own.setting.device.profile).suggest
    own.limits = Budget(latency_s=0.9 * own.setting.baseline.latency_s.median)
    for proposal in of(own, lambda policy: own.proposal(policy, {}).inheritance).best(3):
        assert 4 not in (proposal.policy.quant.bits, *proposal.policy.quant.layers.values()), "they save no time"


def test_where_all_is_in_int8_its_loss_is_not_counted_for_each_dimension(own):
    space = SpaceSpec(name="int8", quant=QuantSpace(bits=(8,), per="model"), prune=PruneSpace(low=0, high=0.75, step=0.25))
    own.space = SearchSpace.build(space, own.setting.graphs[None], own.setting.device.profile).suggest
    known = {}
    sensitivity = of(own, lambda policy: known.get(policy.digest))
    for proposal in sensitivity.untried():
        known[proposal.policy.digest] = 0.5
    assert sensitivity.base.policy.digest in known
    assert max(float(losses.max()) for losses in sensitivity.losses()) == pytest.approx(0.0, abs=1e-5)


def test_ranges_that_depend_on_other_dimensions_are_kept(own):
    blocks = [block.name for block in own.setting.graphs[None].blocks]

    def suggest(trial):
        n = trial.suggest_categorical("n", [len(blocks), 1])
        return Policy(student=StudentSpec(drop=(blocks[:n][trial.suggest_int("which", 0, n - 1)],)))

    own.space, own.limits = suggest, Budget(latency_s=0.9 * own.setting.baseline.latency_s.median)
    for proposal in of(own, lambda policy: 0.9).best(3):
        assert own.suggest(FixedTrial(proposal.params)) == proposal.policy


def test_a_sweep_ends_with_the_first_budget_that_nothing_keeps_or_when_time_is_up(own):
    own.limits = Budget(latency_s=1e-9)
    assert [*of(own).best(12)] == []
    own.limits = Budget(latency_s=own.setting.baseline.latency_s.median)
    assert [*of(own).best(12, until=0.0)] == []


def test_dimensions_that_are_drawn_only_sometimes_are_found(own):
    def suggest(trial):
        if trial.suggest_categorical("prunes", [False, True]):
            return Policy(prune=pruned(own, trial.suggest_float("ratio", 0.1, 0.7)))
        return Policy(quant=QuantSpec(bits=trial.suggest_categorical("bits", [32, 8])))

    own.space, own.limits = suggest, Budget(latency_s=0.9 * own.setting.baseline.latency_s.median)
    sensitivity = of(own, lambda policy: own.proposal(policy, {}).inheritance)
    assert {singles[0].dimension for singles in sensitivity.singles} == {"prunes", "ratio", "bits"}
    assert [*sensitivity.best(2)]


def test_a_space_without_dimensions_has_nothing_to_try(own):
    own.space = lambda trial: Policy()
    sensitivity = of(own)
    assert ([*sensitivity.untried()], [*sensitivity.best(3)], sensitivity.missing) == ([], [], 0)


@pytest.mark.parametrize("log", [False, True])
def test_a_recorder_notes_the_ends_of_a_range_and_few_values_between(log):
    recorder = DimensionRecorder({})
    assert recorder.suggest_int("wide", 4, 4096, log=log) == 4
    assert recorder.suggest_float("open", 0.5, 8.0, log=log) == 0.5
    assert recorder.suggest_float("grid", 0.0, 0.75, step=0.125) == 0.0
    assert recorder.suggest_categorical("kind", ["a", "b"]) == "a"
    for name, ends in {"wide": (4, 4096), "open": (0.5, 8.0), "grid": (0.0, 0.75), "kind": ("a", "b")}.items():
        values = recorder.values[name]
        assert (values[0], values[-1]) == ends
        assert len(values) <= MOST_VALUES
    assert np.diff(recorder.values["grid"]).tolist() == [0.125] * 6
