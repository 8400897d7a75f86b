"""What a search does to its folder, and what it asks of Python, without searching."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from autocompress import session
from autocompress.controller import resuming
from autocompress.errors import InfeasibleBudget, UsageError
from autocompress.setup.loading import TEACHER_WEIGHTS, UNFINISHED_TEACHER, kept_teacher
from autocompress.task import DEMO_MODEL, TASK_FILE, Task, load_task


@pytest.mark.parametrize(
    ("begun", "kept"),
    [(Task(model=DEMO_MODEL), False), (Task(model="own:net", data="own:data"), True), (None, True)],
    ids=["demonstration", "own model", "no search"],
)
def test_only_the_demonstrations_weights_are_forgotten(tmp_path, begun, kept):
    weights = tmp_path / "teacher.safetensors"
    weights.write_bytes(b"weights")
    if begun is not None:
        (tmp_path / TASK_FILE).write_text(begun.to_toml())
    resuming.forget_teacher(tmp_path)
    assert weights.is_file() is kept


def test_what_was_measured_is_found_where_nothing_meets_the_budget(tmp_path, monkeypatch):
    def end(*_, **__):
        raise InfeasibleBudget("nothing meets the budget", smallest_latency_s=1.0)

    monkeypatch.setattr(session, "conduct", end)
    with pytest.raises(InfeasibleBudget) as caught:
        session.search(budget="1ms", out=tmp_path / "run", quiet=True)
    assert caught.value.run == tmp_path / "run"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"model": lambda: None}, "a model must be a torch.nn.Module or a reference, but got function"),
        ({"model": nn.Linear}, "a model must be a torch.nn.Module or a reference, but got type"),
        ({"data": 3}, "data must be autocompress.Data or .* but is int"),
        ({"data": ((1, 2, 3),)}, "data must be autocompress.Data or .* but is tuple"),
        ({"budget": 0.01}, "a budget must be text, or several, but got float"),
        ({"budget": None}, "a budget must be text, or several, but got NoneType"),
        ({"space": lambda trial: None}, "a space must be a name or a TOML file, but got function"),
        ({"student": nn.Linear(2, 2)}, "a student must be a reference, but got Linear"),
        ({"space": "tiny", "suggest": lambda trial: None}, "from a space or by a function, but got both 'tiny' and suggest"),
    ],
)
def test_what_python_gives_is_checked_before_anything_is_done(tmp_path, monkeypatch, given, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=says):
        session.search(**{"model": nn.Flatten(), "data": "digits", **given})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def asked(monkeypatch):
    """The tasks that `search` was to run."""
    tasks = []
    monkeypatch.setattr(session, "run_search", lambda task, run, **_: tasks.append(task))
    return tasks


def test_python_resumes_what_was_asked_for(tmp_path, asked):
    """What is not said again is as it was, and not as usual."""
    run = tmp_path / "run"
    run.mkdir()
    model, longer = nn.Flatten(), {"search_time": "2h", "batch_size": 64, "trials": 9, "budget": "5ms", "seed": 3, "space": "tiny"}
    session.search(model, "digits", out=run, **longer)
    (run / TASK_FILE).write_text(asked[0].to_toml())
    session.search(model, out=run, resume=True)
    assert asked[1] == asked[0]
    session.search(model, out=run, resume=True, search_time="3h")
    assert asked[2] == asked[0].model_copy(update={"search_time": "3h"})
    session.search(out=tmp_path / "next", from_run=run, budget="1ms")
    assert asked[3] == asked[0].model_copy(update={"budget": ("1ms",), "from_run": str(run)})


def test_python_reads_a_task_file(tmp_path, asked):
    path = tmp_path / "own.toml"
    path.write_text('model = "torchvision:resnet18"\ndata = "digits"\nbudget = "5ms"\nseed = 3')
    session.search(task_file=path, seed=4)
    assert asked == [Task(model="torchvision:resnet18", data="digits", budget=("5ms",), seed=4)]


def test_a_function_that_draws_policies_is_part_of_what_was_asked_for(tmp_path, asked, monkeypatch):
    """Resumed without it, a search would draw other policies into the same study."""

    def draw(trial):
        raise AssertionError

    session.search(nn.Flatten(), "digits", out=tmp_path, suggest=draw)
    assert asked[0].space == "python:draw"
    assert "space" not in asked[0].demands_trust, "nothing can load it"
    assert asked[0].absolute() == asked[0]
    monkeypatch.undo()
    with pytest.raises(UsageError, match="with the object draw, which no name stands for"):
        session.run_search(asked[0], tmp_path / "run", model=nn.Flatten())
    assert not (tmp_path / "run").exists()


def test_a_folder_of_the_same_name_elsewhere_is_left_alone(tmp_path, monkeypatch):
    """The user's own code may change to another folder while it is loaded."""
    here, there = tmp_path / "here", tmp_path / "there"
    (there / "run").mkdir(parents=True)
    here.mkdir()
    (there / "run" / "front.json").write_text("of another search")
    monkeypatch.chdir(here)

    def load(task, **_):
        os.chdir(there)
        raise UsageError("the data do not load", hint="")

    monkeypatch.setattr("autocompress.controller.run.load", load)
    with pytest.raises(UsageError, match="do not load"):
        session.run_search(Task(model="torchvision:resnet18", data="digits"), Path("run"))
    assert (there / "run" / "front.json").read_text() == "of another search"
    assert not (here / "run").exists()


