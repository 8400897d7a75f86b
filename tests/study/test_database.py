from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys

import optuna
import pytest
from optuna.trial import TrialState

from autocompress.errors import RunFolderError, UsageError
from autocompress.policy import Policy, QuantSpec
from autocompress.records import Attempt, Failure, Measurement, Outcome, Score
from autocompress.study import database as studies
from autocompress.study.backup import BACKUP, back_up
from autocompress.study.journal import MAX_RETRIES, MOST_KILLS, OUTCOME, RULED_OUT_WORTH, AppraisedTrial
from autocompress.study.notes import Note
from autocompress.task import DEMO_MODEL, Task

TASK = Task(model="own:net", data="own:data", budget=("10ms",))
LATENCY = Measurement(median=0.008, low=0.0079, high=0.009, p95=0.012, n=100)
INT8 = Policy(quant=QuantSpec(bits=8))
HOW = {"batch_size": 128}


def outcome(id, **changes):
    made = Outcome(id=id, policy=INT8, rung="short", val_score=Score(value=0.5), latency_s=LATENCY, artifact="models/0/model.onnx")
    return made.model_copy(update=changes)


@pytest.fixture
def journal(tmp_path):
    return studies.open_journal(tmp_path, TASK, resume=False)


def ask(journal):
    trial = journal.study.ask()
    trial.suggest_int("bits", 2, 8)
    return trial


def again(run, task=TASK, **options):
    return studies.open_journal(run, task, resume=True, **options)


def test_outcomes_come_back_as_they_were_in_another_process(journal, tmp_path):
    kept = [outcome("00001"), outcome("00000"), outcome("int8", failure=Failure(stage="train", reason="diverged"), artifact=None)]
    for one in kept:
        journal.record(one)
    assert again(tmp_path).outcomes == sorted(kept, key=lambda o: o.id)
    journal.record(outcome("00001", test_score=Score(value=0.25)))
    found = {o.id: o for o in again(tmp_path).outcomes}
    assert len(found) == 3, "recording again replaces"
    assert found["00001"].test_score == Score(value=0.25)


def killed_over(journal):
    journal.note_kill()
    return journal.killed_over(HOW)


def test_what_a_search_is_killed_over_again_and_again_is_known(journal, tmp_path):
    """A policy that takes more memory than there is would otherwise be the first thing that every resumed search tries."""
    other = Policy(quant=QuantSpec(bits=4))
    with journal.at_work(Attempt(id="00000", policy=other, rung="short"), HOW):
        pass
    with pytest.raises(KeyboardInterrupt), journal.at_work(Attempt(id="00000", policy=other, rung="short"), HOW):
        raise KeyboardInterrupt
    assert killed_over(again(tmp_path)) == [], "what ended by itself, or by its user, was not killed"
    killed = []
    for id in ("00000", "00001"):
        resumed = again(tmp_path)
        assert killed_over(resumed) == []
        killed.append(resumed.at_work(Attempt(id=id, policy=INT8, rung="short"), HOW))
        killed[-1].__enter__()
    assert MOST_KILLS == 2
    for _ in range(2):
        resumed = again(tmp_path)
        assert [(o.id, o.policy, o.rung) for o in killed_over(resumed)] == [("00001", INT8, "short")]
        assert resumed.noted(Note.AT_WORK) is None
        assert resumed.killed_over({"batch_size": 16}) == [], "which may need less"


def test_a_dashboard_is_told_what_the_objectives_are(journal, tmp_path):
    known = optuna.load_study(study_name=studies.STUDY, storage=f"sqlite:///{tmp_path / studies.DATABASE}")
    assert known.metric_names == studies.OBJECTIVES == again(tmp_path).study.metric_names


def test_other_values_are_no_outcomes(journal, tmp_path):
    journal.note(Note.ELAPSED_S, 3.5)
    assert journal.outcomes == []
    assert again(tmp_path).noted(Note.ELAPSED_S) == 3.5


