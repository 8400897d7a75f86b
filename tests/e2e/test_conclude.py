"""The end of a search: its front is measured once more and scored on the test split, and what fails on the way."""

from __future__ import annotations

from dataclasses import replace

import pytest
from running import measurement, trained
from tasks import Diary

from autocompress.budget import Budget
from autocompress.controller.conclude import conclude, measure_front, score_test
from autocompress.controller.recovery import retry_failures
from autocompress.errors import PolicyFailure
from autocompress.records import Score
from autocompress.schedule import FEWEST_EXAMPLES, Clock
from autocompress.task import Task
from autocompress.testing.devices import FakeDevice
from autocompress.trial.starting import untrained_student


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


class Faithful(Worn):
    """Files take what they took before; the original takes this time."""

    def __init__(self, findings, latency):
        super().__init__(latency)
        self.findings = findings

    def measure(self, paths, *, seconds_each=1.0):
        self.asked.append([path.parent.name for path in paths])
        known = {o.id: o.latency_s for o in self.findings.journal.outcomes}
        return [known.get(path.parent.name, self.latency) for path in paths]


def with_device(findings, device):
    """On a device where the original takes what it took lately."""
    findings.setting = replace(findings.setting, device=device, baseline_history=[device.latency])


def on_front(findings, pool, n=3):
    """Outcomes that are all on the front: the slower the more accurate, and all more so than the original."""
    for index in range(n):
        id = f"{index:05d}"
        trained(findings, pool[index].policy, 1e-3 * (index + 1), score=0.91 + 0.01 * index, id=id, artifact=f"models/{id}/model.onnx")


def test_a_file_that_can_no_longer_be_measured_leaves_the_front_and_the_search_goes_on(findings, pool):
    on_front(findings, pool)
    with_device(findings, Worn(measurement(1e-3), broken=("00001",)))
    measure_front(findings, set())
    failures = {o.id: o.failure for o in findings.journal.outcomes if o.failure is not None}
    assert {id: (f.stage, f.reason) for id, f in failures.items()} == {"00001": ("measure", "the runtime crashed with SIGSEGV")}
    assert [o.id for o in findings.front()] == ["00002"], "all take the same time now"


def test_files_that_cannot_be_measured_together_are_measured_one_by_one(findings, pool):
    class Small(Worn):
        def measure(self, paths, *, seconds_each=1.0):
            if len(paths) > 2:
                raise PolicyFailure("the runtime was killed: out of memory")
            return super().measure(paths, seconds_each=seconds_each)

    on_front(findings, pool)
    device = Small(measurement(7e-3))
    with_device(findings, device)
    measure_front(findings, set())
    assert device.asked == [["baseline"], *(["baseline", f"0000{index}"] for index in range(3))]
    assert [(o.latency_s.median, o.failure) for o in findings.journal.outcomes] == [(7e-3, None)] * 3
    assert findings.setting.baseline.latency_s.median == 7e-3


def test_where_not_even_the_original_can_be_measured_the_front_stands_as_it_was(findings, pool):
    class Gone(Worn):
        def measure(self, paths, *, seconds_each=1.0):
            raise PolicyFailure("the runtime was killed: out of memory")

    on_front(findings, pool)
    before, findings.progress = findings.front(), Diary()
    with_device(findings, Gone(measurement(1e-3)))
    measure_front(findings, set())
    assert findings.front() == before
    assert any("as it was measured before" in message and "out of memory" in message for message in findings.progress.messages)


