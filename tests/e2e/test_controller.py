"""Which policy comes next: the first policies, what is ruled out, what waits, and when the short rung ends."""

from __future__ import annotations

import copy
import time
from dataclasses import replace

import optuna
import pytest
from tasks import SLOW_CALLS, Diary

from autocompress.appraisals import Appraisals
from autocompress.controller import APPRAISED_A_TRIAL, APPRAISED_FIRST, Choice, Search
from autocompress.data import SPLITS, Split
from autocompress.devices.timing import MOST_DRIFT
from autocompress.errors import InfeasibleBudget, PolicyFailure, TooManyFailures
from autocompress.final import measure_front, score_test
from autocompress.forecast import Forecast, Untrained
from autocompress.latency import FittedLatencyModel, OperatorTable
from autocompress.objective import untrained
from autocompress.policy import DistillSpec, Policy, PruneSpec, QuantSpec
from autocompress.preparation import load, prepare
from autocompress.progress import SilentProgress
from autocompress.records import Budget, Failure, Measurement, Outcome, Score
from autocompress.schedule import FEWEST_EXAMPLES, Clock, Division, cover
from autocompress.search_space import find_suggest, own_suggest
from autocompress.session import _result
from autocompress.study import open_journal
from autocompress.task import Task
from autocompress.testing.devices import FakeDevice

TASK = Task(model="own:net", data="own:blobs", search_time="60s")
PATIENCE = 5.0


@pytest.fixture(scope="module")
def forecast(net, data, tmp_path_factory):
    setting = prepare(TASK, tmp_path_factory.mktemp("controller") / "run", load(TASK, model=net, data=data, device=FakeDevice(SLOW_CALLS)))
    setting = replace(setting, baseline=replace(setting.baseline, val_score=Score(value=0.9)))
    suggest = find_suggest("default", setting.graphs[None], setting.device.profile)
    found = Forecast(setting, suggest, Budget(), FittedLatencyModel(OperatorTable()))
    found.calibrate(4.0, 0, lambda *_: None)
    return found


@pytest.fixture(scope="module")
def pool(forecast):
    return forecast.pool(0, 4.0)


@pytest.fixture
def search(forecast, tmp_path):
    journal = open_journal(tmp_path, TASK, resume=False)
    return Search(TASK, tmp_path, journal, replace(forecast), Clock.start(60.0), SilentProgress(), points=[])


def measurement(seconds, p95=None):
    return Measurement(median=seconds, low=seconds, high=seconds, p95=p95 or seconds, n=9)


def trained(search, policy, latency_s, score=0.95, id="00000", **changes):
    latency = measurement(latency_s)
    made = Outcome(id=id, policy=policy, rung="short", val_score=Score(value=score), latency_s=latency, artifact="a.onnx", size_bytes=9)
    search.journal.record(made.model_copy(update=changes))


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
    appraised(search, [slow])
    assert search._leader(pool[:0]).policy == slow.policy, "there is nothing else"
    appraised(search, [fast])
    assert search._leader(pool[:0]).policy == fast.policy
    monkeypatch.setattr(Search, "_climbers", lambda self: ["one"])
    assert search._leader(pool[:0]).policy == slow.policy


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
    promising = search._promising(pool, [], MOST_DRIFT)
    assert search.appraisals.of(first.policy).proposal.promise == pytest.approx(max(p.promise for p in promising))
    trained(search, first.policy, 1e-3, predicted_latency_s=search.forecast.predict(first.policy))
    second = search._structure(pool)
    assert search.forecast.predict(second.policy).value < 0.9 * search.forecast.predict(first.policy).value, "no twin of the first"


def test_structures_are_appraised_before_anything_is_trained_and_optuna_suggests_most_of_them(search, pool, monkeypatch):
    monkeypatch.setattr("autocompress.schedule.APPRAISAL_SHARE", 0.25)
    monkeypatch.setattr(Search, "_leading", lambda self: [])
    search.run = search.setting.models.parent
    search.appraise(pool)
    found = search.appraisals.within_budget()
    assert len(found) > APPRAISED_FIRST
    assert all(0 <= appraised.worth <= 1 for appraised in found)
    assert [o.rung for o in search.journal.outcomes] == ["unchanged"]
    assert search.ladder()["appraised"] == len(found)
    again = Search(TASK, search.run, search.journal, search.forecast, search.clock, SilentProgress(), points=[])
    kept = {a.policy.digest: a.worth for a in again.appraisals.within_budget()}
    assert kept == {a.policy.digest: a.worth for a in found}, "read from the journal"


