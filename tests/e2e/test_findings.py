"""What a search has found: which file stands for a policy, what is on the front, what is said and what is resumed."""

from __future__ import annotations

import copy
import time
from dataclasses import replace

import pytest
from running import INT8, TASK, measurement, trained
from tasks import SLOW_CALLS, Diary

from autocompress.budget import Budget
from autocompress.candidates.forecast import Untrained
from autocompress.controller.choice import Chooser
from autocompress.controller.findings import Findings
from autocompress.controller.opening import know_baseline, learn_latencies
from autocompress.controller.pace import LEAST_OVERHEAD_S, Pace
from autocompress.controller.recovery import at_work, forget_damaged, leave_killers
from autocompress.controller.rungs import Rungs
from autocompress.controller.verdict import require_found
from autocompress.data import SPLITS, Split
from autocompress.errors import InfeasibleBudget, TooManyFailures
from autocompress.policy import Policy, QuantSpec
from autocompress.records import Attempt, Failure, Measurement, Outcome, Score
from autocompress.schedule import FULL_FACTOR, LEAST_FULL_STEPS, Clock, Division
from autocompress.study.journal import MOST_KILLS
from autocompress.system.progress import SilentProgress
from autocompress.testing.devices import FakeDevice
from autocompress.trial.objective import evaluate_policy


def test_the_end_of_a_search_keeps_little_time_while_there_is_no_front_to_measure(findings, pool):
    """Seen where the original is slow and the search short: it ended with a quarter of its time unused, and nothing trained."""
    findings.clock = Clock.start(600.0, already=540.0).with_reserve(180.0)
    assert findings.clock.left == 0.0
    assert 40.0 < Pace(findings).left_for_short() < 50.0
    assert Pace(findings).room_for_short(time.monotonic() - 1.0, Division(5.0, 1.0, 1.0))
    trained(findings, pool[0].policy, 1e-6)
    assert Pace(findings).left_for_short() == 0.0


def test_until_a_policy_has_told_what_it_costs_untrained_networks_do(findings, pool, monkeypatch):
    """On a slow machine the last policy of a short search was exported, scored and measured when the search should have ended."""
    networks, val = len(findings.forecast.networks), len(findings.setting.data.val)
    for spent, expected in ({}, LEAST_OVERHEAD_S), ({"export": 20.0 * networks, "measure": 10.0 * networks}, 30.0 + 0.01 * val):
        monkeypatch.setattr(findings.setting.ledger, "spent", lambda spent=spent: spent)
        findings.per_example_s = 0.01 if spent else 0.0
        assert Pace(findings).finishing() == pytest.approx(expected)
    trained(findings, pool[0].policy, 1e-3, finishing_s=3.0)
    assert Pace(findings).finishing() == 3.0


def test_what_is_kept_for_the_end_trains_a_policy_while_there_is_no_front_to_measure(findings, pool, monkeypatch):
    findings.clock, findings.run = Clock.start(600.0, already=540.0).with_reserve(180.0), findings.setting.models.parent
    seconds = []

    def realised(setting, attempt, **known):
        seconds.append(known["seconds"])
        found = {"val_score": Score(value=0.95), "latency_s": measurement(1e-6), "artifact": "models/00000/model.onnx", "size_bytes": 9}
        return Outcome(**dict(attempt), **found)

    monkeypatch.setattr("autocompress.controller.rungs.evaluate_policy", realised)
    Rungs(findings).short_rung(pool)
    assert len(seconds) == 1


def test_what_a_search_is_killed_over_is_left_once_it_was_so_twice(findings, pool):
    narrow, killed = pool[0].policy, []
    for _ in range(MOST_KILLS):
        leave_killers(findings)
        assert findings.journal.outcomes == []
        killed.append(at_work(findings, Attempt(id="00000", policy=narrow, rung="short")))
        killed[-1].__enter__()
    leave_killers(findings)
    (left,) = findings.journal.outcomes
    assert (left.policy, left.rung, left.failure.stage) == (narrow, "short", "train")
    assert "memory" in left.failure.reason
    leave_killers(findings)
    assert len(findings.journal.outcomes) == 1
    structure = findings.forecast.structure
    assert structure(Chooser(findings).choose([pool[0], pool[1]]).policy) == structure(pool[1].policy)


