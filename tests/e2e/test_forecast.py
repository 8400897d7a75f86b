"""What can be known before training: budgets that nothing meets, with cures that work; spaces that do not fit."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from tasks import SLOW_CALLS, Diary, Net
from torch import nn

from autocompress.budget import Budget
from autocompress.candidates import pool as pool_module
from autocompress.candidates.ahead import measure_ahead
from autocompress.candidates.feasibility import Feasibility
from autocompress.candidates.forecast import FEASIBILITY_SLACK, Forecast
from autocompress.candidates.pool import DRAWS, draw_pool
from autocompress.candidates.proposals import CELLS, KEPT_EACH
from autocompress.errors import InfeasibleBudget, UsageError
from autocompress.latency import FittedLatencyModel, OperatorTable
from autocompress.policy import Policy, PruneSpec, QuantSpec, StudentSpec
from autocompress.schedule import FEWEST_EXAMPLES
from autocompress.search_space import fastest, find_suggest
from autocompress.session import run_search
from autocompress.setup.loading import load
from autocompress.suggesters import LevelSuggester, Variation
from autocompress.task import Task
from autocompress.testing.devices import FakeDevice
from autocompress.trial.preparation import prepare
from autocompress.workload import Workload

TASK = Task(model="own:net", data="own:blobs", search_time="60s")


@pytest.fixture(scope="module")
def setting(net, data, tmp_path_factory):
    return prepare(TASK, tmp_path_factory.mktemp("forecast") / "run", load(TASK, model=net, data=data, device=FakeDevice(SLOW_CALLS)))


def forecast(setting, budget=(), suggest=None, space="default") -> Forecast:
    suggest = suggest or find_suggest(space, setting.graphs[None], setting.device.profile)
    limits = (Budget.parse(budget) if budget else Budget()).against(setting.baseline.latency_s.median)
    return Forecast(setting, suggest, limits, FittedLatencyModel(OperatorTable()))


@pytest.mark.parametrize(
    ("budget", "kind"),
    [("1us", r"[\d.]+ ?[mu]s"), ("p95=1us", r"p95=[\d.]+ ?[mu]s"), ("100B", r"[\d.]+ ?k?B"), ("1s,100B", r"[\d.]+ ?k?B")],
)
@pytest.mark.parametrize("space", ["default", "quantize"])
def test_the_cure_of_a_budget_that_nothing_meets_is_of_its_kind_and_works(setting, budget, kind, space):
    with pytest.raises(InfeasibleBudget, match="no policy of the space meets the budget") as caught:
        Feasibility(forecast(setting, budget, space=space)).require_hope()
    cure = re.search(rf"--budget ({kind})(;|$)", caught.value.hint)
    assert cure, caught.value.hint
    Feasibility(forecast(setting, cure[1], space=space)).require_hope()


def test_a_budget_just_out_of_reach_is_refused_once_the_device_is_known(setting):
    found = forecast(setting)
    measure_ahead(found, 2.0, 0, lambda *_: None)
    fastest = min(draw_pool(found, 0, 1.0), key=lambda p: p.latency_s)
    seconds = FakeDevice(SLOW_CALLS).seconds_of(fastest.workload)
    found.limits = Budget.parse(f"{0.8e6 * seconds:.4f}us")
    Feasibility(found).require_hope()
    with pytest.raises(InfeasibleBudget, match="no policy of the space meets the budget") as caught:
        Feasibility(found).require_feasible(draw_pool(found, 0, 1.0))
    assert caught.value.binds
    assert f"the time goes to {caught.value.binds}" in caught.value.hint
    found.limits = Budget.parse(re.search(r"--budget (\S+?)[;,]", caught.value.hint)[1])
    Feasibility(found).require_feasible(draw_pool(found, 0, 1.0))


def test_a_size_and_a_time_that_no_policy_meets_together_are_refused_with_what_does(setting):
    """Storage of 4 bits is small and computed in float32; int8 is fast and twice as large."""
    found = forecast(setting, space="quantize")
    measure_ahead(found, 2.0, 0, lambda *_: None)
    pool = draw_pool(found, 0, 1.0)
    small, fast = (min(pool, key=key) for key in (lambda p: p.workload.weight_bytes, lambda p: p.latency_s))
    overhead = setting.baseline.size_bytes - setting.graphs[None].workload(Policy()).weight_bytes
    assert fast.workload.weight_bytes > 1.1 * small.workload.weight_bytes and small.latency_s > 1.1 * fast.latency_s
    size, seconds = 1.05 * (small.workload.weight_bytes + overhead) / FEASIBILITY_SLACK, 1.2 * fast.latency_s / FEASIBILITY_SLACK
    for budget, refused in (
        (f"{1e6 * seconds:.3f}us,{size:.0f}B", True),
        (f"{1e6 * FEASIBILITY_SLACK * seconds * 4:.3f}us,{FEASIBILITY_SLACK * size:.0f}B", False),
    ):
        found.limits = Budget.parse(budget)
        try:
            Feasibility(found)._require_both([*pool])
        except InfeasibleBudget as error:
            assert refused and "the nearest takes" in error.message and "--budget" in error.hint
        else:
            assert not refused


def test_whole_networks_that_are_measured_ahead_are_of_the_latencies_of_interest(setting, monkeypatch):
    """A student that is wider than the teacher takes long to be made and measured, and says nothing of those within the budget."""
    found, measured = forecast(setting, "0.6x"), []
    monkeypatch.setattr(Forecast, "measure_untrained", lambda self, policy: measured.append(policy))
    measure_ahead(found, 2.0, 0, lambda *_: None)
    slowest = max(found.predict(policy).value for policy in measured)
    assert len(measured) > 1
    assert slowest <= FEASIBILITY_SLACK * found.latency_limit < found.setting.baseline.latency_s.median


class Moody(FakeDevice):
    """Takes twice as long for all it is asked to measure at every other time, as beside neighbours on a shared machine."""

    def measure(self, paths, *, seconds_each=1.0):
        factor = 1.0 + self.calls % 2
        return [latency.times(factor) for latency in super().measure(paths, seconds_each=seconds_each)]


def test_a_machine_that_is_slower_now_and_then_changes_no_prediction(setting):
    """Seen on shared machines: what was measured while the machine was slow was held for the network's own latency."""
    steady, moody = forecast(setting), forecast(replace(setting, device=Moody(SLOW_CALLS)))
    policy = Policy(student=StudentSpec(width=0.5))
    for found in (steady, moody):
        found.setting.baseline_history.clear()
        measure_ahead(found, 2.0, 0, lambda *_: None)
    assert moody.predict(policy).value == pytest.approx(steady.predict(policy).value)
    truth = steady.usual(steady.measure_untrained(policy)).median
    for _ in range(2):
        assert moody.usual(moody.measure_untrained(policy)).median == pytest.approx(truth)