@pytest.mark.parametrize("known", [False, True], ids=["predicted", "measured"])
def test_the_unchanged_network_in_int8_costs_nothing_where_it_is_over_the_budget(search, pool, known):
    int8 = search.forecast.predict(Policy(quant=QuantSpec(bits=8)))
    search.forecast.limits = Budget(latency_s=0.99 * (int8.value if known else int8.low))
    if known:
        search.forecast.networks = dict(search.forecast.networks)
        search.forecast._note(Policy(quant=QuantSpec(bits=8)), int8.value)
    search._evaluate_unchanged()
    assert not search.journal.outcomes


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


def test_students_of_another_architecture_are_worth_what_they_promise(search, pool):
    """Nothing of them is inherited, so that untrained they are all alike."""
    search.run = search.setting.models.parent
    search.setting = replace(search.setting, graphs=search.setting.graphs | {"other": search.setting.graphs[None]})
    found = appraised(search, pool[:5])
    assert sorted(found, key=lambda a: a.worth) == sorted(found, key=lambda a: a.proposal.promise)


@pytest.mark.parametrize(("rho", "seconds"), [(None, 10.0), (0.8, 10.0), (0.05, 15.0)])
def test_where_worth_does_not_tell_short_runs_get_more_time(search, monkeypatch, rho, seconds):
    monkeypatch.setattr(Search, "ladder", lambda self: {"appraised_short_spearman": rho})
    assert search._short_seconds(Division(10.0, 1.0)) == seconds


def test_policies_that_lead_are_distilled_in_other_ways(search, pool):
    assert search._lesson() is None, "nothing leads"
    for index, proposal in enumerate(pool[:2]):
        search.appraisals.appraise(proposal)
        trained(search, proposal.policy, proposal.latency_s, score=0.9 - 0.1 * index, id=f"0000{index}")
    lesson = search._lesson()
    base = lesson.base.policy
    assert search.forecast.structure(lesson.policy) == search.forecast.structure(base)
    assert base.distill == DistillSpec() != lesson.policy.distill
    search.journal.tell_lesson(lesson.trial, 0.02)
    trained(search, lesson.policy, 1e-3, id="00002")
    assert search._taught == {"00002"}
    assert search._lesson().policy.distill not in (DistillSpec(), lesson.policy.distill)


def test_a_space_without_ways_to_distil_teaches_nothing_else(search, pool):
    search.forecast.space = search.forecast.suggest
    search.appraisals.appraise(pool[0])
    trained(search, pool[0].policy, 1e-3)
    assert search._lesson() is None


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


def test_lessons_and_structures_take_turns_and_stand_in_for_each_other(search, monkeypatch):
    structure, lesson = (Choice(Policy(), 1.0, id) for id in ("structure", "lesson"))
    found = {"_structure": structure, "_lesson": lesson}
    monkeypatch.setattr(Search, "_structure", lambda self, pool: found["_structure"])
    monkeypatch.setattr(Search, "_lesson", lambda self: found["_lesson"])
    monkeypatch.setattr(Search, "_taught", property(lambda self: set(range(counts["taught"]))))
    monkeypatch.setattr(Search, "_short_count", lambda self: counts["short"])
    counts, turns = {"taught": 0, "short": 100}, []
    for counts["short"] in range(100, 112):  # a resumed search begins where another ended
        counts["taught"] = 25 + turns.count("lesson")
        turns.append(search._next([]).trial)
    assert turns.count("lesson") == 3
    found["_structure"] = None
    assert search._next([]) is lesson, "a space of few structures"
    found |= {"_structure": structure, "_lesson": None}
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


# -- the end of a search ----------------------------------------------------------------------------------------------------


class Worn(FakeDevice):
    """Cannot run some files any more; everything else takes this time."""

    def __init__(self, latency, broken=()):
        super().__init__()
        self.latency, self.broken, self.asked = latency, broken, []

    def measure(self, paths, *, seconds_each=1.0):
        self.asked.append([path.parent.name for path in paths])
        if any(path.parent.name in self.broken for path in paths):
            raise PolicyFailure("the runtime crashed with SIGSEGV")
        return [self.latency] * len(paths)


def with_device(search, device):
    search.setting = replace(search.setting, device=device)


def on_front(search, pool, n=3):
    """Outcomes that are all on the front: the slower the more accurate, and all more so than the original."""
    for index in range(n):
        id = f"{index:05d}"
        trained(search, pool[index].policy, 1e-3 * (index + 1), score=0.91 + 0.01 * index, id=id, artifact=f"models/{id}/model.onnx")


