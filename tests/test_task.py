from __future__ import annotations

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autocompress.errors import RunFolderError, UsageError
from autocompress.references import names_function
from autocompress.system.run_folder import remember_own
from autocompress.task import DATA_VARIABLE, DEMO_MODEL, Task, load_kept_task, load_task

texts = st.text(st.characters(exclude_categories=["Cs"]))
tasks = st.builds(
    Task,
    budget=st.lists(st.sampled_from(["10ms", "4MB", "p95=1s", "0.5x"]), unique=True, max_size=3).map(tuple),
    model=texts,
    weights=st.none() | texts,
    data=texts,
    batch=st.integers(1, 4096),
    trials=st.none() | st.integers(1, 10**9),
    target_accuracy=st.none() | st.floats(-1e6, 1e6),
    learning_rate=st.floats(1e-12, 1e6),
    seed=st.integers(0, 2**31),
)


@settings(deadline=None)
@given(tasks)
def test_toml_round_trip(task):
    assert Task.create(tomllib.loads(task.to_toml())) == task


def write(folder, text):
    path = folder / "task.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_reads_back_and_overrides_win(tmp_path):
    path = write(tmp_path, Task(model="m:f", data="digits", budget=("5ms",), seed=3).to_toml())
    assert load_task(path, {}) == Task(model="m:f", data="digits", budget=("5ms",), seed=3)
    task = load_task(path, {"seed": 0, "budget": ("1ms", "4MB"), "batch": None, "trials": 7})
    assert (task.seed, task.budget, task.batch, task.trials) == (0, ("1ms", "4MB"), 1, 7)
    assert load_task(path, {"budget": ()}).budget == ("5ms",), "no --budget keeps the file's"


def test_one_budget_needs_no_list(tmp_path):
    assert load_task(write(tmp_path, 'budget = "10ms"'), {}).limits.latency_s == pytest.approx(0.01)


def test_nothing_given_is_the_demonstration():
    task = load_task(None, {})
    assert (task.is_demo, task.model, task.batch, task.search_seconds) == (True, DEMO_MODEL, 32, 240)
    assert load_task(None, {"batch": 1}).batch == 1


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("budgets = '10ms'", "unknown key 'budgets'", "did you mean budget"),
        ("modle = 'm:f'\ndata = 'digits'", "unknown key 'modle'", "did you mean model"),
        ("model = 'm:f'", "needs data", "--data"),
        ("batch = 0", "batch", ""),
        ("batch = 'many'", "batch", ""),
        ("seed = -1", "seed", ""),
        ("target_accuracy = nan", "target_accuracy", ""),
        ("learning_rate = nan", "learning_rate", ""),
        ("budget = '10'", "needs a unit", "10ms"),
        ("budget = 10", "a budget needs a unit, but got 10", "10ms"),
        ("search_time = 60", "a duration needs a unit, but got 60", "30m"),
        ("budget = '1e400ms'", "must be finite", "10ms"),
        ("budget = 'p95=0ms'", "a budget must be greater than zero", "p95=10ms"),
        ("budget = ['1ms', '2ms']", "twice", ""),
        ("budget = 10", "budget", ""),
        ("search_time = '4'", "needs a unit", ""),
        ("search_time = '0s'", "greater than zero", ""),
        ("search_time = [", "not TOML", ""),
    ],
)
def test_bad_files_are_refused_by_key(tmp_path, text, message, hint):
    with pytest.raises(UsageError, match=message) as caught:
        load_task(write(tmp_path, text), {})
    assert hint in caught.value.hint


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        load_task(tmp_path / "absent.toml", {})
    with pytest.raises(UsageError, match="cannot be read"):
        load_task(tmp_path, {})
    (tmp_path / "latin.toml").write_bytes(b'model = "\xff"')
    with pytest.raises(UsageError, match="UTF-8"):
        load_task(tmp_path / "latin.toml", {})


def test_the_folder_of_data_comes_from_the_environment(tmp_path, monkeypatch):
    path = write(tmp_path, 'model = "${HERE}/net.py:f"\ndata = "imagefolder:${AUTOCOMPRESS_DATA}/x"')
    monkeypatch.setenv(DATA_VARIABLE, "/big disk")
    task = load_task(path, {})
    assert (task.model, task.data) == (f"{tmp_path}/net.py:f", "imagefolder:/big disk/x")
    monkeypatch.delenv(DATA_VARIABLE)
    with pytest.raises(UsageError, match="is not set") as caught:
        load_task(path, {})
    assert DATA_VARIABLE in caught.value.hint


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({"search_time": "9h"}, True),
        ({"trials": 3}, True),
        ({"target_accuracy": 0.5}, True),
        ({"batch_size": 32, "learning_rate": 0.01}, True),
        ({"seed": 1}, False),
        ({"budget": ("1ms",)}, False),
        ({"model": "own.py:net", "data": "other"}, False),
        ({"batch": 2}, False),
    ],
)
def test_a_search_may_be_resumed_for_longer_but_not_with_another_task(changed, same):
    assert (Task(**changed).difference(Task()) is None) is same