def test_a_network_that_is_only_timed_is_hardly_calibrated(setting, monkeypatch):
    plans = []
    monkeypatch.setattr(
        "autocompress.trial.starting.train_quantized", lambda student, quant, data, plan: plans.append(plan) or student.eval()
    )
    forecast(setting).measure_untrained(Policy(student=StudentSpec(width=0.5)))
    assert [plan.calibration_inputs for plan in plans] == [FEWEST_EXAMPLES]


@pytest.mark.parametrize(("spread", "counted"), [(1.0, 1.0), (1.03, 1.03), (1.4, 1.05)], ids=["exact", "wide", "noisy"])
def test_a_prediction_is_judged_by_the_upper_end_of_an_interval_as_wide_as_the_originals(setting, spread, counted):
    latency = setting.baseline.latency_s
    wide = replace(setting.baseline, latency_s=latency.model_copy(update={"high": spread * latency.median}))
    found = forecast(replace(setting, baseline=wide))
    assert found.upper(1e-3) == pytest.approx(counted * 1e-3)
    proposal = found.proposal(Policy(), {})
    for limit, within in ((0.999, False), (1.001, True)):
        found.limits = Budget(latency_s=limit * counted * found.latency_s(proposal))
        assert bool(found.within_budget([proposal])) is within


def test_what_binds_is_said_before_anything_was_measured(setting):
    with pytest.raises(InfeasibleBudget) as caught:
        Feasibility(forecast(setting, "1us")).require_hope()
    layers = {layer.name for layer in setting.graphs[None].layers}
    assert set(caught.value.binds.split(", ")) <= layers


def test_a_size_is_judged_by_the_fewest_bits(setting):
    """Storage of 4 bits is smaller than int8, which is what runs fastest."""
    int8 = setting.baseline.size_bytes * 0.5
    Feasibility(forecast(setting, f"{int8 / 1e3:.1f}kB", space="quantize")).require_hope()