def test_what_comes_onto_the_front_for_a_file_that_fails_on_the_test_split_is_measured_and_scored_too(findings, pool, monkeypatch):
    def score(device, path, *_):
        if path.parent.name == "00001":
            raise PolicyFailure("the outputs of a model must be finite, but some are NaN or infinite")
        return Score(value=0.9, n=9)

    monkeypatch.setattr("autocompress.controller.conclude.score_artifact", score)
    on_front(findings, pool, 2)
    trained(findings, pool[2].policy, 2.5e-3, score=0.915, id="00002", artifact="models/00002/model.onnx")

    for outcome in findings.journal.outcomes:
        findings.journal.record(outcome.model_copy(update={"latency_s": outcome.latency_s.beside(measurement(9e-3))}))

    device = Faithful(findings, measurement(9e-3))
    with_device(findings, device)
    conclude(findings)
    assert device.asked == [["baseline", "00000", "00001"], ["baseline", "00002"]]
    assert {o.id: o.test_score is not None for o in findings.front()} == {"00000": True, "00002": True}


def test_a_front_that_was_concluded_is_measured_again_only_where_something_has_come_onto_it(findings, pool, monkeypatch):
    monkeypatch.setattr("autocompress.controller.conclude.score_artifact", lambda *_: Score(value=0.9, n=9))
    monkeypatch.setattr("autocompress.controller.conclude.is_intact", lambda folder: folder.name not in damaged)
    damaged = set()
    on_front(findings, pool, 2)

    device = Faithful(findings, measurement(9e-3))
    with_device(findings, device)
    conclude(findings)
    conclude(findings)
    assert device.asked == [["baseline", "00000", "00001"]]
    trained(findings, pool[2].policy, 3e-3, score=0.95, id="00002", artifact="models/00002/model.onnx")
    new = findings.journal.outcomes[-1]
    findings.journal.record(new.model_copy(update={"latency_s": new.latency_s.beside(measurement(9e-3))}))
    conclude(findings)
    assert device.asked[1:] == [["baseline", "00000", "00001", "00002"]]
    damaged.add("00001")
    conclude(findings)
    assert device.asked[2:] == [["baseline", "00000", "00001", "00002"]], "what is damaged must not stay unnoticed"
    damaged.clear()
    findings.record_baseline(replace(findings.setting.baseline, test_score=None))
    conclude(findings)
    assert len(device.asked) == 4, "the test split could not be scored, and can be now"


def test_the_front_is_measured_again_where_the_original_beside_it_is_slower_than_it_was(findings, pool, monkeypatch):
    """Seen on a shared machine: the one policy within the budget was out of it by what everything took longer in that minute."""

    class Restless(Worn):
        def measure(self, paths, *, seconds_each=1.0):
            slowness = 1.2 if not self.asked else 1.0
            self.asked.append([path.parent.name for path in paths])
            return [measurement(slowness * self.latency.median)] * len(paths)

    monkeypatch.setattr("autocompress.trial.beside_baseline.DRIFT_PAUSE_S", 0.0)
    on_front(findings, pool, n=1)
    device = Restless(measurement(1e-3))
    with_device(findings, device)
    measure_front(findings, set())
    assert device.asked == [["baseline", "00000"]] * 2
    assert [(o.latency_s.median, o.latency_s.noisy) for o in findings.front()] == [(1e-3, False)]
    device.asked.clear()
    findings.clock = Clock.start(60.0, already=60.0)
    measure_front(findings, set())
    assert len(device.asked) == 1, "there is no time"
    assert [(o.latency_s.median, o.latency_s.noisy) for o in findings.front()] == [(1.2e-3, True)]


def test_the_less_time_is_left_the_shorter_the_front_is_measured(findings, pool):
    class Hasty(Worn):
        def measure(self, paths, *, seconds_each=1.0):
            self.asked.append(seconds_each)
            return [self.latency] * len(paths)

    on_front(findings, pool)
    asked = []
    for already in (0.0, 56.0, 59.9):
        findings.clock = Clock.start(60.0, already=already)
        device = Hasty(measurement(1e-3))
        with_device(findings, device)
        measure_front(findings, set())
        asked.append(device.asked[0])
    assert asked[0] == 1.5 > asked[1] > asked[2] == 0.3


