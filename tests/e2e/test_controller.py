"""What is appraised and what waits, what a run costs, and when the short rung ends."""

from __future__ import annotations

import time
from dataclasses import replace

import optuna
import pytest
from running import TASK, appraised, trained

from autocompress.budget import Budget
from autocompress.candidates.appraisals import Appraisals
from autocompress.candidates.forecast import Forecast
from autocompress.candidates.sensitivity import Sensitivity
from autocompress.controller.choice import Choice, Chooser
from autocompress.controller.findings import Findings
from autocompress.controller.pace import Pace
from autocompress.controller.rungs import APPRAISED_A_TRIAL, APPRAISED_FIRST, MOST_SETTLING, Rungs
from autocompress.policy import Policy, PruneSpec, QuantSpec
from autocompress.records import Failure, Outcome
from autocompress.results import Ladder
from autocompress.schedule import Clock, Division
from autocompress.search_space import for_device, own_suggest
from autocompress.study.journal import MOST_KILLS
from autocompress.study.notes import Note
from autocompress.system.progress import SilentProgress

PATIENCE = 5.0


def test_structures_are_appraised_before_anything_is_trained(findings, pool, monkeypatch):
    monkeypatch.setattr("autocompress.schedule.APPRAISAL_SHARE", 0.6)  # on a busy machine each may take seconds
    monkeypatch.setattr(Chooser, "leading", lambda self: [])
    findings.task, findings.run = findings.task.model_copy(update={"trials": 2}), findings.setting.models.parent
    Rungs(findings).appraise(pool)
    found = findings.appraisals.within_budget()
    told = f"{findings.appraisals.seconds_each:.2f} s each, {findings.journal.finished} trials, {findings.clock.left:.0f} s left"
    assert len(found) > APPRAISED_FIRST, told
    assert all(0 <= appraised.worth <= 1 for appraised in found)
    assert [o.rung for o in findings.journal.outcomes] == ["unchanged"]
    assert findings.ladder().appraised == len(found)
    again = Findings(TASK, findings.run, findings.journal, findings.forecast, findings.clock, SilentProgress(), history=[])
    kept = {a.policy.digest: a.worth for a in again.appraisals.within_budget()}
    assert kept == {a.policy.digest: a.worth for a in found}, "read from the journal"


@pytest.mark.parametrize("known", [False, True], ids=["predicted", "measured"])
def test_the_unchanged_network_in_int8_costs_nothing_where_it_is_over_the_budget(findings, pool, known):
    policy = for_device(Policy(quant=QuantSpec(bits=8)), findings.setting.device.profile)
    int8 = findings.forecast.predict(policy)
    findings.forecast.limits = Budget(latency_s=0.99 * (int8.value if known else int8.low))
    if known:
        findings.forecast.note(policy, int8.value / findings.setting.baseline.latency_s.median)
    Rungs(findings)._evaluate_unchanged()
    assert not findings.journal.outcomes


def test_dimensions_are_appraised_alone_and_then_what_loses_least_by_them(findings, pool, monkeypatch):
    monkeypatch.setattr(Appraisals, "_worth", lambda self, p: p.inheritance)
    findings.forecast.limits = Budget(latency_s=0.6 * findings.setting.baseline.latency_s.median)
    base, appraised = findings.appraisals.sensitivity.base, []
    for proposal in Rungs(findings)._first(pool, time.monotonic() + 60.0, 1000):
        appraised.append(findings.appraisals.appraise(proposal))
    changes = [sum(a.proposal.params[name] != value for name, value in base.params.items()) for a in appraised]
    alone = changes.index(next(n for n in changes if n != 1))
    assert alone == len([*findings.appraisals.sensitivity.levels]), "all of them: there was time"
    best = [a for a in appraised[alone:] if a.latency_s <= findings.budget.latency_s]
    assert len(best) == len(appraised) - alone > 3
    rivals = [p for p in findings.forecast.within_budget(pool) if p.latency_s <= best[0].latency_s]
    assert best[0].worth >= 0.9 * max(p.inheritance for p in rivals)
    for proposal in pool[:10]:
        findings.appraisals.appraise(proposal)
    assert findings.appraisals.agreement() > 0.4, "what is foreseen here is about what it is worth"