@pytest.mark.parametrize(
    ("limits", "drift"),
    [(Budget(latency_s=1.0), 0.3), (Budget(p95_s=1.0), 0.3), (Budget(relative=0.5), 0.05), (Budget(size_bytes=9), 0.05)],
    ids=["seconds", "95th percentile", "relative", "bytes"],
)
def test_a_budget_in_seconds_leaves_room_for_what_the_machine_comes_and_goes_by(findings, limits, drift):
    findings.forecast.limits = limits
    findings.setting = replace(
        findings.setting, baseline_history=[measurement(1e-3 * slow) for slow in (1.0, 1.0, 1.3, 1.0, 1.3, 9.0, 0.9, 1, 1, 1.2, 1)]
    )
    assert findings.drift == pytest.approx(drift, abs=1e-6)


@pytest.mark.parametrize(("score", "climbs"), [(0.899, False), (0.8, True)], ids=["spared", "hurt"])
def test_the_unchanged_network_is_trained_only_where_its_bits_cost_accuracy(findings, monkeypatch, score, climbs):
    trained(findings, Policy(quant=QuantSpec(bits=8)), 1e-3, score=score, id="int8", rung="unchanged")
    asked = []

    def realised(setting, attempt, **known):
        asked.append((attempt.id, attempt.rung))
        return Outcome(**dict(attempt), failure=Failure(stage="train", reason="not here"))

    monkeypatch.setattr("autocompress.controller.rungs.evaluate_policy", realised)
    monkeypatch.setattr(findings, "keep", lambda outcome: None)
    Rungs(findings).full_rung()
    assert asked == ([("int8-full", "full")] if climbs else [])


def test_the_cost_beside_training_is_what_it_was_as_a_rule(findings, pool):
    assert Pace(findings).overhead() == Pace(findings).finishing() == 5.0
    trained(findings, pool[0].policy, 1e-3, id="int8", rung="unchanged", seconds=4.0)
    assert Pace(findings).overhead() == 4.0
    for index, (seconds, training) in enumerate([(30.0, 28.0), (90.0, 50.0), (33.0, 30.0)]):
        trained(findings, pool[index].policy, 1e-3, id=f"{index:05d}", seconds=seconds, training_s=training, finishing_s=2.0 * index)
    trained(findings, pool[0].policy, 1e-3, id="00000-full", rung="full", seconds=60.0, training_s=60.0, finishing_s=2.0)
    assert Pace(findings).overhead() == 3.0, "a full run neither chooses nor reconstructs"
    assert Pace(findings).finishing() == 2.0


def test_a_relative_budget_follows_the_original_where_the_machine_has_changed(findings, pool):
    """Seen on a shared machine: the original was measured at 1.9 ms when a search began and took 2.5 ms from then on."""
    first = findings.setting.baseline.latency_s
    findings.forecast.limits, findings.run = Budget(relative=0.5), findings.setting.models.parent
    later = first.model_copy(update={"median": 1.3 * first.median, "high": 1.3 * first.high})
    findings.setting = replace(findings.setting, baseline_history=[first, later])
    made = Outcome(id="00000", policy=pool[0].policy, rung="short", failure=Failure(stage="train", reason="not here"))
    findings.keep(made)
    assert findings.setting.baseline.latency_s == first, "one measurement may be odd"
    findings.setting.baseline_history.extend([later, later])
    findings.keep(made)
    assert findings.setting.baseline.latency_s == later
    assert findings.budget.latency_s == pytest.approx(0.65 * first.median)