def test_a_space_whose_names_do_not_say_which_end_is_fast_is_not_refused(setting):
    """`cut` is fast at its high end, unlike a width."""
    graph, device = setting.graphs[None], FakeDevice(SLOW_CALLS)
    groups = [group.name for group in graph.groups if group.prunable]

    def cut(share):
        return Policy(prune=PruneSpec(ratios=dict.fromkeys(groups, share)), quant=QuantSpec(bits=8))

    slow, fast = (device.seconds_of(graph.workload(cut(share))) for share in (0.0, 0.9))
    budget = 0.95 * slow / FEASIBILITY_SLACK
    assert fast < 0.8 * budget

    def space(trial):
        return cut(trial.suggest_float("cut", 0.0, 0.9))

    Feasibility(forecast(setting, f"{1e6 * budget:.3f}us", suggest=space)).require_hope()
    smallest = forecast(setting).measure_untrained(cut(0.9)).size_bytes
    Feasibility(forecast(setting, f"{smallest / 1.2 / 1e3:.2f}kB", suggest=space)).require_hope()
    with pytest.raises(InfeasibleBudget):
        Feasibility(forecast(setting, f"{smallest / 2 / 1e3:.2f}kB", suggest=space)).require_hope()


def test_a_budget_that_only_float32_meets_is_not_refused_where_int8_is_slower(net, data, tmp_path):
    """As on processors without instructions for int8, and for networks of many small operators anywhere."""
    costs = SLOW_CALLS.model_copy(update={"mac_int8": 10 * SLOW_CALLS.mac})
    setting = prepare(TASK, tmp_path / "run", load(TASK, model=net, data=data, device=FakeDevice(costs)))
    in_int8, in_float = (setting.device.seconds_of(setting.graphs[None].workload(p)) for p in fastest(forecast(setting).suggest))
    assert in_int8 > 3 * in_float
    found = forecast(setting, f"{1.05e6 * in_float:.3f}us")
    Feasibility(found).require_hope()
    measure_ahead(found, 2.0, 0, lambda *_: None)
    Feasibility(found).require_feasible(draw_pool(found, 0, 1.0))
    with pytest.raises(InfeasibleBudget) as caught:
        Feasibility(forecast(setting, "1us")).require_hope()
    assert in_float <= caught.value.smallest_latency_s < 1.1 * in_float


def test_without_a_budget_nothing_is_refused(setting):
    Feasibility(forecast(setting)).require_hope()


def best_within(pool, latency_s):
    return max((p.promise for p in pool if p.latency_s <= latency_s), default=0.0)


