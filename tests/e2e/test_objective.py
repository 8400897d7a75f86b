"""One policy, from recipe to measured file, or to a failure."""

from __future__ import annotations

import copy
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch
from running import INT8, TASK, ready
from safetensors.torch import load_file
from tasks import CLASSES, SLOW_CALLS, Net
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as old_weight_norm

from autocompress.budget import Budget
from autocompress.commands.deploy import recreate
from autocompress.compress.norms import FEW_STEPS
from autocompress.compress.optimizer import Optimizer
from autocompress.compress.student import build_student
from autocompress.data import Data, Split, sampled
from autocompress.devices.local import LocalCpu
from autocompress.devices.runtime import Runtime
from autocompress.errors import DeviceUnavailable, PolicyFailure
from autocompress.export import is_intact
from autocompress.policy import LowRankSpec, Policy, PruneSpec, QuantSpec, StudentSpec
from autocompress.records import FEWEST_FOR_TAIL, Attempt, Prediction
from autocompress.search_space import with_exact_int8
from autocompress.setup.loading import load
from autocompress.setup.preflight import LOSS_EXAMPLES
from autocompress.system.failures import FAILURES
from autocompress.testing.devices import FakeDevice
from autocompress.trial.beside_baseline import COLUMNS, SAMPLES, SECONDS_EACH, measure_beside_baseline, measure_within
from autocompress.trial.objective import PROBED_STEPS, evaluate_policy, training_step_seconds
from autocompress.trial.preparation import prepare, score_baseline
from autocompress.trial.starting import FLOAT_WEIGHTS


def realised(setting):
    return evaluate_policy(setting, Attempt(id="00000", policy=INT8, rung="short"), seconds=0.0)


@pytest.mark.parametrize("error", [ValueError("no kernel"), KeyError("axes"), TypeError("none")])
def test_whatever_one_policy_raises_is_its_failure(net, data, tmp_path, error):
    outcome = realised(ready(net, data, tmp_path / "run", FakeDevice(SLOW_CALLS, failures={1: error})))
    assert (outcome.failure.stage, outcome.failure.reason.split(":")[0]) == ("measure", type(error).__name__)
    told = (tmp_path / "run" / FAILURES).read_text()
    assert "Traceback" in told and type(error).__name__ in told, "it may be a bug of ours all the same"


def test_a_score_of_ones_own_that_raises_is_a_failure_too(net, data, tmp_path):
    def score(outputs, targets):
        raise ValueError("bins must increase")

    own = replace(data, loss=nn.functional.cross_entropy, score=score)
    outcome = realised(ready(net, own, tmp_path / "run"))
    assert outcome.failure.reason == "the data's score raised ValueError: bins must increase"


def test_a_student_of_a_task_with_its_own_loss_is_trained(net, data, tmp_path):
    own = replace(data, loss=nn.functional.cross_entropy, score=lambda outputs, targets: -1.0)
    policy = Policy(student=StudentSpec(width=0.5), quant=QuantSpec(bits=8))
    setting = ready(net, own, tmp_path / "run")
    outcome = evaluate_policy(setting, Attempt(id="00000", policy=policy, rung="short"), seconds=2.0)
    assert outcome.failure is None
    assert outcome.val_score.value == -1.0


def test_a_student_of_low_rank_is_trained_exported_and_made_again(net, data, tmp_path):
    setting = ready(net, data, tmp_path / "run")
    graph = setting.graphs[None]
    kept = {layer.name: 0.6 for layer in graph.layers if layer.factorable}
    policy = Policy(prune=PruneSpec(ratios={"a.conv1": 0.25}), low_rank=LowRankSpec(kept=kept), quant=QuantSpec(bits=8, reduced_range=True))
    assert "a.conv1" in graph.ranks(policy)
    outcome = evaluate_policy(setting, Attempt(id="00000", policy=policy, rung="short"), seconds=2.0)
    assert outcome.failure is None
    assert outcome.val_score.value >= 0.9
    again = recreate(setting.models / "00000", net)
    first, second = again.get_submodule("a.conv1")
    assert len(first.weight) == second.weight.shape[1] == graph.ranks(policy)["a.conv1"]
    with torch.no_grad():
        decided = again(data.prepare(data.val.inputs)).argmax(1)
    assert float((decided == data.val.targets).float().mean()) == pytest.approx(outcome.val_score.value, abs=0.02)