def test_an_original_that_was_measured_too_fast_is_known_better_before_a_policy_is_chosen(findings, monkeypatch):
    """Seen on a shared machine: a budget relative to a moment of turbo was one that the device could not meet from then on."""
    monkeypatch.setattr("autocompress.trial.beside_baseline.DRIFT_PAUSE_S", 0.0)
    truth = findings.setting.baseline.latency_s
    hasty = truth.model_copy(update={"median": 0.77 * truth.median, "high": 0.77 * truth.high})
    findings.setting = replace(findings.setting, baseline=replace(findings.setting.baseline, latency_s=hasty), baseline_history=[hasty])
    findings.forecast.limits = Budget(relative=0.5)
    findings.forecast.networks.clear()
    learn_latencies(findings, ahead=True)
    assert findings.setting.baseline.latency_s.median == pytest.approx(truth.median)
    assert findings.budget.latency_s == pytest.approx(0.5 * truth.median)
    original = findings.forecast.structure(Policy())
    assert findings.forecast.networks[original][1] == 1.0


def test_a_full_run_has_time_for_many_steps(findings, pool):
    """Seen where the search was short and the machine slow: three full runs of half an epoch each, where one could have had two."""
    findings.clock = Clock.start(600.0)
    trained(findings, pool[0].policy, 1e-3, seconds=11.0, training_s=10.0, finishing_s=1.0, steps=10_000)
    quick = Pace(findings).full_each()
    assert quick == pytest.approx(FULL_FACTOR * Division.of(600.0, 1.0).training + 1.0)
    trained(findings, pool[0].policy, 1e-3, seconds=11.0, training_s=10.0, finishing_s=1.0, steps=20)
    assert Pace(findings).full_each() == pytest.approx(LEAST_FULL_STEPS * 0.5 + 1.0)
    assert Pace(findings).full_each() > quick


@pytest.mark.parametrize(
    ("score", "words"),
    [(Score(value=0.8125), "81.25 %"), (Score(name="signal to noise", value=31.7, n=9), "31.7")],
    ids=["share", "number"],
)
def test_a_score_is_told_in_percent_only_where_it_is_a_share(findings, score, words):
    findings.progress = diary = Diary()
    latency = Measurement(median=1e-3, low=1e-3, high=1e-3, p95=1e-3, n=9)
    findings.best = Outcome(id="00000", policy=Policy(), rung="short", val_score=score, latency_s=latency, artifact="a.onnx", size_bytes=9)
    findings.announce(findings.best)
    findings.show("full training", 0, 1)
    assert diary.messages[0].startswith(f"policy 00000: {words} {score.name}, 1 ms, ")
    assert diary.best == f"{words} at 1 ms"


@pytest.mark.parametrize(
    ("classes", "score", "told"),
    [(2, 0.5, True), (2, 0.6, False), (4, 0.27, True), (4, 0.3, False)],
    ids=["coin", "two classes", "four, guessing", "four"],
)
def test_an_original_that_hardly_beats_guessing_is_asked_for_its_weights(findings, monkeypatch, classes, score, told):
    findings.progress = diary = Diary()
    data = findings.setting.data
    parts = {name: Split(part.inputs, part.targets % classes) for name in SPLITS for part in [getattr(data, name)]}
    findings.setting = replace(findings.setting, data=replace(data, classes=classes, **parts))
    monkeypatch.setattr("autocompress.controller.opening.score_baseline", lambda setting, split: Score(value=score))
    know_baseline(findings)
    assert any("hardly more than guessing" in message for message in diary.messages) == told


def test_a_search_in_which_nothing_met_the_budget_says_how_fast_the_fastest_was(findings, pool):
    findings.task = findings.task.model_copy(update={"budget": ("1us",)})
    findings.forecast.limits, findings.run = findings.task.limits, findings.setting.models.parent
    trained(findings, pool[0].policy, 2e-3)
    trained(findings, pool[1].policy, 1e-3, id="00001")
    with pytest.raises(InfeasibleBudget, match="the nearest policy took 1 ms") as caught:
        require_found(findings, findings.results())
    assert caught.value.smallest_latency_s == 1e-3


