"""The front door of a search: `run_search` for a task, `search` for Python."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from torch import nn

from autocompress.candidates.feasibility import Feasibility
from autocompress.candidates.forecast import Forecast
from autocompress.controller.conclude import conclude
from autocompress.controller.findings import Findings, TakenOver
from autocompress.controller.opening import ask_teacher, know_baseline, profile_device, propose
from autocompress.controller.rungs import Rungs
from autocompress.controller.warm_start import take_over
from autocompress.data import Data
from autocompress.data.sources import Splits, as_data
from autocompress.demo_size import of_fitting_size
from autocompress.devices.base import Device, identity
from autocompress.errors import AutocompressError, InfeasibleBudget, TooManyFailures, UsageError
from autocompress.failures import fix_and_resume
from autocompress.front import measured
from autocompress.ledger import Ledger
from autocompress.policy import Policy
from autocompress.preparation import TEACHER_WEIGHTS, UNFINISHED_TEACHER, contents, kept_teacher, load, prepare, train_demo_teacher
from autocompress.progress import Progress, SilentProgress, counting, make_progress
from autocompress.records import Budget, Outcome
from autocompress.references import OBJECT, require_name
from autocompress.report.figures import in_colour
from autocompress.report.page import figures, write_report
from autocompress.report.tables import frame
from autocompress.results import Entry, ProgressPoint, Results
from autocompress.run_folder import (
    PARETO,
    locked,
    network_warning,
    new_run,
    read_front,
    remember_own,
    require_space,
    write_atomically,
)
from autocompress.schedule import Clock
from autocompress.search_space import find_suggest, own_suggest, with_default_distillation
from autocompress.setting import Setting
from autocompress.signals import Attentive, stopped_by_signals
from autocompress.starting import forget_interrupted
from autocompress.study.database import (
    open_journal,
    read_journal,
    recording,
    require_own,
    require_same_contents,
    require_same_machine,
    require_same_subject,
)
from autocompress.study.journal import Journal
from autocompress.study.notes import Note
from autocompress.suggesters import LevelSuggester
from autocompress.task import TASK_FILE, Task, find_task, load_task
from autocompress.units import counted, format_duration, format_size

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from plotly.graph_objects import Figure

    from autocompress.deploy import Exported

DEMO_TEACHER_SHARE = 0.4
"""Of the time that is left, at most: a quick machine trains it to the end in less, and all else is worthless on a slow
one where it has not learned."""


@dataclass(frozen=True)
class SearchResult:
    """What a search found; `content` is RUN/front.json."""

    run: Path
    content: dict[str, Any]

    @classmethod
    def load(cls, run: Path | str) -> SearchResult:
        """Read the result of a run folder."""
        return cls(Path(run), read_front(Path(run)))

    @property
    def best(self) -> str | None:
        """Id of the best policy within the budget, the last of the front: see `Results`."""
        return self.content["best"]

    @property
    def front(self) -> list[Policy]:
        """The policies of the Pareto front, fastest first."""
        return [Policy.model_validate(entry["policy"]) for entry in self.content["front"]]

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The same policies, with what was measured of each."""
        return Results.read(self.content).front

    def frame(self) -> pd.DataFrame:
        """One row a measured policy."""
        return frame(Results.read(self.content))

    def plot(self, path: Path | str | None = None) -> Path:
        """Draw the Pareto plot as PNG; into the run folder unless told where."""
        from autocompress.report.plots import pareto_png

        target = Path(path) if path is not None else self.run / PARETO
        pareto_png(Results.read(self.content), target)
        return target

    def figures(self) -> dict[str, Figure]:
        """The interactive plots of the report: `pareto`, `progress`, `prediction`, and the layers of each policy shown, by its id."""
        from plotly.graph_objects import Figure

        return {name: Figure(in_colour(figure)) for name, figure in figures(Results.read(self.content)).items()}

    def export(
        self,
        out: Path | str,
        *,
        pick: str = "best",
        formats: str | Sequence[str] = ("onnx",),
        model: nn.Module | str | None = None,
        student: str | None = None,
        device: str | None = None,
    ) -> Exported:
        """Write the bundle of one policy and measure it again: see `autocompress export`."""
        from autocompress.deploy import export_run

        return export_run(self.run, pick=pick, formats=formats, out=Path(out), model=model, student=student, device=device)