def test_what_was_appraised_is_told_with_its_constraint_and_comes_back(journal, tmp_path):
    params = ask(journal).params
    journal.retire_lost_trials()
    trial = ask(journal)
    assert trial.params == params
    journal.tell_appraised(trial, Policy(), 0.5, 0.008, -0.1)
    told = journal.study.trials[1]
    assert (told.state, told.values) == (TrialState.COMPLETE, [0.5, 0.008])
    assert told.constraints == {"budget": -0.1, "outclassed": 0.0}
    assert again(tmp_path).appraised() == [AppraisedTrial(params, 0.5, Policy().digest)]


def test_a_distillation_is_told_by_what_it_gained(journal, tmp_path):
    for advantage in (0.02, None):
        journal.tell_distillation(journal.distillations.ask(), advantage)
    journal.distillations.ask()
    assert again(tmp_path).retire_lost_trials() == 0, "no structure was lost"
    distillations = again(tmp_path).distillations.trials
    assert [t.state for t in distillations] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.FAIL]
    assert distillations[0].value == 0.02


def test_ids_count_on_from_the_last_one(journal):
    assert journal.next_id() == "00000"
    for id in ("int8", "00000", "00004", "00004-full"):
        journal.record(outcome(id))
    assert journal.next_id() == "00005"


@pytest.mark.parametrize(("over_budget", "outclassed"), [(1.0, 0.0), (-0.5, 0.2)])
def test_what_is_ruled_out_is_complete_and_violates_a_constraint(journal, over_budget, outclassed):
    journal.tell_ruled_out(ask(journal), 0.02, over_budget=over_budget, outclassed=outclassed)
    told = journal.study.trials[0]
    assert (told.state, told.values) == (TrialState.COMPLETE, [RULED_OUT_WORTH, 0.02])
    assert told.constraints == {"budget": over_budget, "outclassed": outclassed}
    assert journal.appraised() == []
    assert journal.finished == 1
    assert journal.study.best_trials == [], "what violates a constraint is never on Optuna's front"


def test_a_lost_trial_is_failed_and_its_policy_comes_again_twice_at_most(journal, tmp_path):
    params = ask(journal).params
    for attempt in range(1 + MAX_RETRIES):
        reopened = again(tmp_path)
        assert reopened.retire_lost_trials() == 1
        assert not reopened.study.get_trials(states=(TrialState.RUNNING,))
        queued = reopened.study.get_trials(states=(TrialState.WAITING,))
        assert len(queued) == (1 if attempt < MAX_RETRIES else 0)
        if queued:
            trial = ask(reopened)
            assert trial.params == params
            assert trial.user_attrs["retries"] == attempt + 1
    assert again(tmp_path).retire_lost_trials() == 0


def test_a_lost_trial_that_had_drawn_nothing_is_only_failed(journal):
    journal.study.ask()
    assert journal.retire_lost_trials() == 1
    assert [trial.state for trial in journal.study.trials] == [TrialState.FAIL]


def test_an_abandoned_trial_is_failed_once_and_its_policy_waits(journal):
    trial = ask(journal)
    journal.abandon(trial)
    journal.abandon(trial)
    assert [t.state for t in journal.study.trials] == [TrialState.FAIL, TrialState.WAITING]
    assert ask(journal).params == trial.params


def test_the_same_seed_does_not_repeat_suggestions_after_a_resume(journal, tmp_path):
    first = [ask(journal).params for _ in range(6)]
    for trial in journal.study.trials:
        journal.study.tell(trial.number, state=TrialState.FAIL)
    assert [ask(again(tmp_path)).params for _ in range(6)] != first
    other = studies.open_journal(tmp_path_of(tmp_path), TASK, resume=False)
    assert [ask(other).params for _ in range(6)] == first, "a fresh search with the same seed is the same"


def tmp_path_of(path):
    (path / "other").mkdir()
    return path / "other"


def test_any_sampler_can_be_given(tmp_path):
    sampler = optuna.samplers.RandomSampler(seed=0)
    assert studies.open_journal(tmp_path, TASK, resume=False, sampler=sampler).study.sampler.sampler is sampler