@pytest.mark.parametrize(
    ("budget", "told"),
    [(("1us",), "no policy could be measured in time"), ((), "ended before any policy could be measured")],
    ids=["budget", "no budget"],
)
def test_a_search_in_which_nothing_could_be_measured_says_so(findings, budget, told):
    findings.task, findings.run = findings.task.model_copy(update={"budget": budget}), findings.setting.models.parent
    with pytest.raises(InfeasibleBudget, match=told):
        require_found(findings, findings.results())


def test_a_file_within_the_budget_comes_before_a_better_one_of_the_same_policy_that_is_not(findings, pool):
    findings.forecast.limits = Budget(latency_s=1e-3)
    policy = pool[0].policy
    trained(findings, policy, 0.99e-3, score=0.7)
    trained(findings, policy, 1.01e-3, score=0.8, id="00000-full", rung="full")
    assert [o.id for o in findings.outcomes()] == ["00000"]
    findings.forecast.limits = Budget()
    assert [o.id for o in findings.outcomes()] == ["00000-full"]


@pytest.mark.parametrize(
    ("n", "full", "kept"),
    [(5000, 0.9746, "00000-full"), (5000, 0.96, "00000"), (100, 0.96, "00000-full"), (0, 0.9746, "00000"), (0, 0.98, "00000-full")],
)
def test_longer_training_is_believed_unless_validation_contradicts_it_by_more_than_chance(findings, pool, n, full, kept):
    """Found on CIFAR-10, with a teacher of all its images: longer training won a point on test images, and lost a seventh on validation."""
    trained(findings, pool[0].policy, 1e-3, val_score=Score(value=0.976, n=n))
    trained(findings, pool[0].policy, 1e-3, val_score=Score(value=full, n=n), id="00000-full", rung="full")
    assert [o.id for o in findings.outcomes()] == [kept]


@pytest.mark.parametrize(
    ("train", "val", "steps", "score", "kept"),
    [
        (0.999, 0.9994, 9, 0.9686, "00000-full"),
        (1.0, 1.0, 9, 0.9686, "00000-full"),
        (0.999, 0.935, 9, 0.9686, "00000"),
        (0.999, 0.9994, 2, 0.9686, "00000"),
        (0.999, 0.9994, 9, 0.92, "00000"),
    ],
    ids=["seen", "without an error", "fresh", "hardly trained again", "ruined"],
)
def test_where_the_original_has_seen_validation_examples_they_contradict_only_what_lost_much(
    findings, pool, train, val, steps, score, kept
):
    """Seen on CIFAR-10: after 148 steps 98.1 % of the validation images, after 927 more 96.9 %; of the test images 91.9 %, then 92.7 %."""
    scores = {"train_score": Score(value=train, n=1000), "val_score": Score(value=val, n=5000)}
    findings.record_baseline(replace(findings.setting.baseline, **scores))
    trained(findings, pool[0].policy, 1e-3, val_score=Score(value=0.981, n=5000), steps=3)
    trained(findings, pool[0].policy, 1e-3, val_score=Score(value=score, n=5000), id="00000-full", rung="full", steps=steps)
    assert [o.id for o in findings.outcomes()] == [kept]


def test_a_resumed_search_knows_the_original_as_it_was_measured_beside_the_others(findings, forecast):
    found = {"latency_s": measurement(3.0), "train_score": Score(value=0.9), "val_score": Score(value=0.8), "test_score": Score(value=0.7)}
    findings.record_baseline(replace(findings.setting.baseline, **found))
    half = replace(forecast, limits=Budget(relative=0.5))
    again = Findings(TASK, findings.run, findings.journal, half, findings.clock, SilentProgress(), history=[])
    again.recall()
    known = again.setting.baseline
    assert (known.latency_s.median, known.train_score.value, known.val_score.value, known.test_score.value) == (3.0, 0.9, 0.8, 0.7)
    assert again.budget.latency_s == 1.5