def test_a_search_that_is_killed_while_it_loads_can_be_resumed_without_its_task(tmp_path, monkeypatch):
    class Killed(BaseException):
        """As far as the folder is concerned."""

    def load(task, **_):
        assert load_task(tmp_path / "run" / TASK_FILE, {}) == task
        raise Killed

    monkeypatch.setattr("autocompress.controller.run.load", load)
    with pytest.raises(Killed):
        session.run_search(Task(model="torchvision:resnet18", data="digits"), tmp_path / "run")


def test_a_teacher_that_the_clock_cut_short_is_that_of_what_was_made_of_it(tmp_path):
    demo, other = Task(), Task(model="torchvision:resnet18", data="digits")
    unfinished, finished = tmp_path / UNFINISHED_TEACHER, tmp_path / TEACHER_WEIGHTS
    assert kept_teacher(demo, tmp_path, begun=True) is None
    unfinished.write_bytes(b"weights")
    assert kept_teacher(demo, tmp_path, begun=True) == unfinished
    assert kept_teacher(demo, tmp_path, begun=False) is None, "who resumes gets a better one"
    finished.write_bytes(b"weights")
    assert kept_teacher(demo, tmp_path, begun=True) == kept_teacher(demo, tmp_path, begun=False) == finished
    assert kept_teacher(other, tmp_path, begun=True) is None


@pytest.mark.parametrize(("model", "trained", "outcomes", "spent"), [
    (DEMO_MODEL, False, [], 0.0),
    (DEMO_MODEL, True, [], 90.0),
    (DEMO_MODEL, False, ["unchanged"], 90.0),
    ("torchvision:resnet18", False, [], 90.0),
])  # fmt: skip
def test_a_demonstration_that_had_not_trained_its_teacher_begins_again_with_all_its_time(tmp_path, model, trained, outcomes, spent):
    """In what is left of it the teacher would not learn enough to be worth compressing."""
    if trained:
        (tmp_path / TEACHER_WEIGHTS).write_bytes(b"weights")
    journal = SimpleNamespace(has_begun=bool(outcomes), noted={"elapsed_s": 90.0, "spent_s": {"train": 60.0}}.get)
    taken = resuming.taken_before(Task(model=model, data="digits"), tmp_path, journal)
    assert taken == (spent, {"train": 60.0} if spent else {})


def test_a_result_is_found_where_the_search_began(tmp_path, monkeypatch):
    """The user's own code may change to another folder while it runs."""
    loaded, elsewhere = [], tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "conduct", lambda *_, **__: os.chdir(elsewhere))
    monkeypatch.setattr(session.SearchResult, "load", loaded.append)
    session.run_search(Task(model="torchvision:resnet18", data="digits"), Path("run"))
    assert loaded == [tmp_path / "run"]


def test_a_search_does_not_learn_from_itself_whatever_its_folder_is_called(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    task = Task(model="torchvision:resnet18", data="digits", from_run=str(tmp_path / "link"))
    with pytest.raises(UsageError, match="cannot learn from itself"):
        session.run_search(task, tmp_path / "run")
