"""What a student has learned outlives signals, failing disks and devices, and is gone on from."""

from __future__ import annotations

import copy
import errno
import itertools
import time
from contextlib import suppress
from unittest.mock import Mock

import pytest
import torch
from running import ready
from safetensors.torch import load_file, save_file
from tasks import SLOW_CALLS

from autocompress.compress.student import build_student
from autocompress.errors import DeviceUnavailable, PolicyFailure
from autocompress.policy import Policy, PruneSpec, QuantSpec
from autocompress.records import Attempt
from autocompress.testing.devices import FakeDevice
from autocompress.trial.objective import evaluate_policy
from autocompress.trial.starting import FLOAT_WEIGHTS, INTERRUPTED, forget_interrupted


def test_training_that_is_interrupted_goes_on_from_there(net, data, tmp_path, monkeypatch):
    """An hour in which a policy was trained to the end is not to be lost to Ctrl-C."""
    setting, policy, progress = ready(net, data, tmp_path / "run"), Policy(prune=PruneSpec(ratios={"b.conv1": 0.5})), []

    def stop(share):
        progress.append(share)
        if len(progress) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr("autocompress.trial.starting.reconstruct", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        evaluate_policy(setting, Attempt(id="00000", policy=policy, rung="short"), seconds=60.0, tick=stop)
    (left,) = setting.models.glob(f"{INTERRUPTED}*")
    learned, begun = load_file(left), []
    assert not torch.equal(learned["b.conv1.weight"], build_student(setting.graphs[None], policy).b.conv1.weight)

    def train(student, *_, **__):
        begun.append(copy.deepcopy(student.state_dict()))
        return student

    monkeypatch.setattr("autocompress.trial.objective.train_quantized", train)
    for id in ("00001", "00002"):
        assert evaluate_policy(setting, Attempt(id=id, policy=policy, rung="short"), seconds=1.0).failure is None
    assert all(torch.equal(value, learned[name]) for name, value in begun[0].items())
    assert not left.exists()
    assert not torch.equal(begun[1]["b.conv1.weight"], learned["b.conv1.weight"]), "what is finished is no longer interrupted"


def test_training_through_bits_that_is_interrupted_goes_on_from_there(net, data, tmp_path):
    """All of the unchanged network's training is through its bits."""
    setting, policy, progress = ready(net, data, tmp_path / "run"), Policy(quant=QuantSpec(bits=3)), []

    def stop(share):
        progress.append(share)
        if len(progress) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_policy(setting, Attempt(id="00000-full", policy=policy, rung="full"), seconds=60.0, tick=stop)
    (left,) = setting.models.glob(f"{INTERRUPTED}*")
    learned, teacher = load_file(left), setting.graphs[None].module.state_dict()
    assert learned.keys() == teacher.keys()
    assert not torch.equal(learned["b.conv1.weight"], teacher["b.conv1.weight"])


def test_what_was_trained_is_kept_until_it_is_measured(net, data, tmp_path, monkeypatch):
    """The device may be gone by then."""
    device, policy = FakeDevice(SLOW_CALLS), Policy(prune=PruneSpec(ratios={"b.conv1": 0.5}))
    setting = ready(net, data, tmp_path / "run", device)
    device.failures = {device.calls: DeviceUnavailable("the agent does not answer")}
    with pytest.raises(DeviceUnavailable):
        evaluate_policy(setting, Attempt(id="00000", policy=policy, rung="full"), seconds=1.0)
    (left,) = setting.models.glob(f"{INTERRUPTED}*")
    trained, begun = load_file(left), []
    monkeypatch.setattr(
        "autocompress.trial.objective.train_quantized", lambda student, *_, **__: begun.append(student.state_dict()) or student
    )
    assert evaluate_policy(setting, Attempt(id="00000", policy=policy, rung="full"), seconds=1.0).failure is None
    assert all(torch.equal(value, trained[name]) for name, value in begun[0].items())
    assert not [*setting.models.glob(f"{INTERRUPTED}*")]


def test_a_student_that_could_not_be_measured_keeps_what_it_has_learned(net, data, tmp_path, monkeypatch):
    """The runtime may have been killed for want of memory, or hung: twenty minutes of training are not the price of that."""
    device, policy = FakeDevice(SLOW_CALLS), Policy(prune=PruneSpec(ratios={"b.conv1": 0.5}))
    setting, attempt = ready(net, data, tmp_path / "run", device), Attempt(id="00000", policy=policy, rung="full")
    device.failures = {device.calls: PolicyFailure("the runtime did not end")}
    assert evaluate_policy(setting, attempt, seconds=1.0).failure.stage == "measure"
    forget_interrupted(setting, [policy])
    (left,) = setting.models.glob(f"{INTERRUPTED}*")
    trained, begun = load_file(left), []
    monkeypatch.setattr(
        "autocompress.trial.objective.train_quantized", lambda student, *_, **__: begun.append(student.state_dict()) or student
    )
    assert evaluate_policy(setting, attempt, seconds=1.0).failure is None
    assert all(torch.equal(value, trained[name]) for name, value in begun[0].items())
    left.touch()
    forget_interrupted(setting)
    assert not left.exists()


def test_what_the_file_system_ends_is_kept_and_what_fails_by_itself_is_not(net, data, tmp_path, monkeypatch):
    setting, policy = ready(net, data, tmp_path / "run"), Policy(prune=PruneSpec(ratios={"b.conv1": 0.5}))
    for error, kept in ((OSError(errno.ESTALE, "stale file handle"), 1), (ValueError("bins must increase"), 0)):
        monkeypatch.setattr("autocompress.trial.objective.train_quantized", Mock(side_effect=error))
        with suppress(OSError):
            evaluate_policy(setting, Attempt(id="00000", policy=policy, rung="short"), seconds=1.0)
        assert len([*setting.models.glob(f"{INTERRUPTED}*")]) == kept


def test_training_is_kept_every_few_minutes(net, data, tmp_path, monkeypatch):
    """A machine that loses its power tells nobody."""
    setting, policy, kept = ready(net, data, tmp_path / "run"), Policy(prune=PruneSpec(ratios={"b.conv1": 0.5})), []
    monkeypatch.setattr("autocompress.compress.train.KEPT_EVERY_S", 0.3)
    monkeypatch.setattr("autocompress.trial.objective.keep_interrupted", lambda *_: kept.append(time.monotonic()))
    assert evaluate_policy(setting, Attempt(id="00000", policy=policy, rung="short"), seconds=2.0).failure is None
    assert len(kept) >= 3
    assert all(after - before >= 0.3 for before, after in itertools.pairwise(kept[:-1]))


def test_what_is_kept_of_training_through_bits_is_what_was_learned(net, data, tmp_path, monkeypatch):
    setting, policy, kept = ready(net, data, tmp_path / "run"), Policy(quant=QuantSpec(bits=3)), []
    monkeypatch.setattr("autocompress.compress.train.KEPT_EVERY_S", 0.0)
    monkeypatch.setattr(
        "autocompress.trial.objective.keep_interrupted", lambda _, student, __: kept.append(copy.deepcopy(student.conv.weight))
    )
    assert evaluate_policy(setting, Attempt(id="00000-full", policy=policy, rung="full"), seconds=1.0).failure is None
    assert not any(torch.equal(before, after) for before, after in itertools.pairwise(kept[:3]))


def test_weights_of_another_student_cost_training_and_not_the_policy(net, data, tmp_path, monkeypatch):
    setting, narrow = ready(net, data, tmp_path / "run"), Policy(prune=PruneSpec(ratios={"b.conv1": 0.5}))
    (setting.models / "00000").mkdir()
    others = {name: value + 1 for name, value in load_file(setting.models / "baseline" / "student.safetensors").items()}
    save_file(others, setting.models / "00000" / FLOAT_WEIGHTS)
    begun = []
    monkeypatch.setattr(
        "autocompress.trial.starting.reconstruct", lambda student, *_, **__: begun.append(copy.deepcopy(student.state_dict()))
    )
    outcome = evaluate_policy(setting, Attempt(id="00000-full", policy=narrow, rung="full"), seconds=0.5, continues="00000")
    assert outcome.failure is None
    built = build_student(setting.graphs[None], narrow).state_dict()
    assert begun and torch.equal(begun[0]["conv.weight"], built["conv.weight"])
