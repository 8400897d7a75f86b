"""Which policies are trained to the end, and where a search that was interrupted goes on."""

from __future__ import annotations

from dataclasses import replace

import pytest
from running import trained

from autocompress.budget import Budget
from autocompress.controller.findings import Findings
from autocompress.controller.rungs import Rungs
from autocompress.policy import DistillSpec, Policy, QuantSpec
from autocompress.trial.starting import interrupted_weights


@pytest.fixture
def begun(monkeypatch):
    """Ids of the short runs that full training goes on from, in order; it takes no time, and comes to nothing."""
    ids = []
    monkeypatch.setattr("autocompress.controller.rungs.evaluate_policy", lambda *_, continues, **known: ids.append(continues))
    monkeypatch.setattr(Findings, "keep", lambda self, outcome: None)
    return ids


def train_briefly(findings, pool, *points):
    """A short run of each of the first proposals: its latency in seconds, and its score."""
    for index, (seconds, score) in enumerate(points):
        trained(findings, pool[index].policy, seconds, score=score, id=f"0000{index}", steps=99)


@pytest.mark.parametrize(("steps", "climbs"), [((7, 38), "00000"), ((90, 300), "00001")])
def test_after_a_handful_of_steps_what_was_worth_most_untrained_is_trained_to_the_end(findings, pool, begun, monkeypatch, steps, climbs):
    """Seen where a short run of seven steps lost to one of 38: the search then trained the wrong policy for all of its time."""
    monkeypatch.setattr("autocompress.controller.rungs.full_runs", lambda *_, done: 1)
    trained(findings, pool[0].policy, 2e-3, score=0.55, steps=steps[0], worth=0.9)
    trained(findings, pool[1].policy, 1e-3, score=0.61, id="00001", steps=steps[1], worth=0.4)
    Rungs(findings).full_rung()
    assert begun == [climbs]


@pytest.mark.parametrize(("scores", "climb"), [((0.9, 0.91), ["00001", "00002"]), ((0.92, 0.91), ["00000", "00002"])])
def test_of_runs_that_differ_in_distillation_one_is_trained_to_the_end(findings, pool, begun, monkeypatch, scores, climb):
    """Seen in a search of an hour, which trained one structure twice for twenty minutes."""
    monkeypatch.setattr("autocompress.controller.rungs.full_runs", lambda left, each, candidates, trials, done: candidates)
    other = pool[0].policy.model_copy(update={"distill": DistillSpec(temperature=2.0)})
    trained(findings, pool[0].policy, 2e-3, score=scores[0], steps=99)
    trained(findings, other, 2e-3, score=scores[1], id="00001", steps=99)
    trained(findings, pool[1].policy, 1e-3, score=0.6, id="00002", steps=99)
    Rungs(findings).full_rung()
    assert sorted(begun) == climb
    trained(findings, {"00000": pool[0].policy, "00001": other}[climb[0]], 2e-3, id=f"{climb[0]}-full", rung="full")
    begun.clear()
    Rungs(findings).full_rung()
    assert begun == ["00002"], "the structure has been trained to the end"


@pytest.mark.parametrize("latency_s", [6e-3, 4.95e-3], ids=["over it", "so near that it may be over it in the end"])
def test_what_is_not_safely_within_the_budget_keeps_nothing_from_being_trained_to_the_end(findings, pool, begun, monkeypatch, latency_s):
    """The unchanged network in int8 is the most accurate of all."""
    monkeypatch.setattr("autocompress.controller.rungs.full_runs", lambda *_, done: 1)
    findings.forecast.limits = Budget(latency_s=5e-3)
    trained(findings, Policy(quant=QuantSpec(bits=8)), latency_s, score=0.93, id="int8", rung="unchanged")
    train_briefly(findings, pool, (4.9e-3, 0.9), (4e-3, 0.895), (3e-3, 0.88), (1.5e-3, 0.8), (0.8e-3, 0.6))
    Rungs(findings).full_rung()
    assert begun == ["00000"]


def test_what_was_trained_to_the_end_is_compared_by_its_short_run(findings, pool, begun, monkeypatch):
    """Else a resumed search would find nothing worth training that is slower than what has been."""
    monkeypatch.setattr("autocompress.controller.rungs.full_runs", lambda *_, done: 1)
    train_briefly(findings, pool, (2e-3, 0.82), (3e-3, 0.86), (0.5e-3, 0.4))
    trained(findings, pool[0].policy, 2e-3, score=0.89, id="00000-full", rung="full", steps=999, training_s=1e3)
    Rungs(findings).full_rung()
    assert begun == ["00001"]


def test_training_that_was_interrupted_goes_on_first(findings, pool, begun, monkeypatch):
    monkeypatch.setattr("autocompress.controller.rungs.full_runs", lambda *_, done: 2)
    train_briefly(findings, pool, (3e-3, 0.9), (2e-3, 0.85), (1e-3, 0.5))
    assert not Rungs(findings).is_at_full_rung
    left = interrupted_weights(findings.setting, pool[2].policy)
    left.touch()
    Rungs(findings).full_rung()
    left.unlink()
    assert begun == ["00002", "00000"]
    assert Rungs(findings).is_at_full_rung, "no more policies are tried in what is left of the time"
    usual = findings.task
    for limits in ({"trials": 20}, {"target_accuracy": 0.99}):
        findings.task = usual.model_copy(update=limits)
        assert not Rungs(findings).is_at_full_rung, "more is asked for"
    findings.task = usual
    findings.clock = replace(findings.clock, total=2 * findings.clock.total)
    assert not Rungs(findings).is_at_full_rung, "there is time for more"


def test_who_gives_a_search_more_time_has_the_best_trained_further_and_who_resumes_it_as_it_was_does_not(findings, pool, monkeypatch):
    """Else two hours would go to second choices, and the best keep what they had learned in two minutes."""
    attempts = []

    def made(setting, attempt, *, continues, **_):
        attempts.append((attempt.id, continues))
        return trained(findings, attempt.policy, 2e-3, id=attempt.id, rung="full", training_s=10.0, steps=200)

    monkeypatch.setattr("autocompress.controller.rungs.evaluate_policy", made)
    monkeypatch.setattr(Findings, "keep", lambda self, outcome: None)
    monkeypatch.setattr("autocompress.controller.rungs.full_runs", lambda left, each, candidates, trials, done: candidates)
    train_briefly(findings, pool, (2e-3, 0.82))
    Rungs(findings).full_rung()
    Rungs(findings).full_rung()
    assert attempts == [("00000-full", "00000")]
    findings.clock = replace(findings.clock, total=100 * findings.clock.total)
    Rungs(findings).full_rung()
    assert attempts[1:] == [("00000-full2", "00000-full")]
    Rungs(findings).full_rung()
    assert len(attempts) == 2


def test_what_was_trained_to_the_end_counts_where_trials_are_limited(findings, pool, begun):
    findings.task = findings.task.model_copy(update={"trials": 2})
    train_briefly(findings, pool, (2e-3, 0.82), (1e-3, 0.8))
    trained(findings, pool[0].policy, 2e-3, id="00000-full", rung="full", training_s=1e3)
    Rungs(findings).full_rung()
    assert begun == []