@pytest.mark.parametrize("changes", [{"search_time": "2h"}, {"trials": 7}, {"target_accuracy": 0.9}])
def test_how_long_to_search_may_change_on_resume(journal, tmp_path, changes):
    again(tmp_path, TASK.model_copy(update=changes))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"budget": ("5ms",)}, r"budget was \('10ms',\), now \('5ms',\)"),
        ({"model": DEMO_MODEL}, "model was 'own:net', now 'autocompress.demo:teacher'"),
        ({"seed": 3}, "seed was 0, now 3"),
        ({"space": "prune"}, "space was 'default', now 'prune'"),
    ],
)
def test_another_task_is_refused_with_what_differs(journal, tmp_path, changes, what):
    with pytest.raises(UsageError, match=what):
        again(tmp_path, TASK.model_copy(update=changes))


def test_a_search_is_resumed_from_its_folder_and_from_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = Task(model="net.py:build", weights="w.pt", data="imagefolder:photos")
    absolute = given.absolute()
    for begun in (given, absolute):
        run = tmp_path / ("absolute" if begun != given else "as given")
        run.mkdir()
        studies.open_journal(run, begun, resume=False)
        again(run, given)
        again(run, absolute)
    monkeypatch.chdir("/")
    again(run, absolute)
    again(run, given)
    with pytest.raises(UsageError, match="another task: model was"):
        again(run, Task())


def test_outcomes_of_another_version_are_named_and_left_alone(journal, tmp_path):
    journal.study.set_user_attr("outcome:00000", {"id": "00000", "what_another_version_kept": 1})
    with pytest.raises(RunFolderError, match="begun by a version that kept other things"):
        again(tmp_path)


def test_a_name_that_stands_for_something_else_by_now_is_refused(journal, tmp_path):
    began = {"data": "a", "model": "b"}
    studies.require_same_contents(journal, tmp_path, began)
    studies.require_same_contents(again(tmp_path), tmp_path, began)
    with pytest.raises(UsageError, match="the content of its model has changed"):
        studies.require_same_contents(again(tmp_path), tmp_path, began | {"model": "c"})


def test_an_existing_search_is_not_overwritten_and_an_absent_one_not_resumed(journal, tmp_path):
    journal.record(outcome("00000"))
    with pytest.raises(UsageError, match="already holds a search"):
        studies.open_journal(tmp_path, TASK, resume=False)
    with pytest.raises(UsageError, match="no search to resume"):
        again(tmp_path / "absent")


@pytest.mark.parametrize("damage", [lambda b: b"\0" * 64 + b[64:], lambda b: b"no database at all" * 100])
def test_a_damaged_database_is_named_and_left_alone(journal, tmp_path, damage):
    path = tmp_path / studies.DATABASE
    path.write_bytes(damage(path.read_bytes()))
    before = path.read_bytes()
    with pytest.raises(RunFolderError, match=r"study\.db' is damaged"):
        again(tmp_path)
    assert path.read_bytes() == before