def search(
    model: nn.Module | str | None = None,
    data: Data | Splits | str | None = None,
    *,
    budget: str | Sequence[str] = (),
    out: Path | str | None = None,
    device: str | None = None,
    batch: int | None = None,
    search_time: str | None = None,
    trials: int | None = None,
    target_accuracy: float | None = None,
    space: str | None = None,
    suggest: Callable[..., Policy] | None = None,
    student: str | None = None,
    weights: Path | str | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    task_file: Path | str | None = None,
    from_run: Path | str | None = None,
    resume: bool = False,
    sampler: BaseSampler | None = None,
    quiet: bool = False,
) -> SearchResult:
    """Search the compressed models of `model` that meet `budget`, as `autocompress search` does; without a model, of the demonstration.

    What is not given is as in the task file, or as in the search that is resumed or learned from, else as usual (see `autocompress search
    --help`).

    Args:
        model: a module (never changed) or a reference such as `"torchvision:resnet18"`.
        data: `autocompress.Data`, (train, val, test) of (inputs, targets), or a reference such as `"imagefolder:DIR"`.
        budget: `"10ms"`, `"0.5x"`, `"4MB"`, `"p95=10ms"`, or several; empty for the whole front.
        batch: inputs a call of the deployed model; 1, of the demonstration 32.
        search_time: how long all of it may take; `"30m"`, of the demonstration `"4m"`.
        out: the run folder; by default a new one, named by the time.
        suggest: draws a policy instead of a named space: `suggest(trial)`, or `suggest(trial, graph)` with the groups, blocks and layers of
            the model (`Graph.groups`, `.blocks`, `.layers`). Of an Optuna trial only `suggest_int`, `suggest_float` and
            `suggest_categorical` may be used: most draws are not trials of the study. A search that began with a function is resumed with
            one of the same name.
        sampler: any Optuna sampler that handles two objectives.
        task_file: a TOML file that says what is not said here.
        from_run: folder of another search of the same model and data, to begin with what it has learned.
        resume: go on with the search in `out`; what it had as an object of Python must be given again.
        quiet: show no progress on stderr.

    Raises the errors of `autocompress.errors`; InfeasibleBudget when nothing meets the budget.
    """
    _require(model, (nn.Module, str, NoneType), "a model must be a torch.nn.Module or a reference", "give model(), or file.py:function")
    _require(budget, (str, tuple, list), "a budget must be text, or several", 'for example budget="10ms"; leave it out for the whole front')
    _require(student, (str, NoneType), "a student must be a reference", 'student="file.py:function", so that its policies name it')
    _require(space, (str, NoneType), "a space must be a name or a TOML file", "give a function that draws policies as suggest=")
    if space is not None and suggest is not None:
        raise UsageError(f"policies are drawn from a space or by a function, but got both {space!r} and suggest", hint="leave one out")
    if data is not None and not isinstance(data, str):
        data = as_data(data, "data")
    values = {
        "budget": (budget,) if isinstance(budget, str) else tuple(budget),
        "model": _named(model),
        "data": _named(data),
        "weights": str(weights) if weights is not None else None,
        "device": device,
        "batch": batch,
        "search_time": search_time,
        "trials": trials,
        "target_accuracy": target_accuracy,
        "space": space if suggest is None else _named(suggest),
        "student": student,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "seed": seed,
        "from_run": str(from_run) if from_run is not None else None,
    }
    folders = {"out": Path(out) if out is not None else None, "from_run": Path(from_run) if from_run is not None else None}
    task, run = find_task(Path(task_file) if task_file is not None else None, values, **folders, resume=resume), folders["out"] or new_run()
    with make_progress(quiet) as progress:
        return run_search(
            task,
            run,
            resume=resume,
            progress=progress,
            sampler=sampler,
            suggest=suggest,
            model=model if isinstance(model, nn.Module) else None,
            data=data if isinstance(data, Data) else None,
        )


def _named(given: nn.Module | Data | Callable[..., Policy] | str | None) -> str | None:
    """How a task file names what was given: a reference by itself, a function of Python by its name, another object by its class."""
    if given is None or isinstance(given, str):
        return given
    return f"{OBJECT}{getattr(given, '__name__', type(given).__name__)}"


def _require(given: object, kinds: type | tuple[type, ...], what: str, hint: str) -> None:
    if not isinstance(given, kinds):
        raise UsageError(f"{what}, but got {type(given).__name__}", hint=hint)