def test_what_a_step_of_training_takes_is_tried_on_a_copy(net, data, tmp_path, monkeypatch):
    setting, steps = ready(net, data, tmp_path / "run"), []
    before = copy.deepcopy(setting.graphs[None].module.state_dict())
    monkeypatch.setattr("autocompress.compress.optimizer.Optimizer.step", lambda self, rates: steps.append(rates) or time.sleep(0.5))
    assert 0.5 <= training_step_seconds(setting, time.monotonic() + 60.0) < 2.0
    assert len(steps) == PROBED_STEPS
    assert training_step_seconds(setting, time.monotonic() + 0.4) >= 0.5
    assert len(steps) == PROBED_STEPS + 1, "a slow one is tried once"
    assert all(torch.equal(before[key], value) for key, value in setting.graphs[None].module.state_dict().items())

    begun = []

    def broken(outputs, targets):
        if begun:  # it is tried before that
            raise ValueError("bins must increase")
        return outputs.sum()

    own = replace(data, loss=broken, score=lambda outputs, targets: 0.0)
    other = ready(net, own, tmp_path / "other")
    begun.append(True)
    assert training_step_seconds(other, time.monotonic() + 60.0) == 0.0


@pytest.mark.parametrize("bits", [3, 8])
def test_the_unchanged_network_is_calibrated_first_and_trained_through_its_bits_to_the_end(net, data, tmp_path, bits):
    setting = ready(net, data, tmp_path / "run")
    first = Attempt(id="00000", policy=Policy(quant=QuantSpec(bits=bits)), rung="short")
    short = evaluate_policy(setting, first, seconds=60.0)
    full = evaluate_policy(setting, short.again("00000-full", "full"), seconds=2.0, continues="00000")
    assert short.failure is None and full.failure is None
    assert short.training_s < 30.0 < full.training_s + 30.0 and full.training_s > 1.5
    files = [(setting.models / id / "student.safetensors").read_bytes() for id in ("00000", "00000-full")]
    assert files[0] != files[1]


def test_a_student_is_reconstructed_once_and_only_where_something_was_cut(net, data, tmp_path, monkeypatch):
    reconstructed = []
    monkeypatch.setattr(
        "autocompress.trial.starting.reconstruct", lambda student, reference, policy, until: reconstructed.append(len(reference.inputs))
    )
    setting, narrow = ready(net, data, tmp_path / "run"), Policy(student=StudentSpec(width=0.5))

    def made(policy, id, rung="short", continues=None):
        assert evaluate_policy(setting, Attempt(id=id, policy=policy, rung=rung), seconds=0.5, continues=continues).failure is None
        return len(reconstructed)

    assert made(INT8, "int8") == 0, "the teacher itself"
    assert made(narrow, "00000") == 1
    assert reconstructed == [min(setting.calibration_inputs, len(data.train))]
    assert made(narrow, "00000-full", "full", "00000") == 1, "what it has learnt is kept"
    assert made(narrow, "00001-full", "full", "00001") == 2, "the checkpoint is lost"


def test_training_has_its_time_after_the_reconstruction_and_both_end_at_the_latest(net, data, tmp_path, monkeypatch):
    untils = []

    def slow(student, reference, policy, until):
        untils.append(until)
        time.sleep(1.0)

    monkeypatch.setattr("autocompress.trial.starting.reconstruct", slow)
    setting, narrow = ready(net, data, tmp_path / "run"), Policy(student=StudentSpec(width=0.5))
    outcome = evaluate_policy(setting, Attempt(id="00000", policy=narrow, rung="short"), seconds=1.0)
    assert outcome.failure is None
    assert 0.8 < outcome.training_s < 1.9, "the reconstruction takes nothing of it"
    assert outcome.seconds > outcome.training_s + outcome.finishing_s + 0.9
    latest = time.monotonic() + 1.5
    outcome = evaluate_policy(setting, Attempt(id="00001", policy=narrow, rung="short"), seconds=60.0, latest=latest)
    assert outcome.training_s < 2.0
    assert untils[1] == latest


def test_a_student_that_cannot_be_reconstructed_is_trained_as_it_is(net, data, tmp_path, monkeypatch):
    begun = []

    def broken(student, *_, **__):
        nn.init.constant_(student.head.weight, float("nan"))
        raise torch.linalg.LinAlgError("no solution")

    def trained(student, *_, **__):
        begun.append(student.head.weight.clone())
        raise PolicyFailure("enough")

    monkeypatch.setattr("autocompress.trial.starting.reconstruct", broken)
    monkeypatch.setattr("autocompress.trial.objective.train_quantized", trained)
    narrow = Policy(student=StudentSpec(width=0.5))
    setting = ready(net, data, tmp_path / "run")
    evaluate_policy(setting, Attempt(id="00000", policy=narrow, rung="short"), seconds=0.5)
    assert torch.equal(begun[0], build_student(setting.graph_of(narrow), narrow).head.weight)