def test_a_damaged_database_is_put_back_as_the_message_says(journal, tmp_path, monkeypatch):
    path = tmp_path / studies.DATABASE
    journal.record(outcome("00000"))
    back_up(path)
    sound = (tmp_path / BACKUP).read_bytes()
    journal.study._storage.remove_session()
    path.write_bytes(b"\0" * 64 + path.read_bytes()[64:])
    path.with_name(path.name + "-journal").write_bytes(b"what a killed search had left")
    back_up(path)
    assert (tmp_path / BACKUP).read_bytes() == sound, "what is damaged does not replace it"
    with pytest.raises(RunFolderError, match=r"study\.db' is damaged") as caught:
        again(tmp_path)
    subprocess.run(caught.value.hint.split(": ")[-1], shell=True, check=True)
    assert [o.id for o in again(tmp_path).outcomes] == ["00000"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([BACKUP, studies.DATABASE])


@pytest.mark.parametrize("left", [b"", None], ids=["empty", "gone"])
def test_where_nothing_is_left_of_a_database_its_copy_is_named(journal, tmp_path, left):
    path = tmp_path / studies.DATABASE
    journal.record(outcome("00000"))
    back_up(path)
    journal.study._storage.remove_session()
    path.unlink()
    if left is not None:
        path.write_bytes(left)
    with pytest.raises(UsageError, match="no search to resume") as caught:
        studies.require_own(tmp_path, resume=True)
    subprocess.run(caught.value.hint.split(": ")[-1], shell=True, check=True)
    studies.require_own(tmp_path, resume=True)
    assert [o.id for o in again(tmp_path).outcomes] == ["00000"]


def test_a_database_that_may_not_be_read_is_not_called_damaged(journal, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise sqlite3.OperationalError("unable to open database file")

    monkeypatch.setattr("autocompress.study.database.sqlite3.connect", refused)
    with pytest.raises(RunFolderError, match="cannot be read: unable to open"):
        studies.require_own(tmp_path, resume=True)


def test_a_copy_that_cannot_be_written_ends_the_search_with_its_reason(journal, tmp_path, monkeypatch):
    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    back_up(tmp_path / studies.DATABASE)
    monkeypatch.setattr("autocompress.study.backup._is_copied", full)
    with pytest.raises(RunFolderError, match="disk is full") as caught:
        back_up(tmp_path / studies.DATABASE)
    assert "--resume" in caught.value.hint
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([BACKUP, studies.DATABASE]), "the one before stays"


@pytest.mark.parametrize("name", ["100%25", "a#b", "what?", "a?b=c#d%41", "{run}", "ü b"])
def test_a_run_folder_may_have_any_name(tmp_path, name):
    run = tmp_path / name
    run.mkdir()
    studies.open_journal(run, TASK, resume=False).record(outcome("00000"))
    assert [o.id for o in again(run).outcomes] == ["00000"]
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert [path.name for path in run.iterdir()] == [studies.DATABASE]
    studies.require_own(run, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_database_of_another_optuna_is_named_and_left_alone(journal, tmp_path, resume):
    path = tmp_path / studies.DATABASE
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v99.0.0.a'")
    before = path.read_bytes()
    with pytest.raises(RunFolderError, match="cannot be read: The runtime optuna version") as caught:
        studies.open_journal(tmp_path, TASK, resume=resume)
    assert "--out" in caught.value.hint
    assert path.read_bytes() == before


def test_a_database_that_cannot_be_written_is_the_folder_s_fault(journal, tmp_path):
    with pytest.raises(RunFolderError, match=r"study\.db' cannot be written: OSError: disk full") as caught, studies.recording(tmp_path):
        raise optuna.exceptions.StorageInternalError("An exception is raised during the commit.") from OSError("disk full")
    assert "--resume" in caught.value.hint


KILLED = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size = 1")
connection.execute("BEGIN")
for number in range(1000):
    connection.execute("INSERT INTO study_user_attributes (study_id, key, value_json) VALUES (1, ?, ?)", (f"outcome:{number}", "x" * 500))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_search_that_was_killed_while_it_wrote_goes_on(journal, tmp_path):
    journal.record(outcome("00000"))
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / studies.DATABASE)], check=False)
    assert (tmp_path / "study.db-journal").stat().st_size > 0
    studies.require_own(tmp_path, resume=True)
    assert [o.id for o in again(tmp_path).outcomes] == ["00000"]


def test_an_outcome_can_be_forgotten_and_nothing_else_is(journal, tmp_path):
    journal.record(outcome("00000"))
    journal.record(outcome("00001"))
    journal.forget(outcome("00001"))
    assert [o.id for o in again(tmp_path).outcomes] == ["00000"]


def test_a_search_that_had_evaluated_nothing_makes_room_for_another(journal, tmp_path):
    """As after a budget that nothing can meet."""
    other = Task(model="own:net", data="own:data", budget=("20ms",))
    begun = studies.open_journal(tmp_path, other, resume=False)
    assert begun.noted(Note.TASK)["budget"] == ["20ms"]
    assert begun.study.trials == []


def test_a_search_that_had_only_appraised_is_no_empty_one(journal, tmp_path):
    journal.tell_appraised(ask(journal), Policy(), 0.5, 0.008, -0.1)
    with pytest.raises(UsageError, match="already holds a search"):
        studies.open_journal(tmp_path, TASK, resume=False)


def test_a_copy_of_the_database_is_left_alone_and_another_versions_study_is_no_empty_one(journal, tmp_path):
    (tmp_path / "study.db.bak").write_text("a copy")
    journal.study.set_user_attr(OUTCOME + "00000", {"of": "a later version"})
    with pytest.raises(UsageError, match="already holds a search"):
        studies.open_journal(tmp_path, TASK, resume=False)
    journal.study.set_user_attr(OUTCOME + "00000", None)
    studies.open_journal(tmp_path, TASK, resume=False)
    assert (tmp_path / "study.db.bak").read_text() == "a copy"


