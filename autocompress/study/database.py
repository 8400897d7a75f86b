"""Opens RUN/study.db, the database of a search's journal, and refuses what it must not touch. Nothing else opens it."""

from __future__ import annotations

import json
import shlex
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, TPESampler
from sqlalchemy.engine import URL

from autocompress.errors import RunFolderError, UsageError, one_line
from autocompress.ranking.front import least_counted
from autocompress.study.backup import BACKUP, how_to_restore
from autocompress.study.fallback import OrRandom
from autocompress.study.journal import Journal, appraised_in, outcomes_in
from autocompress.study.notes import Note
from autocompress.study.sampler import FrontSampler
from autocompress.system.quiet import quiet
from autocompress.system.run_folder import LOCK
from autocompress.task import Task

STUDY, DISTILLATIONS = "autocompress", "distillations"
OBJECTIVES, DISTILLATION_OBJECTIVE = ["score before training", "predicted latency (s)"], "gain over the usual distillation"
DATABASE = "study.db"
SUFFIXES = ("", "-journal", "-wal", "-shm")
"""SQLite keeps up to three more files beside a database."""


def require_own(run: Path, *, resume: bool) -> None:
    """Called before anything is written: files that no search of ours left there would be overwritten.

    Raises UsageError for a folder with such files in it, and where there is no search to resume.
    """
    try:
        studies = _studies(run / DATABASE)
        ours = {BACKUP, *(DATABASE + suffix for suffix in SUFFIXES)} if studies == [] and (run / DATABASE).exists() else set()
        left = {LOCK, *ours}
        others = sorted(entry.name for entry in run.iterdir() if entry.name not in left) if run.is_dir() else []
    except OSError as error:
        raise UsageError(f"the run folder {str(run)!r} cannot be read: {error.strerror}", hint="choose another --out") from None
    if STUDY in (studies or ()):
        return
    if resume:
        raise _nothing_to_resume(run)
    if others:
        raise UsageError(f"{str(run)!r} holds other files, such as {others[0]!r}", hint="choose an empty folder, or a new one, for --out")


def _nothing_to_resume(run: Path) -> UsageError:
    hint = how_to_restore(run / DATABASE) if (run / BACKUP).is_file() else "leave --resume out to start one"
    return UsageError(f"there is no search to resume in {str(run)!r}", hint=hint)


def open_journal(run: Path, task: Task, *, resume: bool, sampler: BaseSampler | None = None) -> Journal:
    """Create or reopen RUN/study.db.

    Raises UsageError when the folder holds a search and `resume` is not given, or holds another task's search;
    RunFolderError when the database is damaged.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = run / DATABASE
    if not resume and not _forget_empty(path):
        raise UsageError(f"{str(run)!r} already holds a search", hint="add --resume, or choose another --out")
    if resume and STUDY not in (_studies(path) or ()):
        raise _nothing_to_resume(run)
    storage = _storage(path)
    study = optuna.create_study(study_name=STUDY, storage=storage, directions=["maximize", "minimize"], load_if_exists=True)
    _require_same_task(study, task, run)
    distillations = optuna.create_study(study_name=DISTILLATIONS, storage=storage, direction="maximize", load_if_exists=True)
    with quiet("optuna"):  # names of objectives are experimental in Optuna; its dashboard shows them
        study.set_metric_names(OBJECTIVES)
        distillations.set_metric_names([DISTILLATION_OBJECTIVE])
    study.sampler = OrRandom(sampler or FrontSampler(seed=_seed(task, study), least=least_counted), seed=_seed(task, study))
    tpe = TPESampler(seed=_seed(task, distillations), multivariate=True)
    distillations.sampler = OrRandom(tpe, seed=_seed(task, distillations))
    try:
        return Journal(study, distillations)
    except ValueError as error:  # of a version that kept other things
        raise RunFolderError(
            f"the search in {str(run)!r} was begun by a version that kept other things: {one_line(error)}",
            hint="resume it with the version that front.json names (environment), or search again with another --out",
        ) from None


def read_journal(run: Path, task: Task) -> Journal:
    """The journal of another search, to learn from it. Raises UsageError where there is none, or it is not of the same subject."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    hint = "--from takes the run folder of a search of the same model and data"
    nothing = UsageError(f"there is no search to learn from in {str(run)!r}", hint=hint)
    if not {STUDY, DISTILLATIONS} <= set(_studies(run / DATABASE) or ()):
        raise nothing
    storage = _storage(run / DATABASE)
    try:
        journal = Journal(*(optuna.load_study(study_name=name, storage=storage) for name in (STUDY, DISTILLATIONS)))
    except ValueError:  # of a version that kept other things
        raise nothing from None
    if journal.noted(Note.TASK) is None:
        raise nothing
    before = _kept_task(journal.noted(Note.TASK))
    changed = before.other_subject(task)
    if changed is not None:
        words = f"{changed} was {getattr(before, changed)!r}, now {getattr(task, changed)!r}"
        raise UsageError(f"what was learned in {str(run)!r} is of something else: {words}", hint=hint)
    return journal


