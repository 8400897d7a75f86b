"""One search from its first line to its last: what it is given, its phases in order, and what is written however it ends."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from autocompress.candidates.forecast import Forecast
from autocompress.controller.conclude import conclude
from autocompress.controller.findings import Findings
from autocompress.controller.opening import ask_teacher, know_baseline, learn_latencies, propose, train_teacher_of_demo
from autocompress.controller.resuming import forget_teacher, known_before, take_up, taken_before
from autocompress.controller.rungs import Rungs
from autocompress.controller.verdict import require_found
from autocompress.controller.warm_start import take_over
from autocompress.data import Data
from autocompress.devices.base import Device, identity
from autocompress.errors import UsageError
from autocompress.policy import Policy
from autocompress.references import require_name
from autocompress.report.page import write_report
from autocompress.results import ProgressPoint, Results
from autocompress.schedule import Clock
from autocompress.search_space import own_suggest, suggest_of
from autocompress.setup.demo_size import of_fitting_size
from autocompress.setup.ledger import Ledger
from autocompress.setup.loading import contents, kept_teacher, load
from autocompress.setup.setting import Setting
from autocompress.study.database import (
    open_journal,
    recording,
    require_own,
    require_same_contents,
    require_same_machine,
    require_same_subject,
)
from autocompress.study.journal import Journal
from autocompress.study.notes import Note
from autocompress.system.progress import Progress, SilentProgress, counting
from autocompress.system.run_folder import locked, network_warning, remember_own, require_space, write_atomically
from autocompress.system.signals import Attentive, stopped_by_signals
from autocompress.task import TASK_FILE, Task
from autocompress.trial.preparation import prepare
from autocompress.trial.starting import forget_interrupted

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


@dataclass(frozen=True)
class Given:
    """What is handed over as an object; None: as the task names it."""

    model: nn.Module | None = None
    data: Data | None = None
    device: Device | None = None
    sampler: BaseSampler | None = None
    suggest: Callable[..., Policy] | None = None


def conduct(task: Task, run: Path, given: Given, *, resume: bool = False, progress: Progress | None = None) -> None:
    """Run one search in the folder `run`; what is finished survives any interruption. Raises unless something meets the budget."""
    clock, task, run = Clock.start(task.search_seconds), task.absolute(), run.absolute()  # whatever folder the user's code changes to
    if task.from_run is not None and Path(task.from_run).resolve() == run.resolve():
        raise UsageError(f"a search cannot learn from itself: {str(run)!r}", hint="choose another --out, or go on with --resume")
    if given.suggest is None:
        require_name(task.space)
    require_own(run, resume=resume)
    fresh = not run.exists()
    with locked(run), stopped_by_signals() as stop, recording(run):
        told = Attentive(progress or SilentProgress(), stop)
        with _leaving_nothing(run, fresh=fresh):
            if task.is_demo and not resume:
                told.message("choosing the demonstration's network")
            task = of_fitting_size(task, run if resume else task.from_run, given.device)
            journal = open_journal(run, task, resume=resume, sampler=given.sampler)
            told.message(f"searching in {run}")
            if not resume:
                forget_teacher(run)
                _keep_task(task, run)
            elapsed_s, spent_s = taken_before(task, run, journal)
            clock = Clock.start(task.search_seconds, already=clock.elapsed + elapsed_s)
            known = known_before(task, journal, run, told)
            setting = _prepared(task, run, journal, known, Ledger(spent_s), told, given)
        if resume:  # only now: a resume that is refused changes nothing
            _keep_task(task, run)
        findings = _assemble(task, run, setting, journal, clock, told, given.suggest)
        try:
            _phases(findings, known)
        finally:
            setting.device.say = Device.say
            results = _finish(findings)
    require_found(findings, results)


@contextmanager
def _leaving_nothing(run: Path, *, fresh: bool) -> Iterator[None]:
    """A search that cannot begin leaves no folder behind where there was none."""
    try:
        yield
    except BaseException:
        if fresh:
            shutil.rmtree(run, ignore_errors=True)
        raise


def _prepared(task: Task, run: Path, journal: Journal, known: Journal | None, ledger: Ledger, progress: Progress, given: Given) -> Setting:
    """What the task names, or is given, loaded, exported and measured.

    Raises UsageError where that is something else than what the search that is resumed, or the one that is learned from, had.
    """
    with ledger.spend("prepare"):
        weights = kept_teacher(task, run, begun=journal.has_begun)
        loaded = load(task, model=given.model, data=given.data, device=given.device, weights=weights, tick=counting(progress))
        loaded.device.say = progress.message
        for note in loaded.notes:
            progress.message(note)
        found = contents(task, loaded)
        require_same_contents(journal, run, found)
        require_same_machine(journal, run, identity(loaded.device.environment()))
        if known is not None:
            require_same_subject(known, Path(task.from_run or ""), found)
        setting = replace(prepare(task, run, loaded), ledger=ledger)
    if (told := journal.noted(Note.CALIBRATION_INPUTS)) is None:
        journal.note(Note.CALIBRATION_INPUTS, setting.calibration_inputs)
    for warning in (require_space(run, setting.baseline.size_bytes, begun=told is not None), network_warning(run)):
        if warning:
            progress.message(warning)
    return replace(setting, calibration_inputs=told or setting.calibration_inputs)


def _keep_task(task: Task, run: Path) -> None:
    """Write what was asked for, and remember that it was this user who did."""
    write_atomically(run / TASK_FILE, task.to_toml())
    remember_own(run / TASK_FILE)


def _assemble(
    task: Task, run: Path, setting: Setting, journal: Journal, clock: Clock, progress: Progress, suggest: Callable[..., Policy] | None
) -> Findings:
    profile = setting.device.profile
    if suggest is not None:
        named = own_suggest(suggest, "`suggest`", profile, setting.graphs[task.student])
    else:
        named = suggest_of(task, setting.graphs, profile)
    forecast = Forecast.start(setting, named, task.limits)
    history = [ProgressPoint.model_validate(point) for point in journal.noted(Note.PROGRESS) or []]
    return Findings(task, run, journal, forecast, clock, progress, history)


def _phases(findings: Findings, known: Journal | None) -> None:
    """All of a search, from what is known, by another one too, to what is reported."""
    take_up(findings)
    rungs = Rungs(findings)
    goes_on = rungs.is_at_full_rung  # then only what is trained to the end is still to be predicted
    learn_latencies(findings, ahead=not goes_on)
    pool = propose(findings) if not goes_on else []
    if findings.task.is_demo:
        train_teacher_of_demo(findings)
    know_baseline(findings)
    ask_teacher(findings)
    if known is not None and findings.task.from_run is not None:
        take_over(findings, known, Path(findings.task.from_run))
    if not goes_on:
        rungs.appraise(pool)
        rungs.short_rung(pool)
    rungs.full_rung()
    conclude(findings)
    forget_interrupted(findings.setting, [o.policy for o in findings.journal.outcomes if o.failure is not None])


def _finish(findings: Findings) -> Results:
    """Write what there is, however the search ended."""
    findings.journal.retire_lost_trials()
    findings.note_time()
    findings.note_untrained()
    results = findings.save()
    write_report(results, findings.run)
    return results
