"""A search that begins with what another one has learned, under another budget and for another device."""

from __future__ import annotations

import json
import shutil

import onnx
import pytest
from pydantic import ValidationError
from running import journal_of, short_runs_only
from tasks import SLOW_CALLS, Diary, Net, blobs

from autocompress.cli import main
from autocompress.errors import InfeasibleBudget, PolicyFailure, UsageError
from autocompress.policy import Policy
from autocompress.records import Outcome
from autocompress.session import run_search
from autocompress.task import Task
from autocompress.testing.devices import Costs, FakeDevice

OTHER = Costs(call=5e-6, node=4e-6, mac=1e-9, mac_int8=0.8e-9)


def task(**changes) -> Task:
    return Task(model="own:net", data="own:blobs", search_time="60s").model_copy(update=changes)


def appraised(run) -> int:
    return json.loads((run / "front.json").read_text(encoding="utf-8"))["ladder"]["appraised"]


@pytest.fixture(scope="module")
def first(net, data, tmp_path_factory):
    """The run folder of a search of two policies, without a budget."""
    run = tmp_path_factory.mktemp("first") / "run"
    with pytest.MonkeyPatch.context() as patch:
        short_runs_only(patch)
        run_search(task(trials=2), run, model=net, data=data, device=FakeDevice(SLOW_CALLS))
    return run


def test_another_device_and_budget_train_only_what_the_new_front_lacks(first, net, data, tmp_path, monkeypatch):
    short_runs_only(monkeypatch)
    before = (first / "study.db").read_bytes()
    scored, device, diary = [], FakeDevice(OTHER), Diary()
    monkeypatch.setattr(device, "environment", lambda: {"processor": "another"})
    monkeypatch.setattr("autocompress.trial.objective.check_artifact", _counting(scored))
    wanted = task(trials=1, budget=("3x",), from_run=str(first))
    result = run_search(wanted, tmp_path / "run", model=net, data=data, device=device, progress=diary)
    known, found = ({o.id: o for o in journal_of(run).outcomes} for run in (first, tmp_path / "run"))
    taken = [id for id in found if id in known and found[id].rung == "short" and found[id].policy == known[id].policy]
    assert sorted(taken) == sorted(id for id in known if known[id].rung == "short"), "all may be within the budget"
    assert any(message.startswith(f"{len(taken)} networks and ") for message in diary.messages)
    for id in taken:
        path = tmp_path / "run" / found[id].artifact
        assert path.read_bytes() == (first / known[id].artifact).read_bytes()
        assert found[id].latency_s.median == pytest.approx(device.seconds_of_model(onnx.load(path)), rel=0.02)
        assert found[id].val_score == known[id].val_score, "the same file, run by the same runtime"
    assert set(taken) <= set(scored), "by the device that is new"
    assert all(found[id].parity.n == HERE for id in taken), "how far it agrees there"
    trained = [o.policy for o in found.values() if o.rung == "short" and o.id not in taken]
    assert len(trained) <= 1, "`--trials` is about what this search trains"
    assert not {policy.digest for policy in trained} & {o.policy.digest for o in known.values()}
    assert result.content["ladder"]["appraised"] >= appraised(first) > 0
    assert (first / "study.db").read_bytes() == before, "a search only reads what another has learned"


@pytest.mark.parametrize("id", ["../../elsewhere", "/elsewhere", ""])
def test_an_id_is_no_path(id):
    """It names a folder that is written, and one that is removed."""
    with pytest.raises(ValidationError):
        Outcome(id=id, policy=Policy(), rung="short")


def test_nothing_but_the_files_of_a_bundle_is_taken_over_and_only_from_within_the_run(first, net, data, tmp_path, monkeypatch):
    for phase in ("appraise", "short_rung", "full_rung"):
        monkeypatch.setattr(f"autocompress.controller.rungs.Rungs.{phase}", lambda self, *_: None)
    sent = tmp_path / "sent"
    shutil.copytree(first, sent)
    (sent / "models" / "00000" / "payload.py").write_text("")
    shutil.move(sent / "models" / "00001", tmp_path / "00001")
    (sent / "models" / "00001").symlink_to(tmp_path / "00001")
    diary = Diary()
    run_search(task(from_run=str(sent)), tmp_path / "run", model=net, data=data, device=FakeDevice(SLOW_CALLS), progress=diary)
    assert (tmp_path / "run" / "models" / "00000" / "model.onnx").is_file()
    assert not list((tmp_path / "run").rglob("payload.py"))
    assert not (tmp_path / "run" / "models" / "00001").exists()
    assert any("00001" in message and "left out" in message for message in diary.messages)


