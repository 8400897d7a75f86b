"""Which policy comes next: the first policies, what is ruled out, what waits, and when the short rung ends."""

from __future__ import annotations

import time
from dataclasses import replace

import optuna
import pytest
from running import TASK, trained

from autocompress.candidates.appraisals import Appraisals
from autocompress.controller.search import APPRAISED_A_TRIAL, APPRAISED_FIRST, CLEAR, Choice, Search
from autocompress.policy import DistillSpec, Policy, PruneSpec, QuantSpec
from autocompress.progress import SilentProgress
from autocompress.records import Budget, Failure, Outcome
from autocompress.schedule import Clock, Division, cover
from autocompress.search_space import fitted, own_suggest

PATIENCE = 5.0


def appraised(search, proposals):
    return [search.appraisals.appraise(proposal) for proposal in proposals]


def test_of_what_is_appraised_the_next_is_what_adds_most_to_what_was_trained(search, pool, monkeypatch):
    monkeypatch.setattr(Search, "_leading", lambda self: [])
    known, rest = appraised(search, pool[:9]), []
    for position in range(3):
        choice = search._structure(pool)
        candidates = [a for a in known if a.policy not in rest]
        points = [(a.worth, a.latency_s) for a in candidates]
        taken = [(search.appraisals.of(policy).worth, search.forecast.predict(policy).value) for policy in rest]
        assert choice.policy == candidates[cover(points, 1, taken)[0]].policy
        assert choice.worth == search.appraisals.of(choice.policy).worth
        rest.append(choice.policy)
        predicted = search.forecast.predict(choice.policy)
        trained(search, choice.policy, predicted.value, id=f"0000{position}", predicted_latency_s=predicted)


def test_until_one_is_within_the_budget_the_next_is_so_by_a_margin_where_one_is(search, pool, monkeypatch):
    slow, fast = max(pool, key=lambda p: p.latency_s), min(pool, key=lambda p: p.latency_s)
    monkeypatch.setattr(Appraisals, "_worth", lambda self, p: 0.9 if p is slow else 0.8)
    monkeypatch.setattr(search.forecast, "proposal", lambda policy, params: next(p for p in pool if p.policy == policy))
    search.forecast.limits = Budget(latency_s=1.02 * search.forecast.latency_s(slow))
    for proposal in (slow, fast):
        search.forecast._note(proposal.policy, proposal.latency_s / search.setting.baseline.latency_s.median)
    appraised(search, [slow])
    assert search._structure(pool[:0]).policy == slow.policy, "there is nothing else"
    appraised(search, [fast])
    assert search._structure(pool[:0]).policy == fast.policy
    trained(search, pool[0].policy, search.budget.latency_s / 1.04)
    assert search._structure(pool[:0]).policy == fast.policy, "the one that is within the budget now may not be so in the end"
    trained(search, pool[0].policy, search.budget.latency_s / 1.06)
    assert search._structure(pool[:0]).policy == slow.policy


def test_the_margin_is_kept_by_what_is_measured_as_by_what_is_predicted(search, pool, monkeypatch):
    slow, fast = max(pool, key=lambda p: p.latency_s), min(pool, key=lambda p: p.latency_s)
    monkeypatch.setattr(Appraisals, "_worth", lambda self, p: 0.9 if p is slow else 0.8)
    monkeypatch.setattr(search.forecast, "proposal", lambda policy, params: next(p for p in pool if p.policy == policy))
    limit = 1.1 * search.forecast.latency_s(slow)
    search.forecast.limits = Budget(latency_s=limit)
    appraised(search, [slow, fast])
    search.forecast._note(slow.policy, limit / 1.03 / search.setting.baseline.latency_s.median)
    assert search.forecast.excess(slow) <= 0 < search.forecast.excess(slow, margin=CLEAR)
    assert search._structure(pool[:0]).policy == fast.policy