@pytest.mark.parametrize(("seconds", "most"), [(-1.0, 1000), (60.0, 2)], ids=["no time", "few trials"])
def test_where_too_few_dimensions_could_be_appraised_alone_what_promises_most_comes_first(findings, pool, seconds, most):
    assert [*Rungs(findings)._first(pool, time.monotonic() + seconds, most)] == Chooser(findings).spread(pool, APPRAISED_FIRST)


def test_students_of_another_architecture_are_not_searched_by_what_the_pool_was_drawn_by(findings, pool, monkeypatch):
    findings.run = findings.setting.models.parent
    findings.setting = replace(findings.setting, graphs=findings.setting.graphs | {"other": findings.setting.graphs[None]})
    monkeypatch.setattr(Appraisals, "suggested", lambda *_: pytest.fail("asked for suggestions"))
    Rungs(findings)._appraise(pool, 60.0)
    assert 0 < len(findings.appraisals) <= APPRAISED_FIRST


def test_appraisal_is_limited_where_few_policies_will_be_trained(findings, pool, monkeypatch):
    monkeypatch.setattr("autocompress.schedule.APPRAISAL_SHARE", 0.5)
    findings.task, findings.run = findings.task.model_copy(update={"trials": 1}), findings.setting.models.parent
    Rungs(findings).appraise(pool)
    assert len(findings.appraisals) == APPRAISED_A_TRIAL


def test_an_appraisal_that_is_interrupted_waits(findings, pool, monkeypatch):
    def interrupted(appraisals, proposal):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Appraisals, "_worth", interrupted)
        findings.appraisals.appraise(pool[7])
    assert len(findings.appraisals) == 0
    findings.appraisals.suggested([], PATIENCE)
    assert pool[7].policy in findings.appraisals


def test_what_waits_is_not_taken_for_what_is_asked_for(findings, pool):
    findings.journal.study.enqueue_trial(pool[7].params)
    assert findings.appraisals.appraise(pool[3]).policy == pool[3].policy
    assert pool[7].policy in findings.appraisals
    assert findings.journal.waiting == 0


def test_students_of_another_architecture_are_worth_what_they_promise(findings, pool):
    """Nothing of them is inherited, so that untrained they are all alike."""
    findings.run = findings.setting.models.parent
    findings.setting = replace(findings.setting, graphs=findings.setting.graphs | {"other": findings.setting.graphs[None]})
    found = appraised(findings, pool[:5])
    assert sorted(found, key=lambda a: a.worth) == sorted(found, key=lambda a: a.proposal.promise)


@pytest.mark.parametrize(("rho", "seconds"), [(None, 10.0), (0.8, 10.0), (0.05, 15.0)])
def test_where_worth_does_not_tell_short_runs_get_more_time(findings, monkeypatch, rho, seconds):
    monkeypatch.setattr(Findings, "ladder", lambda self: Ladder(appraised_short_spearman=rho))
    assert Pace(findings).short_seconds(Division(10.0, 1.0, 1.0)) == seconds
    monkeypatch.setattr(Pace, "short_runs_tell", lambda self: False)
    assert Pace(findings).short_seconds(Division(10.0, 1.0, 1.0)) == 10.0, "of runs that do not tell, more would not either"


def test_what_a_step_takes_is_tried_once_and_then_told_by_policies(findings, pool, monkeypatch):
    """Seen in a search of an hour, whose first policy trained for 22 steps and could be compared with none of the others."""
    tried = []
    monkeypatch.setattr("autocompress.controller.pace.training_step_seconds", lambda setting, until: tried.append(until) or 0.8)
    findings.forecast.limits = Budget(latency_s=0.5 * findings.setting.baseline.latency_s.median)
    pace = Pace(findings)
    assert pace.step_seconds() == pace.step_seconds() == pytest.approx(0.4), "of networks that take half as long"
    assert len(tried) == 1
    assert tried[0] - time.monotonic() < 1.0
    assert pace.division(1000.0).training >= 100 * 0.4
    trained(findings, pool[0].policy, 1e-3, steps=10, training_s=1.0)
    assert pace.step_seconds() == pytest.approx(0.1)