@contextmanager
def recording(run: Path) -> Iterator[None]:
    """Raises RunFolderError where the database could not be written: the disk is full, or the folder was taken away."""
    try:
        yield
    except optuna.exceptions.StorageInternalError as error:
        reason = one_line(error.__cause__ or error)
        raise RunFolderError(f"{str(run / DATABASE)!r} cannot be written: {reason}", hint=_cure(reason, run)) from None


def _cure(reason: str, run: Path) -> str:
    """Of a database that cannot be written, by what SQLite says."""
    if "locked" in reason:
        return "end what else has it open, then --resume"
    if "malformed" in reason or "not a database" in reason:
        return how_to_restore(run / DATABASE)
    return "free space, then --resume"


def _seed(task: Task, study: optuna.Study) -> int:
    """Depends on the trials so far, since the same seed on resume would repeat itself."""
    return (task.seed * 100_003 + len(study.get_trials(deepcopy=False))) % 2**32


def _storage(path: Path) -> optuna.storages.RDBStorage:
    """Raises RunFolderError when the database is of an Optuna that keeps other tables."""
    url = URL.create("sqlite", database=str(path.resolve())).render_as_string()
    template = url.replace("{", "{{").replace("}", "}}")  # Optuna fills in its URL as a format string
    try:
        return optuna.storages.RDBStorage(template, engine_kwargs={"connect_args": {"timeout": 30}})
    except RuntimeError as error:
        what, *cure = str(error).split(". ")
        upgrade = next((f" or {part.strip(' .')}," for part in cure if "upgrade" in part), "")
        hint = f"resume with the version of Optuna that began it,{upgrade} or choose another --out"
        raise RunFolderError(f"{str(path)!r} cannot be read: {what}", hint=hint) from None


def _forget_empty(path: Path) -> bool:
    """Make room where a search ended before it had evaluated anything, as one does whose budget was refused; whether there is room.

    Removes the database only where nothing but such a search is in it.
    """
    names = _studies(path)
    if names is None or not {STUDY} <= set(names) <= {STUDY, DISTILLATIONS}:
        return names == []
    try:
        storage = _storage(path)
        try:
            study = optuna.load_study(study_name=STUDY, storage=storage)
            ours = Note.TASK in study.user_attrs or not study.get_trials(deepcopy=False)
            empty = ours and not outcomes_in(study) and not appraised_in(study)
        finally:
            storage.engine.dispose()
    except ValueError:  # of another version of ours
        return False
    if empty:
        for name in (BACKUP, *(path.name + suffix for suffix in SUFFIXES)):
            path.with_name(name).unlink(missing_ok=True)
    return empty