def test_where_networks_are_slower_than_predicted_the_next_to_be_measured_is_faster_by_as_much(search, pool, monkeypatch):
    tried = []

    def excess(proposal, *, margin=0.0, measuring=True):
        tried.append(proposal)
        return search.forecast.violation(proposal.workload, (1 + margin) * 1.6 * search.forecast.latency_s(proposal))

    known = sorted(pool, key=lambda p: p.latency_s)
    known = known[:: len(known) // 24]
    search.forecast.limits = Budget(latency_s=1.6 * 1.2 * known[0].latency_s)
    monkeypatch.setattr(Appraisals, "_worth", lambda self, p: p.latency_s / known[-1].latency_s)
    monkeypatch.setattr(search.forecast, "excess", excess)
    appraised(search, known)
    choice = search._structure(pool[:0])
    assert excess(search.forecast.proposal(choice.policy, {})) <= 0
    assert len(tried) <= 4, "the first, one that is faster by as much, and what the margin asks for"


@pytest.mark.parametrize("trouble", ["failed", "over the budget"])
def test_where_a_policy_was_trained_in_vain_the_next_is_elsewhere(search, pool, monkeypatch, trouble):
    search.forecast.limits = Budget(latency_s=search.forecast.latency_limit)
    beside, far = max(pool, key=lambda p: p.latency_s), min(pool, key=lambda p: p.latency_s)
    twin = max((p for p in pool if p is not beside), key=lambda p: p.latency_s)
    monkeypatch.setattr(Appraisals, "_worth", lambda self, p: {id(beside): 0.9, id(twin): 0.89}.get(id(p), 0.8))
    monkeypatch.setattr(search.forecast, "proposal", lambda policy, params: next(p for p in pool if p.policy == policy))
    appraised(search, [beside, twin, far])
    failure = Failure(stage="train", reason="diverged") if trouble == "failed" else None
    trained(search, beside.policy, 9.0, failure=failure, predicted_latency_s=search.forecast.predict(beside.policy))
    assert search._structure(pool).policy == far.policy


def test_what_is_not_appraised_is_chosen_by_its_promise_spread_over_the_latencies(search, pool):
    first = search._structure(pool)
    promising = search._promising(pool, [], CLEAR)
    assert search.appraisals.of(first.policy).proposal.promise == pytest.approx(max(p.promise for p in promising))
    trained(search, first.policy, 1e-3, predicted_latency_s=search.forecast.predict(first.policy))
    second = search._structure(pool)
    assert search.forecast.predict(second.policy).value < 0.9 * search.forecast.predict(first.policy).value, "no twin of the first"


def test_structures_are_appraised_before_anything_is_trained(search, pool, monkeypatch):
    monkeypatch.setattr("autocompress.schedule.APPRAISAL_SHARE", 0.6)  # on a busy machine each may take seconds
    monkeypatch.setattr(Search, "_leading", lambda self: [])
    search.task, search.run = search.task.model_copy(update={"trials": 2}), search.setting.models.parent
    search.appraise(pool)
    found = search.appraisals.within_budget()
    told = f"{search.appraisals.seconds_each:.2f} s each, {search.journal.finished} trials, {search.clock.left:.0f} s left"
    assert len(found) > APPRAISED_FIRST, told
    assert all(0 <= appraised.worth <= 1 for appraised in found)
    assert [o.rung for o in search.journal.outcomes] == ["unchanged"]
    assert search.ladder()["appraised"] == len(found)
    again = Search(TASK, search.run, search.journal, search.forecast, search.clock, SilentProgress(), points=[])
    kept = {a.policy.digest: a.worth for a in again.appraisals.within_budget()}
    assert kept == {a.policy.digest: a.worth for a in found}, "read from the journal"


@pytest.mark.parametrize("known", [False, True], ids=["predicted", "measured"])
def test_the_unchanged_network_in_int8_costs_nothing_where_it_is_over_the_budget(search, pool, known):
    policy = fitted(Policy(quant=QuantSpec(bits=8)), search.setting.device.profile)
    int8 = search.forecast.predict(policy)
    search.forecast.limits = Budget(latency_s=0.99 * (int8.value if known else int8.low))
    if known:
        search.forecast._note(policy, int8.value / search.setting.baseline.latency_s.median)
    search._evaluate_unchanged()
    assert not search.journal.outcomes


def test_dimensions_are_appraised_alone_and_then_what_loses_least_by_them(search, pool, monkeypatch):
    monkeypatch.setattr(Appraisals, "_worth", lambda self, p: p.inheritance)
    search.forecast.limits = Budget(latency_s=0.6 * search.setting.baseline.latency_s.median)
    base, appraised = search.appraisals.sensitivity.base, []
    for proposal in search._first(pool, [], time.monotonic() + 60.0, 1000):
        appraised.append(search.appraisals.appraise(proposal))
    changes = [sum(a.proposal.params[name] != value for name, value in base.params.items()) for a in appraised]
    alone = changes.index(next(n for n in changes if n != 1))
    assert alone == len([*search.appraisals.sensitivity.levels]), "all of them: there was time"
    best = [a for a in appraised[alone:] if a.latency_s <= search.budget.latency_s]
    assert len(best) == len(appraised) - alone > 3
    rivals = [p for p in search.forecast.again(pool) if p.latency_s <= best[0].latency_s]
    assert best[0].worth >= 0.9 * max(p.inheritance for p in rivals)
    for proposal in pool[:10]:
        search.appraisals.appraise(proposal)
    assert search.appraisals.agreement() > 0.4, "what is foreseen here is about what it is worth"


@pytest.mark.parametrize(("seconds", "most"), [(-1.0, 1000), (60.0, 2)], ids=["no time", "few trials"])
def test_where_too_few_dimensions_could_be_appraised_alone_what_promises_most_comes_first(search, pool, seconds, most):
    first = [*search._first(pool, [], time.monotonic() + seconds, most)]
    promising = search._promising(pool, [])
    assert first == [promising[index] for index in cover([(p.promise, p.latency_s) for p in promising], APPRAISED_FIRST)]


def test_appraisal_is_limited_where_few_policies_will_be_trained(search, pool, monkeypatch):
    monkeypatch.setattr("autocompress.schedule.APPRAISAL_SHARE", 0.5)
    search.task, search.run = search.task.model_copy(update={"trials": 1}), search.setting.models.parent
    search.appraise(pool)
    assert len(search.appraisals) == APPRAISED_A_TRIAL


def test_an_appraisal_that_is_interrupted_waits(search, pool, monkeypatch):
    def interrupted(appraisals, proposal):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Appraisals, "_worth", interrupted)
        search.appraisals.appraise(pool[7])
    assert len(search.appraisals) == 0
    search.appraisals.suggested([], PATIENCE)
    assert pool[7].policy in search.appraisals