def test_the_end_of_a_search_keeps_little_time_while_there_is_no_front_to_measure(search, pool):
    """Seen where the original is slow and the search short: it ended with a quarter of its time unused, and nothing trained."""
    search.clock = Clock.start(60.0, already=45.0).with_reserve(18.0)
    assert search.clock.left == 0.0
    assert 9.0 < search._left_for_short() < 15.0
    assert search._room_for_short(time.monotonic() - 1.0, Division(5.0, 1.0))
    trained(search, pool[0].policy, 1e-6)
    assert search._left_for_short() == 0.0


def test_a_file_that_can_no_longer_be_measured_leaves_the_front_and_the_search_goes_on(search, pool):
    on_front(search, pool)
    with_device(search, Worn(measurement(1e-3), broken=("00001",)))
    measure_front(search)
    failures = {o.id: o.failure for o in search.journal.outcomes if o.failure is not None}
    assert {id: (f.stage, f.reason) for id, f in failures.items()} == {"00001": ("measure", "the runtime crashed with SIGSEGV")}
    assert [o.id for o in search.front()] == ["00002"], "all take the same time now"


def test_files_that_cannot_be_measured_together_are_measured_one_by_one(search, pool):
    class Small(Worn):
        def measure(self, paths, *, seconds_each=1.0):
            if len(paths) > 2:
                raise PolicyFailure("the runtime was killed: out of memory")
            return super().measure(paths, seconds_each=seconds_each)

    on_front(search, pool)
    device = Small(measurement(7e-3))
    with_device(search, device)
    measure_front(search)
    assert device.asked == [["baseline", f"0000{index}"] for index in range(3)]
    assert [(o.latency_s.median, o.failure) for o in search.journal.outcomes] == [(7e-3, None)] * 3
    assert search.setting.baseline.latency_s.median == 7e-3


def test_the_less_time_is_left_the_shorter_the_front_is_measured(search, pool):
    class Hasty(Worn):
        def measure(self, paths, *, seconds_each=1.0):
            self.asked.append(seconds_each)
            return [self.latency] * len(paths)

    on_front(search, pool)
    asked = []
    for already in (0.0, 56.0, 59.9):
        search.clock = Clock.start(60.0, already=already)
        device = Hasty(measurement(1e-3))
        with_device(search, device)
        measure_front(search)
        asked.append(device.asked[0])
    assert asked[0] == 1.5 > asked[1] > asked[2] == 0.3


def test_a_file_that_was_lost_comes_back_when_it_is_intact_and_else_its_policy_may_be_tried_again(search, pool):
    on_front(search, pool)
    for id, proposal in zip(("00000", "00001"), pool, strict=False):
        search.setting.write(search.run / "models" / id, untrained(search.setting, proposal.policy), proposal.policy)
    (search.run / "models" / "00001" / "model.onnx").write_bytes(b"damaged")
    with_device(search, Worn(measurement(1e-3), broken=("00000", "00001", "00002")))
    measure_front(search)
    assert search.front() == []
    assert search.retry_failures() == 3
    assert [(o.id, o.failure) for o in search.journal.outcomes] == [("00000", None)]
    assert search.retry_failures() == 0


@pytest.mark.parametrize(("score", "climbs"), [(0.899, False), (0.8, True)], ids=["spared", "hurt"])
def test_the_unchanged_network_is_trained_only_where_its_bits_cost_accuracy(search, monkeypatch, score, climbs):
    trained(search, Policy(quant=QuantSpec(bits=8)), 1e-3, score=score, id="int8", rung="unchanged")
    asked = []

    def realised(setting, policy, **known):
        asked.append((known["id"], known["rung"]))
        return Outcome(id=known["id"], policy=policy, rung="full", failure=Failure(stage="train", reason="not here"))

    monkeypatch.setattr("autocompress.controller.realise", realised)
    monkeypatch.setattr(search, "keep", lambda outcome: None)
    search.full_rung()
    assert asked == ([("int8-full", "full")] if climbs else [])


def test_what_misses_a_95th_percentile_when_it_is_measured_again_is_no_longer_within_the_budget(search, pool):
    """Although its median got faster."""
    trained(search, pool[0].policy, 5e-3)
    search.task = Task(model="own:net", data="own:blobs", search_time="60s", budget=("p95=6ms",))
    search.forecast.limits = search.task.limits
    with_device(search, Worn(measurement(4e-3, p95=7e-3)))
    measure_front(search)
    assert search.front() == []