def _studies(path: Path) -> list[str] | None:
    """Names of the studies in a database, none where there is no database yet; None where it holds something else.

    Raises RunFolderError when it is damaged.
    """
    if not path.exists():
        return []
    try:
        # not mode=ro: what a killed process had begun to write is taken back by the first who may write
        with closing(sqlite3.connect(path.resolve().as_uri() + "?mode=rw", uri=True)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if "studies" not in tables:
                return None if tables else []
            return [name for (name,) in connection.execute("SELECT study_name FROM studies")]
    except sqlite3.OperationalError as error:  # no permission, or somebody holds it
        raise RunFolderError(f"{str(path)!r} cannot be read: {error}", hint="end what else has it open, or choose another --out") from None
    except sqlite3.DatabaseError as error:
        raise RunFolderError(f"{str(path)!r} is damaged: {error}", hint=how_to_restore(path)) from None


def _require_same_task(study: optuna.Study, task: Task, run: Path) -> None:
    known = study.user_attrs.get(Note.TASK)
    if known is None:
        study.set_user_attr(Note.TASK.value, json.loads(task.to_json()))
        return
    before, task = _kept_task(known), task.absolute()
    changed = before.difference(task)
    if changed is None:
        return
    raise UsageError(
        f"{str(run)!r} holds the search of another task: {changed} was {getattr(before, changed)!r}, now {getattr(task, changed)!r}",
        hint=f"resume with the same task, or choose another --out{_reusable(before, task, run)}",
    )


def _reusable(before: Task, task: Task, run: Path) -> str:
    """How another task may begin with what was learned of this one, where it is of the same subject."""
    same_names = all(getattr(before, name) == getattr(task, name) for name in ("model", "data", "weights", "space"))
    is_reusable = same_names and before.other_subject(task) is None
    return f" that begins with what was learned here: --from {shlex.quote(str(run))}" if is_reusable else ""


def _kept_task(known: dict[str, Any]) -> Task:
    """As a study keeps it; an earlier version kept paths as they were given."""
    return Task.create({key: tuple(value) if isinstance(value, list) else value for key, value in known.items()}).absolute()


def require_same_contents(journal: Journal, run: Path, contents: dict[str, str]) -> None:
    """Raises UsageError where a name of the task has come to stand for something else since the search began.

    Args:
        contents: digest by what it is of.
    """
    known = journal.noted(Note.CONTENTS)
    if known is None:
        journal.note(Note.CONTENTS, contents)
        return
    if changed := _changed(known, contents):
        raise UsageError(
            f"{str(run)!r} holds the search of another task: the content of its {changed} has changed since it began",
            hint=f"resume with the {changed} as it was, or choose another --out",
        )


def require_same_machine(journal: Journal, run: Path, machine: dict[str, str]) -> None:
    """Raises UsageError where a search is resumed on another processor or runtime than it has measured on, though its name is the same."""
    known = journal.noted(Note.MACHINE)
    if known is None:
        journal.note(Note.MACHINE, machine)
        return
    changed = next((what for what in {**known, **machine} if known.get(what) != machine.get(what)), None)
    if changed is not None:
        raise UsageError(
            f"{str(run)!r} holds what was measured on another machine: its {changed} was {known.get(changed)!r} "
            f"and is {machine.get(changed)!r}",
            hint=f"begin another search with what was learned here: --from {shlex.quote(str(run))} --out NEW",
        )


def require_same_subject(journal: Journal, run: Path, contents: dict[str, str]) -> None:
    """Raises UsageError where the names of another search's task stood for something else."""
    if changed := _changed(journal.noted(Note.CONTENTS) or {}, contents):
        raise UsageError(
            f"what was learned in {str(run)!r} is of something else: the content of its {changed} has changed since",
            hint=f"search with the {changed} as it was, or leave --from out",
        )


def _changed(known: dict[str, str], contents: dict[str, str]) -> str | None:
    return next((what for what in contents if known.get(what) != contents[what]), None)