def test_what_waits_is_not_taken_for_what_is_asked_for(search, pool):
    search.journal.study.enqueue_trial(pool[7].params)
    assert search.appraisals.appraise(pool[3]).policy == pool[3].policy
    assert pool[7].policy in search.appraisals
    assert search.journal.waiting == 0


def test_students_of_another_architecture_are_worth_what_they_promise(search, pool):
    """Nothing of them is inherited, so that untrained they are all alike."""
    search.run = search.setting.models.parent
    search.setting = replace(search.setting, graphs=search.setting.graphs | {"other": search.setting.graphs[None]})
    found = appraised(search, pool[:5])
    assert sorted(found, key=lambda a: a.worth) == sorted(found, key=lambda a: a.proposal.promise)


@pytest.mark.parametrize(("rho", "seconds"), [(None, 10.0), (0.8, 10.0), (0.05, 15.0)])
def test_where_worth_does_not_tell_short_runs_get_more_time(search, monkeypatch, rho, seconds):
    monkeypatch.setattr(Search, "ladder", lambda self: {"appraised_short_spearman": rho})
    assert search._short_seconds(Division(10.0, 1.0, 1.0)) == seconds
    monkeypatch.setattr(Search, "_short_runs_tell", lambda self: False)
    assert search._short_seconds(Division(10.0, 1.0, 1.0)) == 10.0, "of runs that do not tell, more would not either"


def test_what_choosing_a_policy_took_is_part_of_what_it_cost(search, pool, monkeypatch):
    asked, kept = {}, []

    def made(setting, policy, **known):
        asked.update(known)
        return Outcome(id=known["id"], policy=policy, rung="short", seconds=3.0)

    monkeypatch.setattr("autocompress.controller.search.evaluate_policy", made)
    monkeypatch.setattr(Search, "keep", lambda self, outcome: kept.append(outcome))
    search.clock = Clock.start(60.0, already=30.0)
    search._train_shortly(Choice(pool[0].policy, 0.5), time.monotonic() - 2.0, Division(20.0, 4.0, 1.0))
    assert kept[0].seconds == pytest.approx(5.0, abs=0.5)
    assert asked["seconds"] == 4.0
    assert asked["latest"] - time.monotonic() == pytest.approx(30.0 - search._finishing(), abs=1.0)


