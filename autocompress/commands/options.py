"""Arguments and options of the command line: their names, limits and help."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from autocompress.commands.terminal import emit
from autocompress.references import DEFAULT_DEVICE
from autocompress.system.run_folder import FRONT

MODEL, LIMITS, OUTPUT = "Model and data", "Limits", "Output"

_REFERENCE = "torchvision:resnet18, timm:NAME (?pretrained=true), transformers:FOLDER, package.module:function or file.py:function"


def _run_of(path: Path) -> Path:
    """The run that a path means: its folder, or the file of results in it."""
    return path.parent if path.name == FRONT else path


def _tell_version(is_asked: bool) -> None:
    if is_asked:
        emit(f"autocompress {metadata.version('autocompress')}")
        raise typer.Exit


RunFolder = Annotated[Path, typer.Argument(metavar="RUN", callback=_run_of, help="Folder of a search.")]
Reference = Annotated[str, typer.Argument(metavar="REF", help=f"{_REFERENCE}.")]
FileOrReference = Annotated[str, typer.Argument(metavar="FILE|REF", help=f"An ONNX file, or {_REFERENCE}.")]
PolicyId = Annotated[str, typer.Argument(metavar="ID", help="Id of a policy, or best.")]
TaskFile = Annotated[Path | None, typer.Argument(metavar="TASK.toml", help="A task file; options win over what it says.")]

Model = Annotated[str | None, typer.Option("--model", rich_help_panel=MODEL, help=f"{_REFERENCE}.; else the demonstration")]
Weights = Annotated[Path | None, typer.Option("--weights", rich_help_panel=MODEL, help="Of the model: safetensors or a state dict.")]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        rich_help_panel=MODEL,
        help="digits, torchvision:CIFAR10?root=DIR, imagefolder:DIR or file.py:function.",
    ),
]
Input = Annotated[
    str | None,
    typer.Option(
        "--input",
        metavar="SHAPE",
        rich_help_panel=MODEL,
        help="Without --data, of each input: 3x224x224; ids=9:int64,mask=9:int64.",
    ),
]
DeviceNames = Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Devices to ask what they are; see the README.")]
Device = Annotated[str, typer.Option("--device", rich_help_panel=MODEL, help="What to measure on; see `autocompress devices`.")]
Devices = Annotated[
    list[str] | None,
    typer.Option("--device", rich_help_panel=MODEL, help=f"What to measure on; several are compared. Default: {DEFAULT_DEVICE}."),
]
OwnDevice = Annotated[
    str | None,
    typer.Option("--device", rich_help_panel=MODEL, help=f"What to measure on. Default: {DEFAULT_DEVICE}."),
]
InspectedOn = Annotated[
    str | None,
    typer.Option("--device", rich_help_panel=MODEL, help="Measure operators there, each by itself; see `autocompress devices`."),
]
Batch = Annotated[int, typer.Option("--batch", min=1, rich_help_panel=MODEL, help="Inputs a call.")]
OwnBatch = Annotated[
    int | None,
    typer.Option("--batch", min=1, rich_help_panel=MODEL, help="Inputs a call of the deployed model. Default: 1."),
]
Student = Annotated[str | None, typer.Option("--student", rich_help_panel=MODEL, help="Another architecture to derive students from.")]
Space = Annotated[
    str | None,
    typer.Option("--space", rich_help_panel=MODEL, help="Search space: a shipped name, a TOML file or file.py:function."),
]
LearningRate = Annotated[
    float | None, typer.Option("--learning-rate", rich_help_panel=MODEL, help="Scales the rates of student training; 0.1 is usual.")
]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, rich_help_panel=MODEL, help="Examples a step of training. Default: 128."),
]

Budgets = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        "-b",
        rich_help_panel=LIMITS,
        help="10ms, 500us, 0.5x (of the baseline), 4MB, p95=10ms; may be repeated.",
    ),
]
SearchTime = Annotated[str | None, typer.Option("--search-time", rich_help_panel=LIMITS, help="How long to search, e.g. 30m.")]
Trials = Annotated[
    int | None,
    typer.Option(
        "--trials",
        min=1,
        rich_help_panel=LIMITS,
        help="Train this many policies briefly at most; the best still train to the end.",
    ),
]
TargetAccuracy = Annotated[
    float | None,
    typer.Option(
        "--target-accuracy",
        rich_help_panel=LIMITS,
        help="Stop once validation reaches this within the budget (accuracy: 0 to 1).",
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, rich_help_panel=LIMITS, help="Of sampler, weights and data order.")]
MeasureTime = Annotated[str, typer.Option("--time", rich_help_panel=LIMITS, help="How long to measure.")]

Out = Annotated[Path, typer.Option("--out", rich_help_panel=OUTPUT, help="Folder to write.")]
NewRun = Annotated[Path | None, typer.Option("--out", rich_help_panel=OUTPUT, help="Run folder. Default: run-DATE-TIME.")]
FromRun = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="RUN",
        callback=lambda path: _run_of(path) if path is not None else None,
        rich_help_panel=OUTPUT,
        help="Begin with what another search has learned: for another budget or device.",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", rich_help_panel=OUTPUT, help="Continue the search in --out.")]
DryRun = Annotated[bool, typer.Option("--dry-run", rich_help_panel=OUTPUT, help="Say what would be searched, and stop.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", rich_help_panel=OUTPUT, help="Show no progress.")]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", rich_help_panel=OUTPUT, help="Write a picture of the network, too.")]
Json = Annotated[bool, typer.Option("--json", rich_help_panel=OUTPUT, help="Print JSON instead of text.")]
Open = Annotated[bool, typer.Option("--open", help="Open it in the browser.")]
Pick = Annotated[str, typer.Option("--pick", help="best, or the id of a policy.")]
Formats = Annotated[
    list[str] | None, typer.Option("--format", help="onnx (default), openvino, torch; several times, or several with commas.")
]
Teacher = Annotated[
    str | None, typer.Option("--model", metavar="REF", help="The run's model, for --format torch where it is a function of yours.")
]
StudentSource = Annotated[
    str | None, typer.Option("--student", metavar="REF", help="The architecture of students, where it is a function of yours.")
]
ExportDevice = Annotated[str | None, typer.Option("--device", help="What to measure the file on. Default: that of the search.")]
PolicyFile = Annotated[str, typer.Option("--policy", metavar="FILE|random:SEED", help="A policy file, or one drawn from the space.")]
Version = Annotated[bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Say which version this is.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error. May stand anywhere.")]

Pack = Annotated[
    Path | None,
    typer.Option("--pack", metavar="FILE", help="Write the agent as one file for another device: it needs Python, numpy and onnxruntime."),
]
Host = Annotated[str, typer.Option("--host", help="To listen on; 0.0.0.0 for all networks. The default is reached by `ssh -L` only.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="To listen on.")]
MostMb = Annotated[int, typer.Option("--most-mb", min=1, help="Of one file that is sent.")]
MostMemoryMb = Annotated[int, typer.Option("--most-memory-mb", min=1, help="Of a process of the runtime.")]
TokenFile = Annotated[Path, typer.Option("--token-file", help="Of the token that whoever asks must know; made where it is not there.")]
