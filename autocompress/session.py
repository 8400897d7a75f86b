"""The front door of a search, and what comes out of it: `search` for Python, `run_search` for a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import nn

from autocompress.controller.run import Given, conduct
from autocompress.data import Data
from autocompress.data.sources import Splits, as_data
from autocompress.devices.base import Device
from autocompress.errors import InfeasibleBudget, UsageError
from autocompress.policy import Policy
from autocompress.references import name_of
from autocompress.report.figures import in_colour
from autocompress.report.page import figures, write_report
from autocompress.report.tables import frame, note
from autocompress.results import Entry, Results
from autocompress.system.progress import Progress, make_progress
from autocompress.system.run_folder import PARETO, REPORT, new_run, read_front
from autocompress.task import Task, find_task

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from plotly.graph_objects import Figure

    from autocompress.commands.deploy import Exported


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

    def report(self) -> Path:
        """Write `report.html`, one offline file, and `pareto.png` into the run folder, as a search does when it ends."""
        write_report(Results.read(self.content), self.run)
        return self.run / REPORT

    def figures(self) -> dict[str, Figure]:
        """The interactive plots of the report: `pareto`, `progress`, `prediction`, and the layers of each policy shown, by its id."""
        from plotly.graph_objects import Figure

        return {name: Figure(in_colour(figure)) for name, figure in figures(Results.read(self.content)).items()}

    def explain(self, pick: str = "best") -> pd.DataFrame:
        """One row a layer: channels, bits, predicted seconds before and after what a policy does to it, and why it is not faster."""
        entry = Results.read(self.content).pick(pick)
        return pd.DataFrame([layer.model_dump(mode="json") | {"note": note(layer)} for layer in entry.layers])

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
        from autocompress.commands.deploy import export_run

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
        "model": name_of(model) if model is not None else None,
        "data": name_of(data) if data is not None else None,
        "weights": str(weights) if weights is not None else None,
        "device": device,
        "batch": batch,
        "search_time": search_time,
        "trials": trials,
        "target_accuracy": target_accuracy,
        "space": space if suggest is None else name_of(suggest),
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
    run = run.absolute()  # whatever folder the user's code changes to
    try:
        conduct(task, run, Given(model, data, device, sampler, suggest), resume=resume, progress=progress)
    except InfeasibleBudget as error:
        error.run = run
        raise
    return SearchResult.load(run)


def _require(given: object, kinds: type | tuple[type, ...], what: str, hint: str) -> None:
    if not isinstance(given, kinds):
        raise UsageError(f"{what}, but got {type(given).__name__}", hint=hint)