def test_what_was_measured_first_is_kept_beside_what_was_measured_last(search, pool):
    trained(search, pool[0].policy, 5e-3)
    with_device(search, Worn(measurement(4e-3)))
    for _ in range(2):
        measure_front(search)
        (outcome,) = search.journal.outcomes
        assert (outcome.latency_s.median, outcome.search_latency_s.median) == (4e-3, 5e-3)


def test_a_part_of_the_test_split_is_scored_where_time_is_short_and_it_is_said(search, pool):
    test = search.setting.data.test
    search.clock, search.per_example_s, search.progress = Clock.start(60.0, already=60.0), 1.0, Diary()
    score_test(search)
    assert search.progress.messages[0].startswith(f"scoring {FEWEST_EXAMPLES} of {len(test)} test examples")
    assert search.setting.baseline.test_score.n == FEWEST_EXAMPLES
    search.clock = Clock.start(60.0)
    score_test(search)
    assert search.setting.baseline.test_score.n == FEWEST_EXAMPLES, "the same part when the search is resumed"


def test_a_model_that_is_no_slower_than_usual_has_a_test_score_of_some_worth_even_beyond_the_deadline(search):
    search.clock, search.per_example_s = Clock.start(60.0, already=61.0), 0.05
    score_test(search)
    assert search.setting.baseline.test_score.n == 0.05 * 60.0 / 0.05


def test_a_file_that_cannot_be_scored_on_the_test_set_leaves_the_front(search, pool):
    on_front(search, pool, 1)
    score_test(search)
    (lost,) = search.journal.outcomes
    assert lost.failure.stage == "test"
    assert search.setting.baseline.test_score is not None


def test_the_cost_beside_training_is_what_it_was_as_a_rule(search, pool):
    assert search._overhead() == 5.0
    for index, (seconds, training) in enumerate([(30.0, 28.0), (90.0, 50.0), (33.0, 30.0)]):
        trained(search, pool[index].policy, 1e-3, id=f"{index:05d}", seconds=seconds, training_s=training)
    assert search._overhead() == 3.0


@pytest.mark.parametrize(
    ("score", "words"),
    [(Score(value=0.8125), "81.25 %"), (Score(name="signal to noise", value=31.7, n=9), "31.7")],
    ids=["share", "number"],
)
def test_a_score_is_told_in_percent_only_where_it_is_a_share(search, score, words):
    search.progress = diary = Diary()
    latency = Measurement(median=1e-3, low=1e-3, high=1e-3, p95=1e-3, n=9)
    search.best = Outcome(id="00000", policy=Policy(), rung="short", val_score=score, latency_s=latency, artifact="a.onnx", size_bytes=9)
    search.announce(search.best)
    search.show("full training", 0, 1)
    assert diary.messages[0].startswith(f"policy 00000: {words} {score.name}, 1 ms, ")
    assert diary.best == f"{words} at 1 ms"


@pytest.mark.parametrize(
    ("classes", "score", "told"),
    [(2, 0.5, True), (2, 0.6, False), (4, 0.27, True), (4, 0.3, False)],
    ids=["coin", "two classes", "four, guessing", "four"],
)
def test_an_original_that_hardly_beats_guessing_is_asked_for_its_weights(search, monkeypatch, classes, score, told):
    search.progress = diary = Diary()
    data = search.setting.data
    parts = {name: Split(part.inputs, part.targets % classes) for name in SPLITS for part in [getattr(data, name)]}
    search.setting = replace(search.setting, data=replace(data, classes=classes, **parts))
    monkeypatch.setattr("autocompress.controller.score_original", lambda setting: Score(value=score))
    search.score_original()
    assert any("hardly more than guessing" in message for message in diary.messages) == told


def test_a_search_in_which_nothing_met_the_budget_says_how_fast_the_fastest_was(search, pool):
    search.task = search.task.model_copy(update={"budget": ("1us",)})
    search.forecast.limits, search.run = search.task.limits, search.setting.models.parent
    trained(search, pool[0].policy, 2e-3)
    trained(search, pool[1].policy, 1e-3, id="00001")
    search.write_front()
    with pytest.raises(InfeasibleBudget, match="the fastest policy took 1 ms") as caught:
        _result(search)
    assert caught.value.smallest_latency_s == 1e-3


def test_a_search_in_which_nothing_could_be_measured_says_so(search):
    search.task, search.run = search.task.model_copy(update={"budget": ("1us",)}), search.setting.models.parent
    search.write_front()
    with pytest.raises(InfeasibleBudget, match="no policy could be measured in time"):
        _result(search)