@pytest.fixture
def drawn_and_bred(monkeypatch):
    """The draws that a pool begins with, and the pool; of fixed work, whatever the machine does besides."""
    monkeypatch.setattr("autocompress.candidates.pool.MOST_DRAWS", 1024)
    monkeypatch.setattr("autocompress.candidates.pool.GENERATIONS", 20)

    def make(found):
        measure_ahead(found, 2.0, 0, lambda *_: None)
        seen = []
        draw = pool_module._draw
        monkeypatch.setattr(pool_module, "_draw", lambda forecast, suggesters: seen.append(draw(forecast, suggesters)) or seen[-1])
        pool = draw_pool(found, 0, 1e6)
        return [p for part in seen[: 1024 // DRAWS] for p in part], pool

    return make


def test_a_pool_is_better_than_its_draws_at_all_latencies(setting, drawn_and_bred):
    found = forecast(setting, "0.9x")
    drawn, pool = drawn_and_bred(found)
    fastest, limit = min(p.latency_s for p in pool), found.latency_limit
    assert fastest <= min(p.latency_s for p in drawn)
    cell = (FEASIBILITY_SLACK * limit / fastest) ** (1 / CELLS)
    gains = [best_within(pool, cell * at) / max(1e-9, best_within(drawn, at)) for at in np.geomspace(fastest, limit, 9)]
    assert min(gains) >= 1
    assert np.median(gains) > 1.02
    assert len(pool) <= CELLS * KEPT_EACH + 1, "each costs time whenever the next policy is chosen"
    assert all(p.latency_s <= limit for p in found.within_budget(pool))


def test_a_pool_holds_what_a_limit_on_size_allows(setting, drawn_and_bred):
    """What promises most is large: at each latency what is too large is for where nothing else is."""
    weights = forecast(setting).teacher_workload.weight_bytes
    found = forecast(setting, f"{setting.baseline.size_bytes - 0.6 * weights:.0f}B", space="prune")
    drawn, pool = drawn_and_bred(found)
    small = found.within_budget(pool)
    assert max(p.promise for p in small) >= max(p.promise for p in found.within_budget(drawn))
    assert max(p.promise for p in small) < max(p.promise for p in pool), "the limit binds"


def test_a_pool_is_not_empty_where_nothing_is_within_the_budget(setting):
    found = forecast(setting, "0.01us")
    assert len(draw_pool(found, 0, 1.0)) > KEPT_EACH


def test_a_space_of_few_policies_is_soon_bred(setting):
    found = forecast(setting, suggest=lambda trial: Policy(quant=QuantSpec(bits=trial.suggest_categorical("bits", [8, 32]))))
    pool = draw_pool(found, 0, 1e6)
    assert {p.policy.quant.bits for p in pool} == {8, 32}
    assert len(pool) == 2


def test_slow_draws_leave_time_to_breed(setting):
    """Of a large network a draw takes long: most of the time is for variations, however few draws that leaves."""
    kinds: list[type] = []
    draw = find_suggest("default", setting.graphs[None], setting.device.profile)

    def slow(suggester):
        kinds.append(type(suggester.asked))
        time.sleep(0.02)
        return draw(suggester)

    started = time.monotonic()
    draw_pool(forecast(setting, suggest=slow), 0, 3.0)
    assert kinds.count(LevelSuggester) < 150
    assert kinds.count(Variation) > 10
    assert time.monotonic() - started < 3.0 + 10 * DRAWS * 0.02, "the clock is looked at between a few draws"


def test_a_pool_keeps_to_its_time_and_is_never_empty(setting):
    assert 0 < len(draw_pool(forecast(setting), 0, 0.0)) <= DRAWS


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Policy(prune=PruneSpec(ratios={"cnv": 0.5})), "channel group 'cnv'"),
        (Policy(quant=QuantSpec(layers={"nothing": 8})), "layer 'nothing'"),
        (Policy(student=StudentSpec(reference="torchvision:resnet18")), "'torchvision:resnet18', which this search does not know"),
    ],
)
def test_a_space_of_ones_own_that_names_what_is_not_there_is_refused_before_training(setting, policy, message):
    with pytest.raises(UsageError, match=message):
        draw_pool(forecast(setting, suggest=lambda trial: policy), 0, 1.0)


def test_weights_that_no_file_can_hold_are_over_every_budget(setting):
    huge = Workload(operators=(), weight_bytes=2**31)
    assert forecast(setting).violation(huge, 1e-9) > 0


def test_a_network_that_cannot_be_traced_is_searched_all_the_same(data, tmp_path, monkeypatch):
    """On a device of which nothing is known yet."""

    class Untraceable(Net):
        def forward(self, x):
            return super().forward(x * 1.0 if x.shape[2] > 4 else x)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("autocompress.controller.pace.FULL_FACTOR", 0.1)
    torch.manual_seed(0)
    model: nn.Module = Untraceable().eval()
    diary = Diary()
    result = run_search(
        TASK.model_copy(update={"trials": 2}),
        tmp_path / "run",
        model=model,
        data=data,
        device=FakeDevice(SLOW_CALLS),
        progress=diary,
    )
    assert [entry["id"] for entry in result.content["points"]]
    assert all(entry["latency_s"]["median"] > 0 for entry in result.content["points"])


def test_a_budget_that_the_interval_of_a_prediction_straddles_is_decided_by_measuring(setting):
    """Else a search would train for an hour what cannot meet its budget."""
    found = forecast(setting)
    measure_ahead(found, 2.0, 0, lambda *_: None)
    pool = draw_pool(found, 0, 1.0)
    known = [*(found.proposal(policy, {}) for policy in fastest(found.suggest)), *pool]
    least = min(FakeDevice(SLOW_CALLS).seconds_of(proposal.workload) for proposal in known)
    found.model._spread = 0.5
    found.model.fit = lambda pairs: None  # as on a restless machine: measuring does not make it surer
    found.limits = Budget(latency_s=0.9 * least)
    with pytest.raises(InfeasibleBudget):
        Feasibility(found).require_feasible(pool)
    found.limits = Budget(latency_s=1.1 * least)
    Feasibility(found).require_feasible(pool)
