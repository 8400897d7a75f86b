"""What a search does to its folder, and what it asks of Python, without searching."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from autocompress import session
from autocompress.errors import UsageError
from autocompress.preparation import TEACHER_WEIGHTS
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
    session._forget_teacher(tmp_path)
    assert weights.is_file() is kept


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
    ],
)
def test_what_python_gives_is_checked_before_anything_is_done(tmp_path, monkeypatch, given, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=says):
        session.search(**{"model": nn.Flatten(), "data": "digits", **given})
    assert list(tmp_path.iterdir()) == []


def test_a_search_that_is_killed_while_it_loads_can_be_resumed_without_its_task(tmp_path, monkeypatch):
    class Killed(BaseException):
        """As far as the folder is concerned."""

    def load(task, **_):
        assert load_task(tmp_path / "run" / TASK_FILE, {}) == task
        raise Killed

    monkeypatch.setattr(session, "load", load)
    with pytest.raises(Killed):
        session.run_search(Task(model="torchvision:resnet18", data="digits"), tmp_path / "run")


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
    journal = SimpleNamespace(outcomes=outcomes, noted={"elapsed_s": 90.0, "spent_s": {"train": 60.0}}.get)
    taken = session._taken_before(Task(model=model, data="digits"), tmp_path, journal)
    assert taken == (spent, {"train": 60.0} if spent else {})