def test_a_file_within_the_budget_comes_before_a_better_one_of_the_same_policy_that_is_not(search, pool):
    search.forecast.limits = Budget(latency_s=1e-3)
    policy = pool[0].policy
    trained(search, policy, 0.99e-3, score=0.7)
    trained(search, policy, 1.01e-3, score=0.8, id="00000-full", rung="full")
    assert [o.id for o in search.outcomes()] == ["00000"]
    search.forecast.limits = Budget()
    assert [o.id for o in search.outcomes()] == ["00000-full"]


def test_a_resumed_search_knows_the_original_as_it_was_measured_beside_the_others(search, forecast):
    found = {"latency_s": measurement(3.0), "val_score": Score(value=0.8), "test_score": Score(value=0.7)}
    search.keep_original(replace(search.setting.baseline, **found))
    half = replace(forecast, limits=Budget(relative=0.5))
    again = Search(TASK, search.run, search.journal, half, search.clock, SilentProgress(), points=[])
    again.recall()
    known = again.setting.baseline
    assert (known.latency_s.median, known.val_score.value, known.test_score.value) == (3.0, 0.8, 0.7)
    assert again.budget.latency_s == 1.5


def test_a_test_split_that_cannot_be_scored_costs_the_test_scores_only(search, pool, monkeypatch):
    search.progress = diary = Diary()
    trained(search, pool[0].policy, 1e-3)

    def fail(*_):
        raise PolicyFailure("the outputs of a model must be finite, but some are NaN or infinite")

    monkeypatch.setattr("autocompress.final.score_artifact", fail)
    score_test(search)
    assert any("the test split cannot be scored" in message and "finite" in message for message in diary.messages)
    assert search.front()


def test_a_search_in_which_all_failed_says_why(search, pool):
    failure = Failure(stage="export", reason="the exporter failed")
    search.journal.record(Outcome(id="00000", policy=pool[0].policy, rung="short", failure=failure))
    search.run = search.setting.models.parent
    search.write_front()
    with pytest.raises(TooManyFailures, match="the first failed to export: the exporter failed"):
        _result(search)


def test_a_policy_whose_prediction_straddles_the_budget_is_measured_before_it_is_trained(search, pool, monkeypatch):
    """Else the minutes of its training are lost where it turns out to be over the budget."""
    found, device = search.forecast, FakeDevice(SLOW_CALLS)
    found.networks, found.model = {}, replace_spread(found.model, 0.5)
    leader = max(pool, key=lambda p: p.latency_s)
    truth = device.seconds_of(leader.workload)
    measured = []
    monkeypatch.setattr(found, "_measure_untrained", lambda policy: measured.append(policy) or Untrained(policy, measurement(truth), 9))
    for limit, over in ((0.9 * truth, True), (1.1 * truth, False)):
        found.limits = Budget(latency_s=limit)
        assert (found.excess(leader) > 0) is over
    assert measured == [leader.policy] * 2
    for limit in (0.1 * truth, 10 * truth):
        found.limits = Budget(latency_s=limit)
        found.excess(leader)
    assert len(measured) == 2, "where the prediction is clear nothing is measured"
    found.networks[found.structure(leader.policy)] = (leader.workload, truth)
    found.limits = Budget(latency_s=0.99 * truth)
    assert found.excess(leader) > 0 and len(measured) == 2, "what was measured is not measured again"
    assert leader.policy not in [p.policy for p in found.again(pool)]


def replace_spread(model, spread):
    other = copy.copy(model)
    other._spread = spread
    other.fit = lambda pairs: None
    return other


def test_what_the_original_beats_is_not_on_the_front(search, pool):
    """Where the budget allows the original itself, a file that is slower and no better is worth nothing."""
    original = search.setting.baseline.latency_s.median
    search.keep_original(replace(search.setting.baseline, val_score=Score(value=0.8)))
    trained(search, pool[0].policy, 1.2 * original, score=0.8, id="00000")
    assert search.front() == []
    trained(search, pool[1].policy, 1.1 * original, score=0.9, id="00001")
    trained(search, pool[2].policy, 0.5 * original, score=0.5, id="00002")
    assert [o.id for o in search.front()] == ["00002", "00001"]
    search.forecast.limits = Budget(latency_s=0.9 * original)
    assert [o.id for o in search.front()] == ["00002"], "an original over the budget beats nothing"


def test_a_prediction_is_judged_as_it_was_before_the_network_was_measured(search, pool):
    policy = pool[3].policy
    before = search.forecast.predict(policy)
    for proposal in pool[3:15]:
        search.forecast._note(proposal.policy, 3.0 * search.forecast.predict(proposal.policy).value)
    search.forecast.learn([])
    assert search.forecast.predict(policy).value > 1.1 * before.value
    assert search.forecast.foretell(policy) == before
