"""Whole searches, from a task to files, on a device whose truth is arithmetic."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import optuna
import pytest
import torch
from optuna.trial import TrialState
from plotly.graph_objects import Figure
from running import journal_of, short_runs_only
from tasks import SLOW_CALLS, BrokenDevice, Diary, Net, blobs

import autocompress
from autocompress.budget import Budget
from autocompress.data import Split
from autocompress.errors import InfeasibleBudget, TooManyFailures, UsageError
from autocompress.policy import DistillSpec, Policy, PruneSpec, QuantSpec
from autocompress.ranking.front import non_dominated
from autocompress.records import Measurement
from autocompress.session import SearchResult, run_search
from autocompress.task import Task
from autocompress.testing.devices import FakeDevice

ENTRY = {
    "id", "digest", "policy", "val_score", "test_score", "latency_s", "predicted_latency_s", "size_bytes", "speedup", "feasible",
    "artifact",
}  # fmt: skip
FILE = {"schema", "task", "device", "environment", "budget", "baseline", "front", "best"}
BUNDLE = {"policy.json", "student.safetensors", "model.onnx", "manifest.json"}
SECONDS = 36.0


def task(**changes) -> Task:
    return Task(model="own:net", data="own:blobs", search_time="60s").model_copy(update=changes)


def trials_of(run: Path) -> list[optuna.trial.FrozenTrial]:
    return journal_of(run).study.get_trials(deepcopy=False)


def strict(path: Path) -> dict:
    """JSON without NaN and infinity."""

    def refuse(text):
        raise AssertionError(f"{path} holds {text}")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def accesses() -> tuple[type[Split], list[tuple[str, int]], Diary]:
    """A test split that notes (phase of the search, rows) whenever inputs are taken from it, in whichever way."""
    diary, seen = Diary(), []

    class Watched(Split):
        def _note(self, count):
            seen.append((diary.phases[-1] if diary.phases else "", count))

        def __getitem__(self, index):
            part = Split(self._inputs[index], self.targets[index])
            self._note(len(part))
            return part

        def rows(self, index):
            self._note(len(index))
            return super().rows(index)

        @property
        def inputs(self):
            self._note(len(self))
            return super().inputs

    return Watched, seen, diary


@pytest.fixture
def brisk(monkeypatch):
    short_runs_only(monkeypatch)


@dataclass
class Finished:
    result: SearchResult
    seconds: float
    test_accesses: list[tuple[str, int]]
    weights_before: dict[str, torch.Tensor]
    net: torch.nn.Module
    device: FakeDevice

    @property
    def run(self) -> Path:
        return self.result.run


@pytest.fixture(scope="module")
def finished(net, tmp_path_factory) -> Finished:
    """One search under a budget that takes all of its time."""
    watched, seen, diary = accesses()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    device = FakeDevice(SLOW_CALLS, noise=0.01)
    run = tmp_path_factory.mktemp("search") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autocompress.controller.choice.VARIANT_SHARE", 0.5)
        patch.setattr("autocompress.schedule.APPRAISAL_SHARE", 0.3)
        patch.setattr("autocompress.controller.pace.Pace.overhead", lambda self: 0.3)
        patch.setattr("autocompress.schedule.SHORT_SHARE", 0.5)
        started = time.monotonic()
        wanted = task(search_time=f"{SECONDS:g}s", budget=("0.6x",))
        result = run_search(wanted, run, model=net, data=blobs(test=watched), device=device, progress=diary)
    return Finished(result, time.monotonic() - started, seen, before, net, device)


def test_the_result_file_keeps_its_contract(finished):
    content = strict(finished.run / "front.json")
    assert set(content) >= FILE
    assert content["schema"] == 1
    assert content["device"] == "fake"
    assert content["task"]["search_time"] == f"{SECONDS:g}s"
    assert content["front"], "there is an answer"
    entries = content["front"] + content["points"]
    for entry in entries:
        assert set(entry) >= ENTRY
        assert Policy.model_validate(entry["policy"]).digest == entry["digest"]
        latency = entry["latency_s"]
        assert set(latency) >= {"median", "low", "high", "p95", "n"}
        assert 0 < latency["low"] <= latency["median"] <= latency["high"] <= latency["p95"] * 1.05
        assert latency["median"] < 1e-2, "seconds, not milliseconds"
        assert set(entry["predicted_latency_s"]) == {"value", "low", "high"}
        path = Path(entry["artifact"])
        assert not path.is_absolute()
        assert (finished.run / path).stat().st_size == entry["size_bytes"], "bytes of the file that ships"
        assert 0 <= entry["val_score"]["value"] <= 1
        assert entry["val_score"]["direction"] == "maximize"
        assert entry["val_score"]["name"] == "accuracy"
        assert entry["speedup"] == pytest.approx(latency["original_s"] / latency["median"])
    assert all(entry["test_score"]["n"] == 64 for entry in content["front"])


def test_the_front_is_within_the_budget_and_nothing_on_it_is_dominated(finished):
    content = finished.result.content
    budget = Budget.model_validate(content["budget"])
    assert budget.latency_s == pytest.approx(0.6 * content["baseline"]["latency_s"]["median"])
    for entry in content["front"]:
        assert entry["feasible"] is True
        assert budget.allows(Measurement.model_validate(entry["latency_s"]), entry["size_bytes"]), "measured beside this original"
    for entry in content["points"]:
        assert entry["feasible"] is Budget(relative=0.6).allows(Measurement.model_validate(entry["latency_s"]), entry["size_bytes"])
    networks = {}
    for entry in (e for e in content["points"] if e["feasible"]):
        networks.setdefault(json.dumps({**entry["policy"], "distill": None}), []).append(entry)
    shown = {entry["id"] for entry in content["front"]}
    points = []
    for files in networks.values():  # of one network, which differ by noise; the longest trained of equals is the one
        files.sort(key=lambda e: (e["id"] in shown, e["val_score"]["value"], e["speedup"]))
        assert [e["id"] in shown for e in files].count(True) <= 1
        assert min(e["speedup"] for e in files) == pytest.approx(max(e["speedup"] for e in files), rel=0.02)
        assert files[-1]["val_score"]["value"] >= max(e["val_score"]["value"] for e in files) - 0.1, "chance explains no more"
        points.append((files[-1]["val_score"]["value"], 1 / files[-1]["speedup"]))
    on_front = [(e["val_score"]["value"], 1 / e["speedup"]) for e in content["front"]]
    assert sorted(on_front) == sorted(point for point, kept in zip(points, non_dominated(points), strict=True) if kept)
    assert on_front == sorted(on_front, key=lambda point: point[1]), "fastest first"
    best = max(on_front)
    assert content["best"] == next(e["id"] for e in content["front"] if e["val_score"]["value"] == best[0])


def test_measured_latencies_are_the_truth_of_the_device(finished):
    import onnx

    for entry in finished.result.content["points"]:
        truth = finished.device.seconds_of_model(onnx.load(finished.run / entry["artifact"]))
        assert entry["latency_s"]["median"] == pytest.approx(truth, rel=0.02)


def test_the_run_folder_holds_what_the_contract_lists(finished):
    names = {path.name for path in finished.run.iterdir()}
    assert names >= {"task.toml", "study.db", "front.json", "report.html", "pareto.png", "models"}
    for entry in finished.result.content["points"]:
        assert {path.name for path in (finished.run / "models" / entry["id"]).iterdir()} >= BUNDLE
    assert (finished.run / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in finished.run.rglob(".*") if path.name != ".lock"], "no temporary file"
    from autocompress.task import load_task

    assert load_task(finished.run / "task.toml", {}) == task(search_time=f"{SECONDS:g}s", budget=("0.6x",))


def test_the_result_object(finished, tmp_path, monkeypatch):
    result = SearchResult.load(finished.run)
    assert result == finished.result
    assert [policy.digest for policy in result.front] == [entry["digest"] for entry in result.content["front"]]
    frame = result.frame()
    assert len(frame) == len(result.content["points"])
    layers = result.explain()
    assert len(layers) == len(result.entries[-1].layers) and {"name", "channels", "bits", "note"} <= {*layers}
    assert result.plot() == finished.run / "pareto.png"
    assert result.plot(tmp_path / "own.png").stat().st_size > 1000
    (finished.run / "report.html").unlink()
    assert result.report().stat().st_size > 1_000_000 and result.report() == finished.run / "report.html"
    figures = result.figures()
    assert set(figures) >= {"pareto", "progress", "prediction", result.best}
    assert all(isinstance(figure, Figure) and "$" not in figure.to_json() for figure in figures.values())
    monkeypatch.setattr("autocompress.commands.deploy.open_device", lambda name: finished.device)
    exported = result.export(tmp_path / "out")
    assert {path.name for path in exported.folder.iterdir()} == BUNDLE
    best = next(entry for entry in result.content["points"] if entry["id"] == result.best)
    assert exported.manifest.policy_digest == best["digest"]
    assert exported.manifest.latency_s.median == pytest.approx(best["latency_s"]["median"], rel=0.02)
    assert exported.within_budget
    with pytest.raises(UsageError, match="no measured policy has the id 'nobody'"):
        result.export(tmp_path / "other", pick="nobody")


def test_the_model_of_the_user_stays_as_it_was(finished):
    after = finished.net.state_dict()
    assert after.keys() == finished.weights_before.keys()
    for key, value in finished.weights_before.items():
        assert torch.equal(after[key], value), key
        assert after[key].device == value.device
    assert not finished.net.training
    assert all(parameter.requires_grad for parameter in finished.net.parameters())


def test_the_deadline_holds(finished):
    assert finished.seconds <= 1.05 * SECONDS + 3.0
    assert finished.result.content["elapsed_s"] <= finished.seconds


def test_it_says_what_its_time_went_to(finished):
    spent, elapsed = finished.result.content["spent_s"], finished.result.content["elapsed_s"]
    assert {"prepare", "appraise", "train", "export", "score", "measure"} <= spent.keys()
    assert all(seconds > 0 for seconds in spent.values())
    assert 0.5 * elapsed < sum(spent.values()) <= elapsed


def test_the_test_split_is_touched_once_at_the_end(finished):
    assert {phase for phase, _ in finished.test_accesses} == {"scoring the test set"}
    rows = sum(count for _, count in finished.test_accesses)
    assert rows == 64 * (1 + len(finished.result.front)), "the baseline and the front, once each"


def test_what_prediction_rules_out_is_told_and_neither_appraised_nor_trained(finished):
    complete = [t for t in trials_of(finished.run) if t.state is TrialState.COMPLETE]
    ruled_out = [t for t in complete if "worth" not in t.user_attrs]
    for trial in ruled_out:
        assert trial.values[0] == 0.0
        assert trial.values[1] > 0
        assert trial.constraints["budget"] > 0 or trial.constraints["outclassed"] > 0
    appraised = [t for t in complete if "worth" in t.user_attrs]
    assert appraised
    assert all(t.constraints["outclassed"] == 0.0 for t in appraised)
    assert all(t.values[0] == t.user_attrs["worth"] > 0 for t in appraised)
    assert not [t for t in trials_of(finished.run) if t.state is TrialState.RUNNING]


def test_what_is_trained_was_appraised_and_its_likeness_is_told(finished):
    worths = {t.user_attrs["worth"] for t in trials_of(finished.run) if "worth" in t.user_attrs}
    short = [o for o in journal_of(finished.run).outcomes if o.rung == "short"]
    assert {o.worth for o in short} <= worths
    entries = {entry["id"]: entry for entry in finished.result.content["points"]}
    assert all(entries[o.id]["worth"] == o.worth for o in short if o.id in entries)
    assert finished.result.content["ladder"]["appraised"] >= len({o.worth for o in short})


def test_some_policies_were_distilled_in_another_way(finished):
    distilled = {o.policy.distill for o in journal_of(finished.run).outcomes if o.rung == "short"}
    assert DistillSpec() in distilled
    assert len(distilled) > 1
    told = [t for t in journal_of(finished.run).distillations.trials if t.state is TrialState.COMPLETE]
    assert len(told) >= len(distilled) - 1
    assert all(set(t.params) == {"distill:temperature", "distill:alpha", "distill:features"} for t in told)


def test_short_and_full_training_both_happened(finished):
    rungs = {outcome.rung for outcome in journal_of(finished.run).outcomes}
    assert rungs == {"unchanged", "short", "full"}
    digests = [entry["digest"] for entry in finished.result.content["points"]]
    assert len(digests) == len(set(digests)), "one point a policy"


# -- when a search ends ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_trial(net, data, tmp_path_factory):
    """A search that stops after one policy, drawn by another sampler."""
    run = tmp_path_factory.mktemp("resume") / "run"
    sampler = optuna.samplers.RandomSampler(seed=1)
    with pytest.MonkeyPatch.context() as patch:
        short_runs_only(patch)
        result = run_search(task(trials=1), run, model=net, data=data, device=FakeDevice(SLOW_CALLS), sampler=sampler)
    return run, result


def test_a_number_of_trials_stops_early_whatever_the_sampler(one_trial):
    run, result = one_trial
    outcomes = journal_of(run).outcomes
    assert [outcome.rung for outcome in outcomes].count("short") == 1
    assert result.content["elapsed_s"] < 30
    assert result.content["front"]
    assert result.content["budget"] == Budget().model_dump(mode="json")


def test_the_best_of_a_few_trials_is_trained_to_the_end(net, data, tmp_path, monkeypatch):
    monkeypatch.setattr("autocompress.schedule.SHORT_RUNS", 100)
    monkeypatch.setattr("autocompress.controller.pace.FULL_FACTOR", 2.0)
    monkeypatch.setattr("autocompress.controller.pace.LEAST_FULL_STEPS", 100)
    monkeypatch.setattr("autocompress.controller.pace.Pace.overhead", lambda self: 0.2)
    wanted = task(trials=2)
    result = run_search(wanted, tmp_path / "run", model=net, data=data, device=FakeDevice(SLOW_CALLS))
    outcomes = journal_of(tmp_path / "run").outcomes
    assert [outcome.rung for outcome in outcomes].count("short") == 2
    assert [outcome.rung for outcome in outcomes].count("full") == 1
    assert result.content["elapsed_s"] < 40, "the limit on trials ends it, not the time"


def test_a_resumed_search_loses_nothing_and_suggests_something_else(one_trial, net, data, brisk):
    run, _ = one_trial
    before = {outcome.id: outcome for outcome in journal_of(run).outcomes}
    params = [trial.params for trial in trials_of(run) if trial.state.is_finished()]
    progress = strict(run / "front.json")["progress"]
    with pytest.raises(UsageError, match="already holds a search"):
        run_search(task(trials=2), run, model=net, data=data, device=FakeDevice(SLOW_CALLS))
    with pytest.raises(UsageError, match="another task: batch was 1, now 8"):
        run_search(task(trials=2, batch=8), run, resume=True, model=net, data=data, device=FakeDevice(SLOW_CALLS))
    baseline = (run / "models" / "baseline" / "model.onnx").read_bytes()
    with pytest.raises(UsageError, match="the content of its model has changed"):
        run_search(task(trials=2), run, resume=True, model=Net(), data=data, device=FakeDevice(SLOW_CALLS))
    with pytest.raises(UsageError, match="the content of its data has changed"):
        run_search(task(trials=2), run, resume=True, model=net, data=blobs(n=255), device=FakeDevice(SLOW_CALLS))
    assert (run / "models" / "baseline" / "model.onnx").read_bytes() == baseline
    result = run_search(task(trials=2), run, resume=True, model=net, data=data, device=FakeDevice(SLOW_CALLS))
    after = {outcome.id: outcome for outcome in journal_of(run).outcomes}
    assert len(after) > len(before)
    for id, outcome in before.items():
        again = after[id].model_copy(update={name: getattr(outcome, name) for name in ("test_score", "latency_s", "search_latency_s")})
        assert again == outcome
    trials = trials_of(run)
    assert [trial.params for trial in trials[: len(params)]] == params
    finished = [trial.params for trial in trials if trial.params]
    known = {json.dumps(p, sort_keys=True) for p in params}
    assert {json.dumps(p, sort_keys=True) for p in finished[len(params) :]} - known, "something else is suggested"
    trained = [outcome.policy.digest for outcome in after.values() if outcome.rung == "short"]
    assert len(trained) == len(set(trained)) > 1, "nothing is trained twice"
    assert result.content["progress"][: len(progress)] == progress
    assert {entry["id"] for entry in result.content["points"]} >= {id for id, outcome in before.items() if outcome.artifact}


def test_python_sets_what_the_command_line_sets(monkeypatch):
    tasks = []
    monkeypatch.setattr("autocompress.session.run_search", lambda task, run, **_: tasks.append(task))
    autocompress.search("own:net", "own:blobs", batch_size=32, learning_rate=0.2)
    assert (tasks[0].batch_size, tasks[0].learning_rate) == (32, 0.2)


def test_a_result_exports_what_the_command_line_exports(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr("autocompress.commands.deploy.export_run", lambda run, **options: asked.update(options))
    SearchResult(tmp_path, {}).export("out", pick="00001", formats=("torch",), model="m.py:f", student="s.py:f")
    assert asked == {"pick": "00001", "formats": ("torch",), "out": Path("out"), "model": "m.py:f", "student": "s.py:f", "device": None}


def test_nothing_to_resume(net, data, tmp_path):
    with pytest.raises(UsageError, match="no search to resume"):
        run_search(task(), tmp_path / "run", resume=True, model=net, data=data, device=FakeDevice())
    assert not (tmp_path / "run").exists()


def test_a_target_accuracy_stops_early(net, data, tmp_path):
    result = run_search(task(target_accuracy=0.3), tmp_path / "run", model=net, data=data, device=FakeDevice())
    assert result.best == "int8"
    assert [outcome.id for outcome in journal_of(tmp_path / "run").outcomes] == ["int8"]
    assert result.content["elapsed_s"] < 30


def test_two_policies_are_evaluated_once_each_and_the_space_is_exhausted(net, data, tmp_path, monkeypatch, brisk):
    """Through `autocompress.search`, with a function of one's own for a space."""

    def suggest(trial):
        pruned = trial.suggest_categorical("pruned", [0, 1])
        return Policy(quant=QuantSpec(bits=8), prune=PruneSpec(ratios=dict.fromkeys(groups[:1], 0.5) if pruned else {}))

    from autocompress.graph import Graph

    groups = [group.name for group in Graph.trace(net, (data.example(1),)).groups if group.prunable]
    monkeypatch.setattr("autocompress.setup.loading.open_device", lambda name: FakeDevice(SLOW_CALLS))
    diary, run = Diary(), tmp_path / "run"
    monkeypatch.setattr("autocompress.session.make_progress", lambda quiet: diary)
    result = autocompress.search(net, data, out=run, search_time="60s", suggest=suggest)
    assert any("exhausted" in message for message in diary.messages)
    known = journal_of(run).outcomes
    assert sorted(outcome.rung for outcome in known) == ["short", "unchanged"]
    assert {trial.params["pruned"] for trial in trials_of(run)} == {0, 1}
    assert len({entry["digest"] for entry in result.content["points"]}) == 2


