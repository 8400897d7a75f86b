"""What a search finds of earlier ones: of itself before it was interrupted, and of another that it learns from."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from autocompress.candidates.feasibility import Feasibility
from autocompress.controller.findings import Findings
from autocompress.controller.recovery import forget_damaged, leave_killers, retry_failures
from autocompress.errors import AutocompressError, UsageError
from autocompress.records import TakenOver
from autocompress.setup.loading import TEACHER_WEIGHTS, UNFINISHED_TEACHER, kept_teacher
from autocompress.study.database import read_journal
from autocompress.study.journal import Journal
from autocompress.study.notes import Note
from autocompress.system.progress import Progress
from autocompress.system.run_folder import write_atomically
from autocompress.task import TASK_FILE, Task, load_task
from autocompress.units import counted


def taken_before(task: Task, run: Path, journal: Journal) -> tuple[float, dict[str, float]]:
    """Seconds that earlier sessions of this search took, and for what; none of a demonstration that had not trained its teacher.

    That begins again when the search is resumed, and in the time that is left it would not learn enough to be worth compressing.
    """
    began_only = task.is_demo and not journal.has_begun and kept_teacher(task, run, begun=False) is None
    return (0.0, {}) if began_only else (journal.noted(Note.ELAPSED_S) or 0.0, journal.noted(Note.SPENT_S) or {})


def known_before(task: Task, journal: Journal, run: Path, progress: Progress) -> Journal | None:
    """The journal of the search that this one is to learn from, unless it has done so; with the demonstration's teacher."""
    if task.from_run is None or TakenOver.model_validate(journal.noted(Note.TAKEN_OVER) or {}).complete:
        return None
    before = Path(task.from_run)
    if journal.noted(Note.CONTENTS) is not None and not before.is_dir():
        progress.message(f"{before} is gone: the search goes on with what it had taken over")
        return None
    known = read_journal(before, task)
    if task.is_demo and not (run / TEACHER_WEIGHTS).is_file():
        if not (before / TEACHER_WEIGHTS).is_file():
            raise UsageError(
                f"{str(before)!r} holds no teacher of the demonstration that was trained to the end",
                hint="leave --from out, or search longer",
            )
        write_atomically(run / TEACHER_WEIGHTS, (before / TEACHER_WEIGHTS).read_bytes())
    return known


def take_up(findings: Findings) -> None:
    """Take up what a resumed search knew; where nothing is within the budget yet, refuse one that is out of reach."""
    findings.recall()
    lost = findings.journal.retire_lost_trials()
    if lost:
        findings.progress.message(f"{counted(lost, 'interrupted trial')} will be repeated")
    if failed := retry_failures(findings):
        findings.progress.message(f"what made {counted(failed, 'policy', 'policies')} fail may be tried again")
        findings.look_for_best()
    if damaged := forget_damaged(findings):
        words = counted(len(damaged), "policy", "policies")
        findings.progress.message(f"the files of {words} ({', '.join(damaged)}) are no longer what was measured: they are left out")
        findings.look_for_best()
    leave_killers(findings)
    if findings.best is None:
        Feasibility(findings.forecast).require_hope()


def forget_teacher(run: Path) -> None:
    """Remove the weights of the demonstration where another search of it had begun; any other file of that name is not ours."""
    begun = run / TASK_FILE
    with suppress(AutocompressError):
        if begun.is_file() and load_task(begun, {}).is_demo:
            for name in (TEACHER_WEIGHTS, UNFINISHED_TEACHER):
                (run / name).unlink(missing_ok=True)