@pytest.mark.parametrize(("steps", "climbs"), [((7, 38), "00000"), ((90, 300), "00001")])
def test_after_a_handful_of_steps_what_was_worth_most_untrained_is_trained_to_the_end(search, pool, monkeypatch, steps, climbs):
    """Seen where a short run of seven steps lost to one of 38: the search then trained the wrong policy for all of its time."""
    begun = []
    monkeypatch.setattr("autocompress.controller.search.evaluate_policy", lambda *_, continues, **known: begun.append(continues))
    monkeypatch.setattr(Search, "keep", lambda self, outcome: None)
    monkeypatch.setattr("autocompress.controller.search.full_runs", lambda *_: 1)
    worth = {search.forecast.structure(policy): value for policy, value in ((pool[0].policy, 0.9), (pool[1].policy, 0.4))}
    monkeypatch.setattr(Appraisals, "_worth", lambda self, p: worth[self.forecast.structure(p.policy)])
    for proposal in pool[:2]:
        search.appraisals.appraise(proposal)
    trained(search, pool[0].policy, 2e-3, score=0.55, steps=steps[0])
    trained(search, pool[1].policy, 1e-3, score=0.61, id="00001", steps=steps[1])
    search.full_rung()
    assert begun == [climbs]


def test_policies_that_lead_are_distilled_in_other_ways(search, pool):
    assert search._variant() is None, "nothing leads"
    for index, proposal in enumerate(pool[:2]):
        search.appraisals.appraise(proposal)
        trained(search, proposal.policy, proposal.latency_s, score=0.9 - 0.1 * index, id=f"0000{index}")
    distillation = search._variant()
    base = distillation.base.policy
    assert search.forecast.structure(distillation.policy) == search.forecast.structure(base)
    assert base.distill == DistillSpec() != distillation.policy.distill
    search.journal.tell_distillation(distillation.trial, 0.02)
    trained(search, distillation.policy, 1e-3, id="00002")
    assert search._variants == {"00002"}
    assert search._variant().policy.distill not in (DistillSpec(), distillation.policy.distill)


def test_a_space_without_ways_to_distil_teaches_nothing_else(search, pool):
    search.forecast.space = search.forecast.suggest
    search.appraisals.appraise(pool[0])
    trained(search, pool[0].policy, 1e-3)
    assert search._variant() is None


@pytest.mark.parametrize(("score", "rules_out"), [(0.85, True), (0.1, False)], ids=["sound", "collapsed"])
def test_a_network_rules_out_others_only_when_its_own_training_went_well(search, pool, score, rules_out):
    """Without a budget nothing else can rule out."""
    strong = Policy(quant=QuantSpec(bits=8))
    trained(search, strong, 1e-6, score=score, id="int8", rung="unchanged")
    leading = search._leading()
    assert bool(leading) is rules_out
    if leading:
        leading = [replace(leading[0], latency_s=0.0)]
    for _ in range(12):
        search.appraisals.suggested(leading, PATIENCE)
    told = [t for t in search.journal.study.trials if t.constraints.get("outclassed", 0.0) > 0]
    assert all(t.constraints["budget"] <= 0 for t in told)
    assert bool(told) is rules_out


def test_what_is_over_the_budget_leads_nothing(search):
    search.forecast.limits = Budget(size_bytes=8)
    trained(search, Policy(quant=QuantSpec(bits=8)), 1e-6, id="int8", rung="unchanged")
    assert search._leading() == []


def test_what_is_over_the_budget_by_prediction_is_told_and_not_appraised(search, monkeypatch):
    """However many suggestions there is time for: nothing here depends on how busy the machine is."""
    monkeypatch.setattr(Appraisals, "_worth", lambda self, p: p.inheritance)
    search.forecast.limits = Budget(latency_s=0.3 * search.setting.baseline.latency_s.median)
    for _ in range(5):
        search.appraisals.suggested([], PATIENCE)
    told = search.journal.study.get_trials(deepcopy=False)
    ruled_out, appraised = ([t for t in told if ("worth" in t.user_attrs) is wanted] for wanted in (False, True))
    assert len(ruled_out) > 5
    assert all(t.values[0] == 0.0 and t.constraints["budget"] > 0 == t.constraints["outclassed"] for t in ruled_out)
    assert 0 < len(appraised) == len(search.appraisals) <= 5
    assert all(t.values[0] == t.user_attrs["worth"] > 0 for t in appraised)


def test_all_suggestions_that_are_known_or_ruled_out_are_no_suggestion(search, pool):
    assert search.appraisals.suggested([], 0.0) is None
    search.forecast.limits = Budget(size_bytes=8)
    assert search.appraisals.suggested([], PATIENCE) is None
    assert len(search.appraisals) == 0