# -- what goes wrong ------------------------------------------------------------------------------------------------------


def test_a_budget_that_nothing_meets_is_refused_in_seconds_with_the_smallest_that_works(net, data, tmp_path):
    started = time.monotonic()
    with pytest.raises(InfeasibleBudget, match=r"no policy of the space meets the budget") as caught:
        run_search(task(budget=("1us",)), tmp_path / "run", model=net, data=data, device=FakeDevice())
    assert time.monotonic() - started < 15
    assert 1e-6 < caught.value.smallest_latency_s < 1e-3
    assert "--budget" in caught.value.hint
    assert strict(tmp_path / "run" / "front.json")["best"] is None


def test_a_policy_that_the_device_cannot_run_is_a_failure_and_the_search_goes_on(net, data, tmp_path, brisk):
    run, device = tmp_path / "run", BrokenDevice(["00000"])
    result = run_search(task(trials=2), run, model=net, data=data, device=device)
    outcomes = {outcome.id: outcome for outcome in journal_of(run).outcomes}
    assert (outcomes["00000"].failure.stage, outcomes["00000"].failure.reason) == ("measure", "the device is on fire")
    assert outcomes["00001"].failure is None
    assert result.content["failures"] == [{"id": "00000", "stage": "measure", "reason": "the device is on fire"}]
    assert "00000" not in {entry["id"] for entry in result.content["points"]}


def test_training_that_diverges_never_reaches_the_front(net, data, tmp_path, brisk):
    run, diverged = tmp_path / "run", None
    try:
        run_search(task(trials=4, learning_rate=1e9), run, model=net, data=data, device=FakeDevice())
    except TooManyFailures as error:
        diverged = error
    content = strict(run / "front.json")
    assert content["failures"]
    for failure in content["failures"]:
        assert failure["stage"] in ("train", "export", "check")
        assert "diverged" in failure["reason"] or "finite" in failure["reason"]
    failed = {failure["id"] for failure in content["failures"]}
    assert not failed & {entry["id"] for entry in content["points"]}
    assert not any(entry["steps"] for entry in content["points"]), "on the front or not: calibrated only"
    assert diverged is None or "diverged" in diverged.message