def run_search(
    task: Task,
    run: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    model: nn.Module | None = None,
    data: Data | None = None,
    device: Device | None = None,
    sampler: BaseSampler | None = None,
    suggest: Callable[..., Policy] | None = None,
) -> SearchResult:
    """Run one search in the folder `run` and return what it found; what is finished survives any interruption."""
    clock, task, run = Clock.start(task.search_seconds), task.absolute(), run.absolute()  # whatever folder the user's code changes to
    if task.from_run is not None and Path(task.from_run) == run:
        raise UsageError(f"a search cannot learn from itself: {str(run)!r}", hint="choose another --out, or go on with --resume")
    if suggest is None:
        require_name(task.space)
    require_own(run, resume=resume)
    fresh = not run.exists()
    with locked(run), stopped_by_signals() as stop, recording(run):
        told = Attentive(progress or SilentProgress(), stop)
        with _leaving_nothing(run, fresh=fresh):
            if task.is_demo and not resume:
                told.message("choosing the demonstration's network")
            task = of_fitting_size(task, run if resume else task.from_run, device)
            journal = open_journal(run, task, resume=resume, sampler=sampler)
            told.message(f"searching in {run}")
            if not resume:
                _forget_teacher(run)
                _keep_task(task, run)
            elapsed_s, spent_s = _taken_before(task, run, journal)
            clock = Clock.start(task.search_seconds, already=clock.elapsed + elapsed_s)
            known = _known_before(task, journal, run, told)
            setting = _prepared(task, run, journal, known, Ledger(spent_s), told, model=model, data=data, device=device)
        if resume:  # only now: a resume that is refused changes nothing
            _keep_task(task, run)
        findings = _assemble(task, run, setting, journal, clock, told, suggest)
        try:
            _phases(findings, known)
        finally:
            _finish(findings)
    return _result(findings)


@contextmanager
def _leaving_nothing(run: Path, *, fresh: bool) -> Iterator[None]:
    """A search that cannot begin leaves no folder behind where there was none."""
    try:
        yield
    except BaseException:
        if fresh:
            shutil.rmtree(run, ignore_errors=True)
        raise


def _prepared(task: Task, run: Path, journal: Journal, known: Journal | None, ledger: Ledger, progress: Progress, **given: Any) -> Setting:
    """What the task names, or is `given`, loaded, exported and measured.

    Raises UsageError where that is something else than what the search that is resumed, or the one that is learned from, had.
    """
    with ledger.spend("prepare"):
        loaded = load(task, weights=kept_teacher(task, run, begun=journal.has_begun), tick=counting(progress), **given)
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


def _taken_before(task: Task, run: Path, journal: Journal) -> tuple[float, dict[str, float]]:
    """Seconds that earlier sessions of this search took, and for what; none of a demonstration that had not trained its teacher.

    That begins again when the search is resumed, and in the time that is left it would not learn enough to be worth compressing.
    """
    began_only = task.is_demo and not journal.has_begun and kept_teacher(task, run, begun=False) is None
    return (0.0, {}) if began_only else (journal.noted(Note.ELAPSED_S) or 0.0, journal.noted(Note.SPENT_S) or {})


def _forget_teacher(run: Path) -> None:
    """Remove the weights of the demonstration where another search of it had begun; any other file of that name is not ours."""
    begun = run / TASK_FILE
    with suppress(AutocompressError):
        if begun.is_file() and load_task(begun, {}).is_demo:
            for name in (TEACHER_WEIGHTS, UNFINISHED_TEACHER):
                (run / name).unlink(missing_ok=True)


def _known_before(task: Task, journal: Journal, run: Path, progress: Progress) -> Journal | None:
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


def _assemble(
    task: Task, run: Path, setting: Setting, journal: Journal, clock: Clock, progress: Progress, suggest: Callable[..., Policy] | None
) -> Findings:
    graph, profile = setting.graphs[task.student], setting.device.profile
    if suggest is not None:
        named = own_suggest(suggest, "`suggest`", profile, graph)
    else:
        named = find_suggest(task.space, graph, profile, reference=task.student)
    forecast = Forecast.start(setting, named, task.limits)
    history = [ProgressPoint.model_validate(point) for point in journal.noted(Note.PROGRESS) or []]
    return Findings(task, run, journal, forecast, clock, progress, history)


def _phases(findings: Findings, known: Journal | None) -> None:
    """All of a search, from what is known, by another one too, to what is reported."""
    _recall(findings)
    profile_device(findings)
    pool = propose(findings)
    if findings.task.is_demo:
        _train_demo_teacher(findings)
    know_baseline(findings)
    ask_teacher(findings)
    if known is not None and findings.task.from_run is not None:
        take_over(findings, known, Path(findings.task.from_run))
    rungs = Rungs(findings)
    if not rungs.is_at_full_rung:
        rungs.appraise(pool)
        rungs.short_rung(pool)
    rungs.full_rung()
    conclude(findings)
    forget_interrupted(findings.setting)


