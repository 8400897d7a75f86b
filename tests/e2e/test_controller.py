"""Which policy comes next: bands first, what is ruled out, what waits, and when the short rung ends."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from tasks import SLOW_CALLS, Diary

from autocompress import study as journal
from autocompress.controller import Search
from autocompress.forecast import Forecast
from autocompress.latency import FittedLatencyModel, OperatorTable
from autocompress.policy import Policy, QuantSpec
from autocompress.preparation import prepare
from autocompress.progress import SilentProgress
from autocompress.proposals import Band, bands
from autocompress.records import Budget, Measurement, Outcome, Score
from autocompress.schedule import Clock, Division
from autocompress.search_space import find_suggest
from autocompress.task import Task
from autocompress.testing.devices import FakeDevice

TASK = Task(model="own:net", data="own:blobs", search_time="60s")
PATIENCE = 5.0


@pytest.fixture(scope="module")
def forecast(net, data, tmp_path_factory):
    setting = prepare(TASK, tmp_path_factory.mktemp("controller") / "run", model=net, data=data, device=FakeDevice(SLOW_CALLS))
    setting = replace(setting, baseline=replace(setting.baseline, val_score=Score(value=0.9)))
    suggest = find_suggest("default", setting.graphs[None], setting.device.profile)
    found = Forecast(setting, suggest, Budget(), FittedLatencyModel(OperatorTable()))
    found.calibrate(4.0, 0, lambda *_: None)
    return found


@pytest.fixture(scope="module")
def pool(forecast):
    return forecast.pool(0, 60.0)


@pytest.fixture
def search(forecast, tmp_path):
    study = journal.open_study(tmp_path, TASK, resume=False)
    return Search(TASK, tmp_path, study, replace(forecast), Clock.start(60.0), SilentProgress(), points=[])


def trained(search, policy, seconds, score=0.8, id="00000", **changes):
    latency = Measurement(median=seconds, low=seconds, high=seconds, p95=seconds, n=9)
    made = Outcome(id=id, policy=policy, rung="short", val_score=Score(value=score), latency_s=latency, artifact="a.onnx", size_bytes=9)
    journal.record(search.study, made.model_copy(update=changes))


def structures(search):
    return {o.policy.structure_digest for o in journal.outcomes(search.study)}


def test_the_bands_come_first_slowest_first_and_one_that_holds_a_network_is_passed_over(search, pool):
    first = bands(pool, 4, search.forecast.latency_limit)
    slow, second, third = first[:3]
    _, policy = search._next(first, pool, PATIENCE)
    assert search.forecast.predict(policy).value in slow
    assert policy == slow.leader(search.forecast.again(pool)).policy
    trained(search, policy, 0.99 * second.slowest)  # it was faster than predicted
    _, policy = search._next(first, pool, PATIENCE)
    assert search.forecast.predict(policy).value in third


def test_the_second_try_of_a_band_is_another_network(search, pool):
    band = bands(pool, 4, search.forecast.latency_limit)[1]
    first, chosen = [band, band], []
    for attempt in range(2):
        _, policy = search._next(first, pool, PATIENCE)
        chosen.append(policy.structure_digest)
        trained(search, policy, 2 * band.slowest, id=f"0000{attempt}")
    assert len(set(chosen)) == 2
    assert not first


def test_what_waits_comes_before_the_bands(search, pool):
    search.study.enqueue_trial(pool[7].params)
    first = [Band(0.0, 1.0)]
    _, policy = search._next(first, pool, PATIENCE)
    assert policy == pool[7].policy
    assert len(first) == 1


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
        search._ask(pool, leading, PATIENCE)
    told = [t for t in search.study.trials if t.constraints]
    assert all(t.constraints["outclassed"] > 0 >= t.constraints["budget"] for t in told)
    assert bool(told) is rules_out


def test_what_is_over_the_budget_leads_nothing(search):
    search.forecast.budget = Budget(size_bytes=8)
    trained(search, Policy(quant=QuantSpec(bits=8)), 1e-6, id="int8", rung="unchanged")
    assert search._leading() == []


def test_a_search_that_has_no_patience_draws_what_is_new(search, pool):
    for number in range(6):
        before = structures(search)
        _, policy = search._ask(pool, [], 0.0)
        assert policy.structure_digest not in before
        trained(search, policy, 1.0, id=f"0000{number}")
    assert len(structures(search)) == 6


def test_short_runs_end_with_their_share_of_time_once_one_is_within_the_budget(search, pool):
    division, past = Division.of(60.0, 0.1), time.monotonic() - 1.0
    assert search._room_for_short(past, division), "nothing is within the budget yet"
    search.forecast.budget = Budget(latency_s=0.5)
    trained(search, pool[0].policy, 1.0)
    assert search._room_for_short(past, division), "what was trained is over the budget"
    trained(search, pool[1].policy, 0.1, id="00001")
    assert not search._room_for_short(past, division)
    assert search._room_for_short(time.monotonic() + 60.0, division)
    search.clock = Clock.start(60.0, already=60.0)
    search.forecast.budget = Budget(latency_s=1e-9)
    assert not search._room_for_short(past, division), "no time is left"


@pytest.mark.parametrize(
    ("score", "words"), [(Score(value=0.8125), "81.25 %"), (Score(name="signal to noise", value=31.7, n=9), "31.7")], ids=["share", "number"]
)
def test_a_score_is_told_in_percent_only_where_it_is_a_share(search, score, words):
    search.progress = diary = Diary()
    latency = Measurement(median=1e-3, low=1e-3, high=1e-3, p95=1e-3, n=9)
    search.best = Outcome(id="00000", policy=Policy(), rung="short", val_score=score, latency_s=latency, artifact="a.onnx", size_bytes=9)
    search._announce(search.best)
    search._show("full training", 0, 1)
    assert diary.messages[0].startswith(f"policy 00000: {words} {score.name}, 1 ms, ")
    assert diary.best == f"{words} at 1 ms"