def test_a_search_in_which_all_failed_says_why(findings, pool):
    failure = Failure(stage="export", reason="the exporter failed")
    findings.journal.record(Outcome(id="00000", policy=pool[0].policy, rung="short", failure=failure))
    findings.run = findings.setting.models.parent
    with pytest.raises(TooManyFailures, match="the first failed to export: the exporter failed"):
        require_found(findings, findings.results())


def test_a_policy_whose_prediction_straddles_the_budget_is_measured_before_it_is_trained(findings, pool, monkeypatch):
    """Else the minutes of its training are lost where it turns out to be over the budget."""
    found, device = findings.forecast, FakeDevice(SLOW_CALLS)
    found.networks, found.model = {}, replace_spread(found.model, 0.5)
    leader = max(pool, key=lambda p: p.latency_s)
    truth = device.seconds_of(leader.workload)
    measured = []
    monkeypatch.setattr(found, "measure_untrained", lambda policy: measured.append(policy) or Untrained(policy, measurement(truth), 9))
    for limit, over in ((0.9 * truth, True), (1.1 * truth, False)):
        found.limits = Budget(latency_s=limit)
        assert (found.settled_excess(leader) > 0) is over
    assert measured == [leader.policy] * 2
    for limit in (0.1 * truth, 10 * truth):
        found.limits = Budget(latency_s=limit)
        found.settled_excess(leader)
    assert len(measured) == 2, "where the prediction is clear nothing is measured"
    found.networks[found.structure(leader.policy)] = (leader.workload, truth / findings.setting.baseline.latency_s.median)
    found.limits = Budget(latency_s=0.99 * truth)
    assert found.settled_excess(leader) > 0 and len(measured) == 2, "what was measured is not measured again"
    assert leader.policy not in [p.policy for p in found.within_budget(pool)]


def replace_spread(model, spread):
    other = copy.copy(model)
    other._spread = spread
    other.fit = lambda pairs: None
    return other


def test_what_the_original_beats_is_not_on_the_front(findings, pool):
    """Where the budget allows the original itself, a file that is slower and no better is worth nothing."""
    original = findings.setting.baseline.latency_s.median
    findings.record_baseline(replace(findings.setting.baseline, val_score=Score(value=0.8)))
    trained(findings, pool[0].policy, 1.2 * original, score=0.8, id="00000")
    assert findings.front() == []
    trained(findings, pool[1].policy, 1.1 * original, score=0.9, id="00001")
    trained(findings, pool[2].policy, 0.5 * original, score=0.5, id="00002")
    assert [o.id for o in findings.front()] == ["00002", "00001"]
    findings.forecast.limits = Budget(latency_s=0.9 * original)
    assert [o.id for o in findings.front()] == ["00002"], "an original over the budget beats nothing"


def test_a_prediction_is_judged_as_it_was_before_the_network_was_measured(findings, pool):
    unmeasured = [p for p in pool if findings.forecast.structure(p.policy) not in findings.forecast.networks]
    policy = unmeasured[0].policy
    before = findings.forecast.predict(policy)
    for proposal in unmeasured[:12]:
        findings.forecast.note(
            proposal.policy, 3.0 * findings.forecast.predict(proposal.policy).value / findings.setting.baseline.latency_s.median
        )
    findings.forecast.refit()
    assert findings.forecast.predict(policy).value > 1.1 * before.value
    assert findings.forecast.first_prediction(policy) == before


def test_what_the_original_beats_is_neither_best_nor_reaches_a_target(findings, pool):
    """As int8 is where its kernels are slower than float32: the search must go on."""
    original = findings.setting.baseline
    findings.task, findings.run = findings.task.model_copy(update={"target_accuracy": 0.8}), findings.setting.models.parent
    trained(findings, pool[0].policy, 2 * original.latency_s.median, score=0.85)
    findings.recall()
    assert findings.best is None
    assert not Rungs(findings)._is_over()
    trained(findings, pool[1].policy, 0.5 * original.latency_s.median, score=0.85, id="00001")
    findings.recall()
    assert findings.best.id == "00001"
    assert Rungs(findings)._is_over()