def test_the_unchanged_network_in_float32_has_nothing_to_learn(net, data, tmp_path):
    setting = ready(net, data, tmp_path / "run")
    outcome = evaluate_policy(setting, Attempt(id="00000-full", policy=Policy(), rung="full"), seconds=60.0)
    assert outcome.failure is None
    assert outcome.training_s < 30.0


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), DeviceUnavailable("gone")])
def test_what_is_about_the_machine_ends_the_search(net, data, tmp_path, error):
    setting = ready(net, data, tmp_path / "run", FakeDevice(SLOW_CALLS, failures={1: error}))
    with pytest.raises(type(error)):
        realised(setting)


def test_a_table_with_sparse_gradients_is_trained(tmp_path):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.a, self.b = nn.Embedding(50, 16, sparse=True), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x):
            return self.b(torch.relu(self.a(self.table(x).mean(1))))

    words = Split(torch.randint(0, 50, (64, 5), generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3)
    setting = ready(Words().eval(), Data(words, words, words, classes=3), tmp_path / "run")
    policy = Policy(prune=PruneSpec(ratios={"a": 0.5}))
    assert evaluate_policy(setting, Attempt(id="00000", policy=policy, rung="short"), seconds=1.0).failure is None


class Changing(FakeDevice):
    """As fast as `speeds` says, call after call; the last one stays."""

    def __init__(self, speeds):
        super().__init__()
        self.speeds = list(speeds)

    def measure(self, paths, *, seconds_each=1.0):
        speed = self.speeds.pop(0) if len(self.speeds) > 1 else self.speeds[0]
        self.costs = SLOW_CALLS.model_copy(update={key: value * speed for key, value in SLOW_CALLS.model_dump().items()})
        return super().measure(paths, seconds_each=seconds_each)


@pytest.mark.parametrize(
    ("speeds", "noisy"),
    [([1.0], False), ([1.3, 1.0], False), ([1.0, 1.3, 1.0], False), ([1.0, 1.3, 1.7, 2.2, 3.0], True)],
    ids=["steady", "odd start", "odd once", "slower and slower"],
)
def test_a_measurement_is_noisy_where_the_original_beside_it_does_not_settle(net, data, tmp_path, monkeypatch, speeds, noisy):
    monkeypatch.setattr("autocompress.trial.beside_baseline.DRIFT_PAUSE_S", 0.0)
    latency = realised(ready(net, data, tmp_path / "run", Changing(speeds))).latency_s
    assert latency.noisy is noisy
    assert ("baseline beside it" in latency.noise_reason) is noisy


def test_every_sample_is_kept_beside_the_file_that_it_is_of(net, data, tmp_path):
    setting = ready(net, data, tmp_path / "run", FakeDevice(SLOW_CALLS, noise=0.01))
    latency = realised(setting).latency_s
    path = setting.models / "00000" / "model.onnx"
    (_, again) = measure_beside_baseline(setting, [path])
    table = pd.read_csv(path.parent / SAMPLES)
    assert tuple(table.columns) == COLUMNS
    own = table[table.file == path.name]
    assert len(own) == latency.n + again.n
    assert own.seconds[: latency.n].median() == pytest.approx(latency.median, rel=1e-3)
    assert own.seconds[latency.n :].median() == pytest.approx(again.median, rel=1e-3)
    original = table[table.file == "original"].seconds[: latency.n]
    assert original.median() == pytest.approx(latency.original_s, rel=1e-3)
    assert own["round"].max() == latency.n / own.groupby("round").size().iloc[0] * 2 - 1
    assert latency.samples == (), "they are not carried any further"
    assert is_intact(path.parent)


class Tied(Net):
    """Two convolutions with one weight."""

    def __init__(self):
        super().__init__()
        self.a.conv2.weight = self.a.conv1.weight


def test_a_network_with_tied_weights_is_compressed(data, tmp_path):
    torch.manual_seed(0)
    setting = ready(Tied().eval(), data, tmp_path / "run")
    policy = with_exact_int8(Policy(prune=PruneSpec(ratios={"b.conv1": 0.5}), quant=QuantSpec(bits=8)), setting.device.profile)
    outcome = evaluate_policy(setting, Attempt(id="00000", policy=policy, rung="short"), seconds=1.0)
    assert outcome.failure is None
    weights = load_file(setting.models / "00000" / FLOAT_WEIGHTS)
    assert torch.equal(weights["a.conv1.weight"], weights["a.conv2.weight"])
    further = evaluate_policy(setting, Attempt(id="00001", policy=policy, rung="full"), seconds=0.0, continues="00000")
    assert further.failure is None


def test_files_are_compared_as_rounded_where_the_device_computes_in_bf16(net, data, tmp_path):
    runtime = Runtime("openvino", precision="bf16")
    if not (runtime.is_here and runtime.can_compute):
        pytest.skip("no OpenVINO, or no instructions for bf16")
    setting = ready(net, data, tmp_path / "run", LocalCpu(runtime))
    score_baseline(setting, data.val)
    attempt = Attempt(id="00000", policy=Policy(prune=PruneSpec(ratios={"b.conv1": 0.5})), rung="short")
    outcome = evaluate_policy(setting, attempt, seconds=1.0)
    assert outcome.failure is None, "float32 outputs would have to agree to 1e-4"
    assert outcome.parity.difference > 1e-4
    assert outcome.latency_s.environment["precision"] == "bf16"


def test_a_network_whose_norms_follow_the_batch_is_compressed(data, tmp_path):
    own = Net().eval()
    for name, module in list(own.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            own.set_submodule(name, nn.BatchNorm2d(module.num_features, track_running_stats=False).eval())
    policy = Policy(prune=PruneSpec(ratios={"b.conv1": 0.5}))
    task = TASK.model_copy(update={"batch": 24})
    setting = prepare(task, tmp_path / "run", load(task, model=own, data=data, device=FakeDevice(SLOW_CALLS)))
    outcome = evaluate_policy(setting, Attempt(id="00000", policy=policy, rung="short"), seconds=1.0)
    assert outcome.failure is None, "the file's batches are the student's when both are compared"


@pytest.mark.parametrize("way", [parametrizations.spectral_norm, parametrizations.weight_norm, old_weight_norm])
def test_a_network_whose_weights_are_computed_is_compressed(data, tmp_path, way):
    torch.manual_seed(0)
    own = Net()
    way(own.b.conv1), way(own.head)
    own(data.example(4))
    before = copy.deepcopy(own.state_dict())
    setting = ready(own, data, tmp_path / "run")
    policy = with_exact_int8(Policy(prune=PruneSpec(ratios={"b.conv1": 0.5}), quant=QuantSpec(bits=8)), FakeDevice().profile)
    outcome = evaluate_policy(setting, Attempt(id="00000", policy=policy, rung="short"), seconds=1.0)
    assert outcome.failure is None
    assert own.training and all(torch.equal(before[key], value) for key, value in own.state_dict().items())
    assert own.b.conv1.weight.shape == (16, 8, 3, 3), "computed as before"


def test_the_steps_of_training_are_those_that_were_made(net, data, tmp_path, monkeypatch):
    """More of them than after which norms need no more of the time, so that progress would seem to fall."""
    setting, made = ready(net, data, tmp_path / "run"), []
    step = Optimizer.step
    monkeypatch.setattr(Optimizer, "step", lambda self, rates: made.append(rates) or step(self, rates))
    policy = Policy(prune=PruneSpec(ratios={"b.conv1": 0.5}), quant=QuantSpec(bits=8, reduced_range=True))
    outcome = evaluate_policy(setting, Attempt(id="00000", policy=policy, rung="short"), seconds=6.0)
    assert outcome.steps == len(made) > FEW_STEPS + 10


def test_training_that_begins_again_counts_its_steps_anew_and_a_failure_leaves_no_files(net, data, tmp_path, monkeypatch):
    setting, policy = ready(net, data, tmp_path / "run"), Policy(prune=PruneSpec(ratios={"b.conv1": 0.5}))

    def train(student, *_, tick, **__):
        for progress in (0.1, 0.5, 0.9, 0.2, 0.6):
            tick(progress)
        return student

    monkeypatch.setattr("autocompress.trial.objective.train_quantized", train)
    assert evaluate_policy(setting, Attempt(id="00000", policy=policy, rung="short"), seconds=1.0).steps == 2
    assert (setting.models / "00000").is_dir()
    setting.device.failures = {setting.device.calls: ValueError("no kernel")}
    assert evaluate_policy(setting, Attempt(id="00001", policy=policy, rung="short"), seconds=1.0).failure.stage == "measure"
    assert not (setting.models / "00001").exists()


def test_how_gently_a_student_is_trained_follows_from_its_distance_to_the_teacher(net, data, tmp_path, monkeypatch):
    plans = []
    setting = ready(net, data, tmp_path / "run")
    group = next(group for group in setting.graphs[None].groups if group.prunable)
    monkeypatch.setattr(
        "autocompress.trial.objective.train_quantized", lambda student, quant, data, plan, **_: plans.append(plan) or student
    )
    monkeypatch.setattr(type(setting.teacher), "distance", lambda self, student, most: 0.03)
    policy = Policy(prune=PruneSpec(ratios={group.name: 0.5}))
    evaluate_policy(setting, Attempt(id="00000", policy=policy, rung="short"), seconds=5.0)
    assert [plan.to_learn for plan in plans] == [0.03]


class Wavering(FakeDevice):
    """Whose intervals are wide but where it measures for long."""

    def measure(self, paths, *, seconds_each=1.0):
        self.asked = [*getattr(self, "asked", []), seconds_each]
        exact = super().measure(paths, seconds_each=seconds_each)
        return exact if seconds_each > SECONDS_EACH else [m.model_copy(update={"high": 1.5 * m.median}) for m in exact]


def test_a_file_that_only_noise_puts_over_the_budget_is_measured_for_longer(net, data, tmp_path, monkeypatch):
    monkeypatch.setattr("autocompress.trial.beside_baseline.MOST_DRIFT", 9.0)
    setting = ready(net, data, tmp_path / "run", Wavering(SLOW_CALLS))
    exact = FakeDevice(SLOW_CALLS).measure([setting.baseline.path])[0].median
    for limit, times in ((1.001, 2), (3.0, 1), (0.1, 1)):
        setting.device.asked = []
        latency = measure_within(Budget(latency_s=limit * exact), setting, setting.baseline.path, 9)
        assert len(setting.device.asked) == times
        assert (latency.high == pytest.approx(exact)) is (times == 2)
    setting.device.asked = []
    measure_within(Budget(p95_s=1.0), setting, setting.baseline.path, 9)
    assert setting.device.asked == [max(SECONDS_EACH, FEWEST_FOR_TAIL * setting.recent_baseline.median)]


@pytest.mark.parametrize(("times", "noisy"), [(0.01, True), (0.2, False), (5.0, False), (1000.0, True)])
def test_a_latency_in_other_units_than_was_predicted_is_mistrusted(net, data, tmp_path, times, noisy):
    setting = ready(net, data, tmp_path / "run")
    usual = realised(setting).latency_s.median
    predicted = Prediction(value=usual / times, low=usual / times, high=usual / times)
    latency = evaluate_policy(setting, Attempt(id="00000", policy=INT8, rung="short", predicted_latency_s=predicted), seconds=0.0).latency_s
    assert latency.noisy is noisy
    assert ("predicted to take" in latency.noise_reason) is noisy


@pytest.mark.timeout(60, method="thread")  # the other method takes the alarm for itself
@pytest.mark.parametrize("stage", ["train", "check"])
def test_a_policy_whose_loss_or_score_never_returns_fails_and_the_search_goes_on(net, data, tmp_path, monkeypatch, stage):
    monkeypatch.setattr("autocompress.trial.objective.LATE_S", 0.5)
    own = replace(data, loss=F.cross_entropy, score=lambda outputs, targets: 0.5, classes=None)
    setting = ready(net, own, tmp_path / "run")
    endless = replace(own, **{"train": {"loss": lambda *_: time.sleep(50)}, "check": {"score": lambda *_: time.sleep(50)}}[stage])
    setting = replace(setting, data=endless)
    policy, started = Policy(prune=PruneSpec(ratios={"b.conv1": 0.5})), time.monotonic()
    failure = evaluate_policy(setting, Attempt(id="00000", policy=policy, rung="short"), seconds=0.5).failure
    assert failure.stage == stage
    assert "must end within" in failure.reason
    assert time.monotonic() - started < 20.0
    time.sleep(0.6)  # and the alarm is off


def test_targets_that_are_not_finite_are_named(net, data, tmp_path):
    targets = torch.randn(len(data.train), CLASSES)
    tried = sampled(len(targets), LOSS_EXAMPLES).tolist()  # before the search begins
    targets[next(row for row in range(len(targets)) if row not in tried), 0] = torch.nan
    parts = {name: Split(getattr(data, name).inputs, targets[: len(getattr(data, name))]) for name in ("val", "test")}
    own = replace(data, classes=None, train=Split(data.train.inputs, targets), **parts, loss=F.mse_loss, score=lambda outputs, targets: 0.0)
    narrow = Policy(prune=PruneSpec(ratios={"b.conv1": 0.5}))
    outcome = evaluate_policy(ready(net, own, tmp_path / "run"), Attempt(id="00000", policy=narrow, rung="short"), seconds=5.0)
    assert outcome.failure.stage == "train" and "some targets are NaN" in outcome.failure.reason