def _recall(findings: Findings) -> None:
    """Take up what a resumed search knew; where nothing is within the budget yet, refuse one that is out of reach."""
    findings.recall()
    lost = findings.journal.retire_lost_trials()
    if lost:
        findings.progress.message(f"{counted(lost, 'interrupted trial')} will be repeated")
    if failed := findings.retry_failures():
        findings.progress.message(f"what made {counted(failed, 'policy', 'policies')} fail may be tried again")
        findings.look_for_best()
    findings.leave_killers()
    if findings.best is None:
        Feasibility(findings.forecast).require_hope()


def _train_demo_teacher(findings: Findings) -> None:
    """The demonstration's original learns only now, when the budget is known to be within reach."""
    if kept_teacher(findings.task, findings.run, begun=findings.journal.has_begun) is not None:
        return
    tick = findings.percent("training the demonstration teacher")
    seconds = DEMO_TEACHER_SHARE * findings.clock.left
    findings.setting = train_demo_teacher(findings.setting, findings.run, seconds, tick)
    findings.record_baseline(findings.setting.baseline)


def _finish(findings: Findings) -> None:
    """Write what there is, however the search ended."""
    findings.journal.retire_lost_trials()
    findings.note_time()
    findings.write_front()
    write_report(findings.results(), findings.run)


def _result(findings: Findings) -> SearchResult:
    result = SearchResult.load(findings.run)
    points, failures = result.content["points"], result.content["failures"]
    if failures and not points:
        raise TooManyFailures(
            f"no policy became a file that works; the first failed to {failures[0]['stage']}: {failures[0]['reason']}",
            hint=fix_and_resume(findings.setting.log),
        )
    run = shlex.quote(str(findings.run))
    if not points and not findings.task.budget:
        raise InfeasibleBudget(
            "the search ended before any policy could be measured",
            hint=f"search longer: --resume --out {run} --search-time ...",
            smallest_latency_s=float("nan"),
        )
    if not any(point["feasible"] for point in points):
        fastest = min((e["latency_s"]["high"] for e in points), default=float("nan"))
        told = _nearest(findings) if points else "no policy could be measured in time"
        trained = any(point["rung"] != "unchanged" for point in points)
        raise InfeasibleBudget(
            f"the search ended {'' if trained else 'before any policy was trained '}and nothing meets the budget "
            f"({findings.budget.in_words()}): {told}",
            hint=f"search longer (--resume --out {run} --search-time ...), or allow more: --from {run} begins with what was learned",
            smallest_latency_s=fastest,
        )
    return result


def _nearest(findings: Findings) -> str:
    """What missed the budget by least, in words."""

    def miss(outcome: Outcome) -> float:
        latency, original = outcome.latency_s, findings.setting.baseline.latency_s
        assert latency is not None
        limits = findings.limits.against(latency.original_s or original.median)
        return limits.violation(latency.high, outcome.size_bytes, latency.tail)

    nearest = min(measured(findings.outcomes()), key=miss)
    assert nearest.latency_s is not None
    return f"the nearest policy took {format_duration(nearest.latency_s.high)} and {format_size(nearest.size_bytes)}"


def dry_run(task: Task, progress: Progress) -> dict[str, Any]:
    """What a search would do, without doing it: sizes of the space, budget, time, three policies in words."""
    task = of_fitting_size(task, task.from_run)
    found = task.absolute()
    loaded = load(found, tick=counting(progress))
    graph, data = loaded.graphs[task.student], loaded.data
    suggest = find_suggest(found.space, graph, loaded.device.profile, reference=task.student)
    generator = np.random.default_rng(task.seed)
    drawn = LevelSuggester(generator)
    suggest(drawn)
    policies = [with_default_distillation(suggest)(LevelSuggester(generator)) for _ in range(3)]
    return {
        "task": task.model_dump(mode="json"),
        "budget": Budget.parse(task.budget).in_words() if task.budget else "none",
        "search_time_s": task.search_seconds,
        "dimensions": len(drawn.params),
        "groups": len(graph.groups),
        "blocks": len(graph.blocks),
        "layers": len(graph.layers),
        "frozen": len(graph.frozen),
        "first_policies": [policy.in_words() for policy in policies],
        "train": len(data.train),
        "val": len(data.val),
        "test": len(data.test),
    } | ({"notes": list(loaded.notes)} if loaded.notes else {})