def test_a_resumed_search_knows_the_scores_of_the_original(findings, monkeypatch):
    asked = []

    def scored(setting, split):
        asked.append(len(split))
        return Score(value=0.9, n=len(split))

    monkeypatch.setattr("autocompress.controller.opening.score_baseline", scored)
    monkeypatch.setattr("autocompress.controller.opening.FEWEST_OF_TRAIN", 1)
    know_baseline(findings)
    known, reserve = findings.per_example_s, findings.clock.reserve
    assert asked == [len(findings.setting.data.val)] * 2, "and as many of training"
    findings.per_example_s = 0.0
    know_baseline(findings)
    assert len(asked) == 2
    assert (findings.per_example_s, findings.clock.reserve) == (known, reserve)


def test_starting_a_runtime_is_no_part_of_what_an_example_takes(findings, monkeypatch):
    """Else of a small network a part of the test split would be scored where all of it takes a second."""
    monkeypatch.setattr("autocompress.controller.opening.score_baseline", lambda *_: time.sleep(0.3) or Score(value=0.9))
    monkeypatch.setattr("autocompress.controller.opening.run_artifact", lambda *_: time.sleep(0.28))
    know_baseline(findings)
    assert findings.per_example_s < 0.1 / len(findings.setting.data.val)


def test_a_search_that_goes_on_training_measures_nothing_ahead(findings, pool):
    """Seen where one was resumed that had ended: of 35 seconds without a result it spent 16 on operators and networks."""
    trained(findings, pool[0].policy, 1e-3)
    calls = findings.setting.device.calls
    learn_latencies(findings, ahead=False)
    assert findings.setting.device.calls == calls
    assert findings.forecast.is_measured(pool[0].policy) and findings.forecast.is_measured(Policy())
    findings.forecast.networks.clear()
    learn_latencies(findings, ahead=True)
    assert findings.setting.device.calls > calls


def test_networks_that_were_only_measured_are_known_to_a_resumed_search(findings, pool):
    forecast = findings.forecast
    known = {forecast.structure(policy): took for policy, took in forecast.untrained.values()}
    assert len(known) >= 2, "measured ahead"
    findings.note_untrained()
    forecast.networks.clear()
    forecast.untrained.clear()
    findings.recall()
    assert {structure: took for structure, (_, took) in forecast.networks.items()} == known
    calls = findings.setting.device.calls
    learn_latencies(findings, ahead=True)
    assert findings.setting.device.calls == calls, "as many as were to be measured ahead"


@pytest.mark.parametrize(("direction", "told"), [("minimize", False), ("maximize", True)])
def test_a_score_that_goes_the_wrong_way_is_doubted(findings, direction, told):
    def error(outputs, targets):
        return float((outputs.argmax(1) != targets).float().mean())

    findings.progress = diary = Diary()
    findings.setting = replace(findings.setting, data=replace(findings.setting.data, score=error, score_direction=direction))
    know_baseline(findings)
    assert any("check score_direction" in message for message in diary.messages) is told


@pytest.mark.parametrize("artifact", ["models/00000/model.onnx", "../elsewhere/model.onnx", "models/00001/model.onnx"])
def test_only_sound_files_in_the_folder_of_their_policy_are_opened(findings, pool, artifact):
    """A folder may come from somebody else, with whatever in its database; or its files were changed since."""
    folder = findings.setting.models / "00000"
    made = evaluate_policy(findings.setting, Attempt(id="00000", policy=INT8, rung="short"), seconds=0.0)
    findings.run = findings.setting.models.parent
    findings.journal.record(made.model_copy(update={"artifact": artifact}))
    sound = artifact == "models/00000/model.onnx"
    assert forget_damaged(findings) == ([] if sound else ["00000"])
    if sound:
        (folder / "model.onnx").write_bytes(b"another one")
        assert forget_damaged(findings) == ["00000"]
    assert findings.journal.outcomes == []