HERE = 12345
"""Inputs that files were compared on by the device that is new."""


def _counting(scored):
    from autocompress.trial.objective import check_artifact

    def check(setting, student, path, policy):
        scored.append(path.parent.name)
        outputs, parity = check_artifact(setting, student, path, policy)
        return outputs, parity.model_copy(update={"n": HERE})

    return check


def test_on_the_same_device_nothing_is_scored_again_and_a_resumed_search_takes_nothing_over_twice(first, net, data, tmp_path, monkeypatch):
    short_runs_only(monkeypatch)
    monkeypatch.setattr("autocompress.trial.objective.check_artifact", lambda *_: pytest.fail("known"))
    monkeypatch.setattr("autocompress.controller.rungs.Rungs.appraise", lambda self, pool: None)
    monkeypatch.setattr("autocompress.controller.rungs.Rungs.short_rung", lambda self, pool: None)
    wanted, run = task(from_run=str(first)), tmp_path / "run"
    run_search(wanted, run, model=net, data=data, device=FakeDevice(SLOW_CALLS))
    known, found = ({o.id: o for o in journal_of(folder).outcomes if o.rung == "short"} for folder in (first, run))
    assert found.keys() == known.keys()
    assert appraised(run) == appraised(first)
    monkeypatch.setattr("autocompress.controller.run.take_over", lambda *_: pytest.fail("all of it is known"))
    run_search(wanted, run, resume=True, model=net, data=data, device=FakeDevice(SLOW_CALLS))


def test_what_is_of_something_else_is_refused_and_leaves_nothing(first, net, data, tmp_path):
    run = tmp_path / "run"
    cases = [
        (task(from_run=str(tmp_path / "absent")), net, data, "there is no search to learn from"),
        (task(from_run=str(first), batch=8), net, data, "batch was 1, now 8"),
        (task(from_run=str(first)), Net(), data, "the content of its model has changed"),
        (task(from_run=str(first)), net, blobs(n=255), "the content of its data has changed"),
    ]
    for wanted, model, examples, reason in cases:
        with pytest.raises(UsageError, match=reason) as caught:
            run_search(wanted, run, model=model, data=examples, device=FakeDevice(SLOW_CALLS))
        assert "--from" in caught.value.hint
        assert not run.exists()


def test_the_command_line_takes_the_task_of_the_other_run(first, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("autocompress.session.run_search", lambda task, run, **_: asked.append(task))
    monkeypatch.setattr("autocompress.cli._show", lambda run, json: None)
    assert main(["search", "--from", str(first), "--budget", "3ms", "--out", str(tmp_path / "run"), "--quiet"]) == 0
    assert (asked[0].model, asked[0].budget, asked[0].from_run) == ("own:net", ("3ms",), str(first))
    capsys.readouterr()
    assert main(["search", "--from", str(tmp_path), "--json"]) == 2
    assert "there is no search in" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_what_does_not_work_here_or_is_damaged_is_left_out_and_said(first, net, data, tmp_path, monkeypatch):
    def fails(setting, outcome, bundle, **_):
        raise PolicyFailure("the device has no such kernel")

    for phase in ("appraise", "short_rung", "full_rung"):
        monkeypatch.setattr(f"autocompress.controller.rungs.Rungs.{phase}", lambda self, *_: None)
    copy, diary = tmp_path / "copy", Diary()
    shutil.copytree(first, copy)
    (copy / "models" / "00000" / "model.onnx").write_bytes(b"damaged")
    monkeypatch.setattr("autocompress.controller.warm_start.evaluate_again", fails)
    with pytest.raises(InfeasibleBudget, match="before any policy could be measured"):
        run_search(task(from_run=str(copy)), tmp_path / "run", model=net, data=data, device=FakeDevice(SLOW_CALLS), progress=diary)
    assert any("policy 00000" in message and "no longer what they were" in message for message in diary.messages)
    assert any("policy 00001" in message and "no such kernel" in message for message in diary.messages)
    assert any(message.startswith("0 networks and ") for message in diary.messages)