def test_a_search_that_was_killed_over_the_steps_that_it_tried_does_without(findings, monkeypatch):
    """The original takes more memory than its students: it would be killed over it each time that it is resumed."""

    def killed(setting, until):
        noted.append(findings.journal.noted(Note.PROBING))
        raise KeyboardInterrupt

    noted = []
    monkeypatch.setattr("autocompress.controller.pace.training_step_seconds", killed)
    with pytest.raises(KeyboardInterrupt):
        Pace(findings).step_seconds()
    batch_size = findings.setting.batch_size
    assert noted == [[batch_size]], "should the process end here"
    assert findings.journal.noted(Note.PROBING) is None
    for killed_before, kills in ([batch_size], 2), ([2 * batch_size] * MOST_KILLS, 1):
        findings.journal.note(Note.PROBING, killed_before)
        with pytest.raises(KeyboardInterrupt):
            Pace(findings).step_seconds()
        assert noted[-1] == [batch_size] * kills
    findings.journal.note(Note.PROBING, [batch_size] * MOST_KILLS)
    assert Pace(findings).step_seconds() == 0.0


def test_what_choosing_a_policy_took_is_part_of_what_it_cost(findings, pool, monkeypatch):
    asked, kept = {}, []

    def made(setting, attempt, **known):
        asked.update(known)
        return Outcome(**dict(attempt), seconds=3.0)

    monkeypatch.setattr("autocompress.controller.rungs.evaluate_policy", made)
    monkeypatch.setattr(Findings, "keep", lambda self, outcome: kept.append(outcome))
    findings.clock = Clock.start(60.0, already=30.0)
    Rungs(findings)._train_briefly(Choice(pool[0].policy, 0.5), time.monotonic() - 2.0, Division(20.0, 4.0, 1.0))
    assert kept[0].seconds == pytest.approx(5.0, abs=0.5)
    assert asked["seconds"] == 4.0
    assert asked["latest"] - time.monotonic() == pytest.approx(30.0 - Pace(findings).finishing(), abs=1.0)


@pytest.mark.parametrize(("factors", "measured"), [((0.8, 0.9, 1.01, 0.5), 3), ((0.8,) * 9, MOST_SETTLING)])
def test_what_should_be_best_is_measured_until_it_takes_what_was_predicted(findings, pool, monkeypatch, factors, measured):
    """Where it is faster than predicted, the most accurate policies would be ruled out unseen."""
    forecast, proposals, left, asked = findings.forecast, iter(pool), iter(factors), []

    def measure(self, policy):
        asked.append(policy)
        self.note(policy, next(left) * best[-1].latency_s / self.recent_baseline_s)
        return True

    best = []
    monkeypatch.setattr(Sensitivity, "best", lambda self, n, until: iter([best.append(next(proposals)) or best[-1]]))
    monkeypatch.setattr(Forecast, "measure_untrained", measure)
    Rungs(findings)._settle_near_budget(time.monotonic() - 1.0)
    assert not asked, "there is no time"
    Rungs(findings)._settle_near_budget(time.monotonic() + 60.0)
    assert asked == [proposal.policy for proposal in pool[:measured]]
    assert all(forecast.is_measured(policy) for policy in asked)


@pytest.mark.parametrize(("actual", "measured"), [((0.9,), 1), ((1.2, 0.8), 2), ((1.2,) * 9, MOST_SETTLING)])
def test_the_best_that_may_be_within_the_budget_is_measured(findings, pool, monkeypatch, actual, measured):
    """What is over it by a little as predicted, in truth perhaps not, would never be trained."""
    forecast, left, asked, proposals = findings.forecast, iter(actual), [], pool[:9]
    rank = {proposal.policy.digest: position for position, proposal in enumerate(proposals)}
    limit_s = 0.9 * min(forecast.latency_s(p) for p in proposals)
    forecast.limits, forecast.model._spread = Budget(latency_s=limit_s), 1e3  # all of them may be within it, none is as predicted
    monkeypatch.setattr(Appraisals, "_worth", lambda self, p: 1.0 - 0.1 * rank[p.policy.digest])
    monkeypatch.setattr(Forecast, "refit", lambda self: None)
    monkeypatch.setattr(Forecast, "proposal", lambda self, policy, params: proposals[rank[policy.digest]])

    def measure(self, policy):
        asked.append(rank[policy.digest])
        self.note(policy, next(left) * limit_s / self.recent_baseline_s)
        return True

    monkeypatch.setattr(Forecast, "measure_untrained", measure)
    appraised(findings, proposals)
    Rungs(findings)._settle_best_appraised(time.monotonic() - 1.0)
    assert not asked, "there is no time"
    Rungs(findings)._settle_best_appraised(time.monotonic() + 60.0)
    assert asked == list(range(measured))
    within = {rank[p.policy.digest] for p in forecast.within_budget(proposals)}
    assert within == {place for place in asked if actual[place] < 1}


