"""Which policy is trained next: a structure that adds to what there is, or another way to distil one that leads."""

from __future__ import annotations

from dataclasses import replace

import pytest
from running import INT8, appraised, measurement, trained

from autocompress.budget import Budget
from autocompress.candidates.appraisals import Appraisals
from autocompress.candidates.forecast import Untrained
from autocompress.controller.choice import INTERVAL_HEADROOM, Choice, Chooser
from autocompress.controller.findings import Findings
from autocompress.controller.rungs import APPRAISED_FIRST
from autocompress.policy import DistillSpec, Policy, QuantSpec
from autocompress.ranking.promotion import cover
from autocompress.records import Failure

PATIENCE = 5.0


def test_of_what_is_appraised_the_next_is_what_adds_most_to_what_was_trained(findings, pool, monkeypatch):
    monkeypatch.setattr(Chooser, "leading", lambda self: [])
    known, rest = appraised(findings, pool[:9]), []
    for position in range(3):
        choice = Chooser(findings)._new_structure(pool)
        candidates = [a for a in known if a.policy not in rest]
        points = [(a.worth, a.latency_s) for a in candidates]
        taken = [(findings.appraisals.of(policy).worth, findings.forecast.predict(policy).value) for policy in rest]
        assert choice.policy == candidates[cover(points, 1, taken)[0]].policy
        assert choice.worth == findings.appraisals.of(choice.policy).worth
        rest.append(choice.policy)
        predicted = findings.forecast.predict(choice.policy)
        trained(findings, choice.policy, predicted.value, id=f"0000{position}", predicted_latency_s=predicted)


def test_until_one_is_within_the_budget_the_next_is_so_by_a_margin_where_one_is(findings, pool, monkeypatch):
    slow, fast = max(pool, key=lambda p: p.latency_s), min(pool, key=lambda p: p.latency_s)
    monkeypatch.setattr(Appraisals, "_worth", lambda self, p: 0.9 if p is slow else 0.8)
    monkeypatch.setattr(findings.forecast, "proposal", lambda policy, params: next(p for p in pool if p.policy == policy))
    findings.forecast.limits = Budget(latency_s=1.02 * findings.forecast.latency_s(slow))
    for proposal in (slow, fast):
        findings.forecast.note(proposal.policy, proposal.latency_s / findings.setting.baseline.latency_s.median)
    appraised(findings, [slow])
    assert Chooser(findings)._new_structure(pool[:0]).policy == slow.policy, "there is nothing else"
    appraised(findings, [fast])
    assert Chooser(findings)._new_structure(pool[:0]).policy == fast.policy
    trained(findings, pool[0].policy, findings.budget.latency_s / 1.04)
    assert Chooser(findings)._new_structure(pool[:0]).policy == fast.policy, (
        "the one that is within the budget now may not be so in the end"
    )
    trained(findings, pool[0].policy, findings.budget.latency_s / 1.06)
    assert Chooser(findings)._new_structure(pool[:0]).policy == slow.policy


def test_the_margin_is_kept_by_what_is_measured_as_by_what_is_predicted(findings, pool, monkeypatch):
    slow, fast = max(pool, key=lambda p: p.latency_s), min(pool, key=lambda p: p.latency_s)
    monkeypatch.setattr(Appraisals, "_worth", lambda self, p: 0.9 if p is slow else 0.8)
    monkeypatch.setattr(findings.forecast, "proposal", lambda policy, params: next(p for p in pool if p.policy == policy))
    limit = 1.1 * findings.forecast.latency_s(slow)
    findings.forecast.limits = Budget(latency_s=limit)
    appraised(findings, [slow, fast])
    findings.forecast.note(slow.policy, limit / 1.03 / findings.setting.baseline.latency_s.median)
    assert findings.forecast.settled_excess(slow) <= 0 < findings.forecast.settled_excess(slow, margin=2 * INTERVAL_HEADROOM)
    assert Chooser(findings)._new_structure(pool[:0]).policy == fast.policy