def test_files_may_have_been_moved_when_a_search_is_resumed():
    """What they hold is compared once they are loaded."""
    before = Task(model="net.py:build", weights="w.pt", data="imagefolder:photos")
    moved = Task(model="/new/net.py:build", weights="/new/w.pt", data="imagefolder:/new/photos")
    assert before.difference(moved) is None


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ("/old/own.toml", "/new/own.toml", True),
        ("/old/own.py:space", "/new/own.py:space", True),
        ("/old/own.py:space", "/new/own.py:other", False),
        ("/old/own.toml", "default", False),
        ("default", "prune", False),
    ],
)
def test_the_file_of_a_space_may_have_been_moved(before, now, same):
    assert (Task(space=before).difference(Task(space=now)) is None) is same
    assert (Task(space=before).other_subject(Task(space=now)) is None) is (same or ":" not in before)


def test_a_budget_in_other_words_is_the_same_task():
    assert Task(budget=("10ms", "4MB")).difference(Task(budget=("4000kB", "0.01s"))) is None


@pytest.mark.parametrize(
    ("other", "differs"),
    [("onnxruntime:cpu", None), ("onnxruntime:cpu?threads=2", "device"), ("openvino:cpu?threads=1", "device"), ("agent://h:1", "device")],
)
def test_a_device_is_the_same_in_other_words(other, differs):
    assert Task(device="onnxruntime:cpu?threads=1").difference(Task(device=other)) == differs


def test_a_task_means_the_same_in_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = Task(model="net.py:build", weights="w.pt", data="imagefolder:photos", space="wide.toml")
    task = given.absolute()
    assert (task.model, task.weights) == (f"{tmp_path}/net.py:build", f"{tmp_path}/w.pt")
    assert (task.data, task.space) == (f"imagefolder:{tmp_path}/photos", f"{tmp_path}/wide.toml")
    path = write(tmp_path, task.to_toml())
    monkeypatch.chdir("/")
    assert load_task(path, {}).absolute() == task
    shipped = Task(model="torchvision:resnet18", data="digits", space="prune")
    assert shipped.absolute() == shipped


STRANGE = {
    "model": "/tmp/payload.py:model",
    "data": "payload:data",
    "space": "${HERE}/payload.py:space",
    "student": "payload:student",
    "device": "agent://elsewhere",
}


@pytest.mark.parametrize("field", STRANGE)
def test_what_a_folder_of_somebody_else_names_is_not_run(tmp_path, field, monkeypatch):
    """A run folder is something that people send to each other."""
    harmless = {"model": "torchvision:resnet18", "data": "imagefolder:photos"}
    path = write(tmp_path, "".join(f'{key} = "{value}"\n' for key, value in (harmless | {field: STRANGE[field]}).items()))
    for overrides in ({}, {"budget": ("5ms",), "seed": 1}):
        with pytest.raises(UsageError, match=f"the {field} .*payload|elsewhere.* no search of yours on this machine") as caught:
            load_kept_task(tmp_path, overrides)
        assert f"--{field} " in caught.value.hint
    named = load_kept_task(tmp_path, {field: STRANGE[field]})
    assert getattr(named, field) == STRANGE[field], "whoever names it wants it"
    remember_own(path)
    assert getattr(load_kept_task(tmp_path, {}), field) == STRANGE[field].replace("${HERE}", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="lies around this folder"):
        load_kept_task(tmp_path, {})
    monkeypatch.undo()
    write(tmp_path, path.read_text() + "seed = 7\n")
    with pytest.raises(UsageError, match="no search of yours"):
        load_kept_task(tmp_path, {})


def test_only_functions_of_this_package_are_ours():
    assert not names_function("autocompress.demo:teacher") and not names_function("autocompress.testing.models:resnet20")
    for reference in ("autocompress.payload.py:f", "autocompress./payload:f", "../autocompress.payload:f", "autocompress:payload"):
        assert names_function(reference), reference


def test_what_names_no_code_needs_no_trust(tmp_path):
    for text in (
        'budget = "10ms"',
        'model = "torchvision:resnet18"\ndata = "torchvision:CIFAR10?root=here"\nstudent = "timm:resnet10t"\nspace = "default"',
        f'model = "{DEMO_MODEL}"\ndata = "digits"\nspace = "/own/space.toml"\ndevice = "openvino:cpu"',
    ):
        write(tmp_path, text)
        assert load_kept_task(tmp_path, {}) == load_task(tmp_path / "task.toml", {})
    with pytest.raises(UsageError, match="there is no search"):
        load_kept_task(tmp_path / "absent", {})


def test_a_folder_of_transformers_is_found_from_every_folder_and_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-bert").mkdir()
    task = Task.create({"model": "transformers:my-bert?revision=x", "data": "digits"})
    assert task.absolute().model == f"transformers:{tmp_path}/my-bert?revision=x"
    assert Task.create({"model": "transformers:org/bert", "data": "digits"}).absolute().model == "transformers:org/bert"
    assert not task.demands_trust


def test_a_kept_task_that_was_cut_short_is_the_folders_fault_and_can_be_given_anew(tmp_path):
    write(tmp_path, 'model = "torchvision:resn')
    with pytest.raises(RunFolderError, match=r"task\.toml' is damaged") as caught:
        load_kept_task(tmp_path, {})
    assert "TASK.toml --resume --out" in caught.value.hint