def test_a_budget_of_the_95th_percentile_is_measured_until_that_is_known(findings, pool):
    on_front(findings, pool)
    device = Worn(measurement(1e-3))
    seconds = []
    device.measure = lambda paths, *, seconds_each: seconds.append(seconds_each) or [device.latency] * len(paths)
    with_device(findings, device)
    findings.record_baseline(replace(findings.setting.baseline, latency_s=measurement(0.05)))
    findings.forecast.limits = Budget(p95_s=1.0)
    measure_front(findings, set())
    assert seconds[0] == pytest.approx(59 * 0.05)


def test_a_file_that_was_lost_comes_back_when_it_is_intact_and_else_its_policy_may_be_tried_again(findings, pool):
    on_front(findings, pool)
    for id, proposal in zip(("00000", "00001"), pool, strict=False):
        findings.setting.write(findings.run / "models" / id, untrained_student(findings.setting, proposal.policy), proposal.policy)
    (findings.run / "models" / "00001" / "model.onnx").write_bytes(b"damaged")
    with_device(findings, Worn(measurement(1e-3), broken=("00000", "00001", "00002")))
    measure_front(findings, set())
    assert findings.front() == []
    assert retry_failures(findings) == 3
    assert [(o.id, o.failure) for o in findings.journal.outcomes] == [("00000", None)]
    assert retry_failures(findings) == 0


def test_what_misses_a_95th_percentile_when_it_is_measured_again_is_no_longer_within_the_budget(findings, pool):
    """Although its median got faster."""
    trained(findings, pool[0].policy, 5e-3)
    findings.task = Task(model="own:net", data="own:blobs", search_time="60s", budget=("p95=6ms",))
    findings.forecast.limits = findings.task.limits
    with_device(findings, Worn(measurement(4e-3, p95=7e-3)))
    measure_front(findings, set())
    assert findings.front() == []


def test_what_was_measured_first_is_kept_beside_what_was_measured_last(findings, pool):
    trained(findings, pool[0].policy, 5e-3)
    with_device(findings, Worn(measurement(4e-3)))
    for _ in range(2):
        measure_front(findings, set())
        (outcome,) = findings.journal.outcomes
        assert (outcome.latency_s.median, outcome.search_latency_s.median) == (4e-3, 5e-3)


def test_a_part_of_the_test_split_is_scored_where_time_is_short_and_it_is_said(findings, pool):
    test = findings.setting.data.test
    findings.clock, findings.per_example_s, findings.progress = Clock.start(60.0, already=60.0), 1.0, Diary()
    score_test(findings)
    assert findings.progress.messages[0].startswith(f"scoring {FEWEST_EXAMPLES} of {len(test)} test examples")
    assert findings.setting.baseline.test_score.n == FEWEST_EXAMPLES
    findings.clock = Clock.start(60.0)
    score_test(findings)
    assert findings.setting.baseline.test_score.n == FEWEST_EXAMPLES, "the same part when the search is resumed"


def test_a_model_that_is_no_slower_than_usual_has_a_test_score_of_some_worth_even_beyond_the_deadline(findings):
    findings.clock, findings.per_example_s = Clock.start(60.0, already=61.0), 0.05
    score_test(findings)
    assert findings.setting.baseline.test_score.n == 0.05 * 60.0 / 0.05


def test_a_file_that_cannot_be_scored_on_the_test_set_leaves_the_front(findings, pool):
    on_front(findings, pool, 1)
    score_test(findings)
    (lost,) = findings.journal.outcomes
    assert lost.failure.stage == "test"
    assert findings.setting.baseline.test_score is not None


def test_a_test_split_that_cannot_be_scored_costs_the_test_scores_only(findings, pool, monkeypatch):
    findings.progress = diary = Diary()
    trained(findings, pool[0].policy, 1e-3)

    def fail(*_):
        raise PolicyFailure("the outputs of a model must be finite, but some are NaN or infinite")

    monkeypatch.setattr("autocompress.controller.conclude.score_artifact", fail)
    score_test(findings)
    assert any("the test split cannot be scored" in message and "finite" in message for message in diary.messages)
    assert findings.front()