@pytest.mark.parametrize("name", ["teacher.safetensors", "task.toml", "report.html", "notes"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_other_files_is_refused(tmp_path, name, resume):
    (tmp_path / name).write_text("mine")
    (tmp_path / ".lock").write_text("")
    with pytest.raises(UsageError, match="no search to resume" if resume else f"holds other files, such as .{name}"):
        studies.require_own(tmp_path, resume=resume)


def test_folders_of_our_own_may_be_searched_in(journal, tmp_path):
    (tmp_path / "report.html").write_text("of a search")
    studies.require_own(tmp_path, resume=False)
    studies.require_own(tmp_path, resume=True)
    studies.require_own(tmp_path / "absent", resume=False)
    begun = tmp_path_of(tmp_path)
    (begun / ".lock").write_text("process 1 on here")
    (begun / studies.DATABASE).write_bytes(b"")
    studies.require_own(begun, resume=False)
    assert studies.open_journal(begun, TASK, resume=False).study.trials == []


@pytest.mark.parametrize("resume", [False, True])
def test_a_database_of_others_is_left_alone(tmp_path, resume):
    path = tmp_path / studies.DATABASE
    optuna.create_study(study_name="mine", storage=f"sqlite:///{path}")
    before = path.read_bytes()
    for open_ in (studies.require_own, lambda run, resume: studies.open_journal(run, TASK, resume=resume)):
        with pytest.raises(UsageError):
            open_(tmp_path, resume=resume)
    assert path.read_bytes() == before


def test_a_database_that_is_none_of_optunas_is_left_alone(tmp_path):
    path = tmp_path / studies.DATABASE
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE songs (title TEXT)")
    before = path.read_bytes()
    with pytest.raises(UsageError, match="holds other files"):
        studies.require_own(tmp_path, resume=False)
    with pytest.raises(UsageError):
        studies.open_journal(tmp_path, TASK, resume=False)
    assert path.read_bytes() == before


def test_an_empty_search_beside_another_study_is_not_removed(journal, tmp_path):
    optuna.create_study(study_name="mine", storage=f"sqlite:///{tmp_path / studies.DATABASE}")
    with pytest.raises(UsageError, match="already holds a search"):
        studies.open_journal(tmp_path, TASK, resume=False)


def test_a_study_of_somebody_elses_that_is_called_as_ours_is_not_removed(tmp_path):
    storage = f"sqlite:///{tmp_path / studies.DATABASE}"
    optuna.create_study(study_name=studies.STUDY, storage=storage).add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(UsageError, match="already holds a search"):
        studies.open_journal(tmp_path, TASK, resume=False)
    assert len(optuna.load_study(study_name=studies.STUDY, storage=storage).trials) == 1


def test_a_search_is_not_resumed_on_another_machine(journal, tmp_path):
    """Nor with another runtime: a name of a device says nothing of what it is."""
    machine = {"processor": "EPYC", "flags": "avx2", "onnxruntime": "1.32.0"}
    studies.require_same_machine(journal, tmp_path, machine)
    studies.require_same_machine(journal, tmp_path, dict(machine))
    with pytest.raises(UsageError, match=r"another machine: its flags was 'avx2' and is 'avx2 avx512_vnni'") as caught:
        studies.require_same_machine(journal, tmp_path, machine | {"flags": "avx2 avx512_vnni"})
    assert "--from" in caught.value.hint
    with pytest.raises(UsageError, match=r"onnxruntime was '1\.32\.0' and is None"):
        studies.require_same_machine(journal, tmp_path, {"processor": "EPYC", "flags": "avx2"})


@pytest.mark.parametrize(
    ("reason", "cure"),
    [("database is locked", "what else has it open"), ("database disk image is malformed", "start again"), ("disk full", "free space")],
)
def test_what_helps_depends_on_why_a_database_cannot_be_written(tmp_path, reason, cure):
    with pytest.raises(RunFolderError) as caught, studies.recording(tmp_path):
        raise optuna.exceptions.StorageInternalError("An exception is raised during the commit.") from OSError(reason)
    assert cure in caught.value.hint