def test_what_is_over_the_budget_by_prediction_is_told_and_not_appraised(findings, monkeypatch):
    """However many suggestions there is time for: nothing here depends on how busy the machine is."""
    monkeypatch.setattr(Appraisals, "_worth", lambda self, p: p.inheritance)
    findings.forecast.limits = Budget(latency_s=0.3 * findings.setting.baseline.latency_s.median)
    for _ in range(5):
        findings.appraisals.suggested([], PATIENCE)
    told = findings.journal.study.get_trials(deepcopy=False)
    ruled_out, appraised = ([t for t in told if ("worth" in t.user_attrs) is wanted] for wanted in (False, True))
    assert len(ruled_out) > 5
    assert all(t.values[0] == 0.0 and t.constraints["budget"] > 0 == t.constraints["outclassed"] for t in ruled_out)
    assert 0 < len(appraised) == len(findings.appraisals) <= 5
    assert all(t.values[0] == t.user_attrs["worth"] > 0 for t in appraised)


def test_all_suggestions_that_are_known_or_ruled_out_are_no_suggestion(findings, pool):
    assert findings.appraisals.suggested([], 0.0) is None
    findings.forecast.limits = Budget(size_bytes=8)
    assert findings.appraisals.suggested([], PATIENCE) is None
    assert len(findings.appraisals) == 0


def test_what_a_space_draws_otherwise_by_now_is_left_out(findings, pool):
    appraised(findings, pool[:2])
    space = findings.forecast.space
    findings.forecast.space = lambda trial: (trial.suggest_int("new", 0, 1), space(trial))[1]
    findings.forecast.space = own_suggest(findings.forecast.space, "own", findings.setting.device.profile, findings.setting.graphs[None])
    again = Findings(TASK, findings.run, findings.journal, findings.forecast, findings.clock, SilentProgress(), history=[])
    assert len(again.appraisals) == 0


def test_a_sampler_that_has_drawn_all_it_can_ends_the_suggestions(findings):
    groups = [group.name for group in findings.setting.graphs[None].groups if group.prunable]
    findings.forecast.space = lambda trial: Policy(prune=PruneSpec(ratios={groups[0]: 0.125 * trial.suggest_int("pruned", 0, 3)}))
    findings.journal.study.sampler = optuna.samplers.GridSampler({"pruned": [0, 1, 2, 3]})
    for _ in range(9):
        findings.appraisals.suggested([], PATIENCE)
    assert len(findings.appraisals) == 4
    assert findings.journal.is_exhausted
    assert findings.appraisals.suggested([], PATIENCE) is None


def test_short_runs_have_about_as_many_steps_whatever_a_step_costs(findings, pool, monkeypatch):
    asked, costs = [], {pool[index].policy.digest: cost for index, cost in enumerate((1.0, 3.0, 0.01))}

    def made(setting, attempt, *, seconds, **known):
        asked.append(seconds)
        return Outcome(**dict(attempt), steps=90, failure=Failure(stage="train", reason="no" * len(asked)))

    findings.run = findings.setting.models.parent
    monkeypatch.setattr(Pace, "step_cost", lambda self, policy: costs[policy.digest])
    monkeypatch.setattr("autocompress.controller.rungs.evaluate_policy", made)
    for proposal in pool[:3]:
        Rungs(findings)._train_briefly(Choice(proposal.policy, 0.5), time.monotonic(), Division(20.0, 10.0, 1.0))
    assert asked == pytest.approx([10.0, 20.0, 2.5]), "a step has costs that no network is too small for"


def test_short_runs_end_with_their_share_of_time_once_one_is_within_the_budget(findings, pool):
    division, past = Division.of(60.0, 0.1), time.monotonic() - 1.0
    assert Pace(findings).room_for_short(past, division), "nothing is within the budget yet"
    findings.forecast.limits = Budget(latency_s=0.5)
    trained(findings, pool[0].policy, 1.0)
    assert Pace(findings).room_for_short(past, division), "what was trained is over the budget"
    trained(findings, pool[1].policy, 0.1, id="00001")
    assert not Pace(findings).room_for_short(past, division)
    assert Pace(findings).room_for_short(time.monotonic() + 60.0, division)
    findings.clock = Clock.start(60.0, already=60.0)
    findings.forecast.limits = Budget(latency_s=1e-9)
    assert not Pace(findings).room_for_short(past, division), "no time is left"