def test_where_networks_are_slower_than_predicted_the_next_to_be_measured_is_faster_by_as_much(findings, pool, monkeypatch):
    forecast, tried = findings.forecast, []
    truth = {p.policy.digest: 1.6 * p.latency_s for p in pool}

    def measured(policy):
        tried.append(policy)
        slower = truth[policy.digest]
        forecast.note(policy, slower / findings.setting.baseline.latency_s.median)
        return Untrained(policy, measurement(slower), 9)

    known = sorted(pool, key=lambda p: p.latency_s)
    known = known[:: len(known) // 24]
    monkeypatch.setattr("autocompress.latency.fitted.LEAST_SPREAD", 1.0)
    monkeypatch.setattr(forecast.model, "_spread", 1.0)
    monkeypatch.setattr(Appraisals, "_worth", lambda self, p: p.latency_s / known[-1].latency_s)
    monkeypatch.setattr(forecast, "measure_untrained", measured)
    forecast.limits = Budget(latency_s=1.6 * 1.2 * known[0].latency_s)
    appraised(findings, known)
    choice = Chooser(findings)._new_structure(pool[:0])
    assert forecast.settled_excess(forecast.proposal(choice.policy, {})) <= 0
    assert len(tried) <= 4, "the first, one that is faster by as much, and what the margin asks for"


def test_what_measuring_has_ruled_out_is_not_trained_where_something_else_may_do(findings, pool, monkeypatch):
    forecast, slow = findings.forecast, max(pool, key=lambda p: p.latency_s)
    near = min(pool, key=lambda p: p.latency_s)
    monkeypatch.setattr(Appraisals, "_worth", lambda self, p: 0.9)
    forecast.limits = Budget(latency_s=1.01 * slow.latency_s)
    monkeypatch.setattr(forecast, "settled_excess", lambda proposal, margin=0.0: forecast.note(proposal.policy, 9.0) or 9.0)
    appraised(findings, [slow])
    assert Chooser(findings)._new_structure([near]).policy == near.policy, "the other was ruled out"
    trained(findings, near.policy, 0.5 * slow.latency_s)
    assert Chooser(findings)._new_structure([near]) is None, "something is within the budget: another way to distil it is worth more"


@pytest.mark.parametrize("trouble", ["failed", "over the budget"])
def test_where_a_policy_was_trained_in_vain_the_next_is_elsewhere(findings, pool, monkeypatch, trouble):
    findings.forecast.limits = Budget(latency_s=findings.forecast.latency_limit)
    beside, far = max(pool, key=lambda p: p.latency_s), min(pool, key=lambda p: p.latency_s)
    twin = max((p for p in pool if p is not beside), key=lambda p: p.latency_s)
    monkeypatch.setattr(Appraisals, "_worth", lambda self, p: {id(beside): 0.9, id(twin): 0.89}.get(id(p), 0.8))
    monkeypatch.setattr(findings.forecast, "proposal", lambda policy, params: next(p for p in pool if p.policy == policy))
    appraised(findings, [beside, twin, far])
    failure = Failure(stage="train", reason="diverged") if trouble == "failed" else None
    trained(findings, beside.policy, 9.0, failure=failure, predicted_latency_s=findings.forecast.predict(beside.policy))
    assert Chooser(findings)._new_structure(pool).policy == far.policy


def test_what_is_not_appraised_is_chosen_by_its_promise_spread_over_the_latencies(findings, pool):
    first = Chooser(findings)._new_structure(pool)
    promising = Chooser(findings).promising(pool, [], 2 * INTERVAL_HEADROOM)
    promise, most = findings.appraisals.promise, max(findings.appraisals.promise(p) for p in promising)
    assert promise(findings.appraisals.of(first.policy).proposal) >= min(1.0, most) * (1 - 1e-9)
    trained(findings, first.policy, 1e-3, predicted_latency_s=findings.forecast.predict(first.policy))
    second = Chooser(findings)._new_structure(pool)
    assert findings.forecast.predict(second.policy).value < 0.9 * findings.forecast.predict(first.policy).value, "no twin of the first"


def test_what_promises_most_is_faster_than_the_unchanged_network_where_that_is_within_the_budget(findings, pool):
    """Seen in a search of five minutes, which trained a network for three of them that was slower than int8, and no better."""
    chooser = Chooser(findings)
    by_latency = sorted(pool, key=lambda p: p.latency_s)
    usual = chooser.spread(pool, APPRAISED_FIRST)
    int8_s = findings.forecast.latency_s(by_latency[len(by_latency) // 2])
    assert any(p.latency_s >= int8_s for p in usual)
    trained(findings, INT8, int8_s, score=0.89, id="int8", rung="unchanged")
    findings.forecast.note(INT8, int8_s / findings.setting.baseline.latency_s.median)
    assert chooser.spread(pool, APPRAISED_FIRST)
    assert all(p.latency_s < int8_s for p in chooser.spread(pool, APPRAISED_FIRST // 2))


def test_what_adds_nothing_to_the_unchanged_network_is_not_trained_where_something_else_may(findings, pool, monkeypatch):
    slow, fast = max(pool, key=lambda p: p.latency_s), min(pool, key=lambda p: p.latency_s)
    monkeypatch.setattr(Appraisals, "_worth", lambda self, p: 0.98 if p.policy == slow.policy else 0.6)
    monkeypatch.setattr(Chooser, "leading", lambda self: [])
    int8_s = 0.9 * findings.forecast.latency_s(slow)
    trained(findings, INT8, int8_s, score=0.89, id="int8", rung="unchanged")
    findings.forecast.note(INT8, int8_s / findings.setting.baseline.latency_s.median)
    appraised(findings, [slow])
    assert Chooser(findings)._new_structure([fast]).policy == fast.policy, "appraised for that"
    assert Chooser(findings)._new_structure([]).policy == fast.policy
    trained(findings, fast.policy, 1e-6, predicted_latency_s=findings.forecast.predict(fast.policy))
    assert Chooser(findings)._new_structure([]).policy == slow.policy, "there is nothing else"


def test_a_margin_is_no_reason_to_train_what_is_worth_next_to_nothing(findings, pool, monkeypatch):
    """Seen in a search of three minutes, one of whose two runs went to a network of 40 %."""
    slow, fast = max(pool, key=lambda p: p.latency_s), min(pool, key=lambda p: p.latency_s)
    monkeypatch.setattr(Appraisals, "_worth", lambda self, p: 0.99 if p.policy == slow.policy else 0.39)
    monkeypatch.setattr(Chooser, "leading", lambda self: [])
    findings.forecast.limits = Budget(latency_s=1.02 * findings.forecast.latency_s(slow))
    for proposal in (slow, fast):
        findings.forecast.note(proposal.policy, proposal.latency_s / findings.setting.baseline.latency_s.median)
    appraised(findings, [slow, fast])
    assert Chooser(findings)._new_structure([]).policy == slow.policy
    trained(findings, fast.policy, 1e-6, score=0.3)
    assert not Chooser(findings)._is_safe(), "what has gone wrong in training is nothing that would ship"


def test_policies_that_lead_are_distilled_in_other_ways(findings, pool):
    assert Chooser(findings)._variant() is None, "nothing leads"
    for index, proposal in enumerate(pool[:2]):
        findings.appraisals.appraise(proposal)
        trained(findings, proposal.policy, proposal.latency_s, score=0.9 - 0.1 * index, id=f"0000{index}")
    distillation = Chooser(findings)._variant()
    base = distillation.base.policy
    assert findings.forecast.structure(distillation.policy) == findings.forecast.structure(base)
    assert base.distill == DistillSpec() != distillation.policy.distill
    findings.journal.tell_distillation(distillation.trial, 0.02)
    trained(findings, distillation.policy, 1e-3, id="00002")
    assert Chooser(findings)._variants == {"00002"}
    assert Chooser(findings)._variant().policy.distill not in (DistillSpec(), distillation.policy.distill)


def test_a_space_without_ways_to_distil_teaches_nothing_else(findings, pool):
    findings.forecast.space = findings.forecast.suggest
    findings.appraisals.appraise(pool[0])
    trained(findings, pool[0].policy, 1e-3)
    assert Chooser(findings)._variant() is None


@pytest.mark.parametrize(("score", "rules_out"), [(0.85, True), (0.1, False)], ids=["sound", "collapsed"])
def test_a_network_rules_out_others_only_when_its_own_training_went_well(findings, pool, score, rules_out):
    """Without a budget nothing else can rule out."""
    strong = Policy(quant=QuantSpec(bits=8))
    trained(findings, strong, 1e-6, score=score, id="int8", rung="unchanged")
    leading = Chooser(findings).leading()
    assert bool(leading) is rules_out
    if leading:
        leading = [replace(leading[0], latency_s=0.0)]
    for _ in range(12):
        findings.appraisals.suggested(leading, PATIENCE)
    told = [t for t in findings.journal.study.trials if t.constraints.get("outclassed", 0.0) > 0]
    assert all(t.constraints["budget"] <= 0 for t in told)
    assert bool(told) is rules_out


@pytest.mark.parametrize("limits", [Budget(size_bytes=8), Budget(latency_s=1.01e-6)], ids=["over it", "as good as over it"])
def test_what_is_over_the_budget_leads_nothing_and_covers_nothing(findings, limits):
    findings.forecast.limits = limits
    trained(findings, Policy(quant=QuantSpec(bits=8)), 1e-6, id="int8", rung="unchanged")
    assert Chooser(findings).leading() == []
    assert Chooser(findings)._covered(lambda appraised: appraised.worth) == []


def test_where_nothing_is_within_the_budget_what_misses_it_by_least_is_tried_until_something_is(findings, pool):
    findings.forecast.limits = Budget(latency_s=1e-9)
    assert Chooser(findings)._new_structure(pool).policy == min(pool, key=lambda p: p.latency_s).policy
    findings.forecast.limits = Budget(size_bytes=8)
    assert Chooser(findings)._new_structure(pool).policy == min(pool, key=lambda p: p.workload.weight_bytes).policy
    trained(findings, pool[0].policy, 1e-3, size_bytes=8)
    assert Chooser(findings)._new_structure(pool) is None


def test_distillations_and_structures_take_turns_and_stand_in_for_each_other(findings, monkeypatch):
    structure, distillation = (Choice(Policy(), 1.0, id) for id in ("structure", "distillation"))
    found = {"structure": structure, "variant": distillation}
    monkeypatch.setattr(Chooser, "_new_structure", lambda self, pool: found["structure"])
    monkeypatch.setattr(Chooser, "_variant", lambda self: found["variant"])
    monkeypatch.setattr(Chooser, "_variants", property(lambda self: set(range(counts["varied"]))))
    monkeypatch.setattr(Findings, "short_runs", property(lambda self: range(counts["short"])))
    counts, turns = {"varied": 0, "short": 100}, []
    for counts["short"] in range(100, 112):  # a resumed search begins where another ended
        counts["varied"] = 25 + turns.count("distillation")
        turns.append(Chooser(findings).choose([]).trial)
    assert turns.count("distillation") == 3
    found["structure"] = None
    assert Chooser(findings).choose([]) is distillation, "a space of few structures"
    found |= {"structure": structure, "variant": None}
    assert all(Chooser(findings).choose([]) is structure for counts["short"] in range(200, 208))
    found["structure"] = None
    assert Chooser(findings).choose([]) is None


def test_a_way_to_distil_that_was_trained_before_is_no_end_of_the_search(findings, pool, monkeypatch):
    """Of a space with few ways to distil, Optuna suggests the same ones again and again."""
    drawn, (base, other) = [], appraised(findings, pool[:2])
    for number, leading in enumerate((base, other)):
        trained(findings, leading.policy, leading.latency_s, id=f"0000{number}")
    known, new = base.policy, base.policy.model_copy(update={"distill": DistillSpec(temperature=2.0)})

    def space(trial):
        trial.suggest_float("temperature", 1.0, 8.0)
        drawn.append(new if len(drawn) == 3 else known)
        return drawn[-1]

    monkeypatch.setattr(findings.forecast, "space", space)
    choice = Chooser(findings)._variant()
    assert choice.policy == new and len(drawn) == 4
    drawn[:] = [new] * 4
    assert Chooser(findings)._variant() is None, "there is an end to it"