def test_where_nothing_is_within_the_budget_what_misses_it_by_least_is_tried_until_something_is(search, pool):
    search.forecast.limits = Budget(latency_s=1e-9)
    assert search._structure(pool).policy == min(pool, key=lambda p: p.latency_s).policy
    search.forecast.limits = Budget(size_bytes=8)
    assert search._structure(pool).policy == min(pool, key=lambda p: p.workload.weight_bytes).policy
    trained(search, pool[0].policy, 1e-3, size_bytes=8)
    assert search._structure(pool) is None


def test_distillations_and_structures_take_turns_and_stand_in_for_each_other(search, monkeypatch):
    structure, distillation = (Choice(Policy(), 1.0, id) for id in ("structure", "distillation"))
    found = {"_structure": structure, "_variant": distillation}
    monkeypatch.setattr(Search, "_structure", lambda self, pool: found["_structure"])
    monkeypatch.setattr(Search, "_variant", lambda self: found["_variant"])
    monkeypatch.setattr(Search, "_variants", property(lambda self: set(range(counts["varied"]))))
    monkeypatch.setattr(Search, "_short_count", lambda self: counts["short"])
    counts, turns = {"varied": 0, "short": 100}, []
    for counts["short"] in range(100, 112):  # a resumed search begins where another ended
        counts["varied"] = 25 + turns.count("distillation")
        turns.append(search._next([]).trial)
    assert turns.count("distillation") == 3
    found["_structure"] = None
    assert search._next([]) is distillation, "a space of few structures"
    found |= {"_structure": structure, "_variant": None}
    assert all(search._next([]) is structure for counts["short"] in range(200, 208))
    found["_structure"] = None
    assert search._next([]) is None


def test_what_a_space_draws_otherwise_by_now_is_left_out(search, pool):
    appraised(search, pool[:2])
    space = search.forecast.space
    search.forecast.space = lambda trial: (trial.suggest_int("new", 0, 1), space(trial))[1]
    search.forecast.space = own_suggest(search.forecast.space, "own", search.setting.device.profile)
    again = Search(TASK, search.run, search.journal, search.forecast, search.clock, SilentProgress(), points=[])
    assert len(again.appraisals) == 0


def test_a_sampler_that_has_drawn_all_it_can_ends_the_suggestions(search):
    groups = [group.name for group in search.setting.graphs[None].groups if group.prunable]
    search.forecast.space = lambda trial: Policy(prune=PruneSpec(ratios={groups[0]: 0.125 * trial.suggest_int("pruned", 0, 3)}))
    search.journal.study.sampler = optuna.samplers.GridSampler({"pruned": [0, 1, 2, 3]})
    for _ in range(9):
        search.appraisals.suggested([], PATIENCE)
    assert len(search.appraisals) == 4
    assert search.journal.is_exhausted
    assert search.appraisals.suggested([], PATIENCE) is None


def test_short_runs_have_about_as_many_steps_whatever_a_step_costs(search, pool, monkeypatch):
    asked, costs = [], {pool[index].policy.digest: cost for index, cost in enumerate((1.0, 3.0, 0.01))}

    def made(setting, policy, *, seconds, **known):
        asked.append(seconds)
        return Outcome(id=known["id"], policy=policy, rung="short", steps=90, failure=Failure(stage="train", reason="no" * len(asked)))

    search.run = search.setting.models.parent
    monkeypatch.setattr(Search, "_step_cost", lambda self, policy: costs[policy.digest])
    monkeypatch.setattr("autocompress.controller.search.evaluate_policy", made)
    for proposal in pool[:3]:
        search._train_shortly(Choice(proposal.policy, 0.5), time.monotonic(), Division(20.0, 10.0, 1.0))
    assert asked == pytest.approx([10.0, 20.0, 2.5]), "a step has costs that no network is too small for"


def test_short_runs_end_with_their_share_of_time_once_one_is_within_the_budget(search, pool):
    division, past = Division.of(60.0, 0.1), time.monotonic() - 1.0
    assert search._room_for_short(past, division), "nothing is within the budget yet"
    search.forecast.limits = Budget(latency_s=0.5)
    trained(search, pool[0].policy, 1.0)
    assert search._room_for_short(past, division), "what was trained is over the budget"
    trained(search, pool[1].policy, 0.1, id="00001")
    assert not search._room_for_short(past, division)
    assert search._room_for_short(time.monotonic() + 60.0, division)
    search.clock = Clock.start(60.0, already=60.0)
    search.forecast.limits = Budget(latency_s=1e-9)
    assert not search._room_for_short(past, division), "no time is left"
