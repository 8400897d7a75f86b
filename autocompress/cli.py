"""The command line: parses, calls one function, prints. Heavy imports happen inside the commands.

Results go to stdout, everything else to stderr. Exit codes are those of `autocompress.errors`; 130 after Ctrl-C.
"""

from __future__ import annotations

import errno
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from autocompress.commands import options
from autocompress.commands.terminal import aside, complain, emit, emit_json, emit_record, report_error, terminal_width
from autocompress.errors import AutocompressError, InfeasibleBudget, Interrupted, RunFolderError, Terminated, UsageError, one_line
from autocompress.references import AGENT_FILE_MB, AGENT_MEMORY_MB, AGENT_PORT, DEFAULT_DEVICE, require_formats
from autocompress.system.run_folder import FRONT, PARETO, REPORT, new_run, read_front, write_atomically

if TYPE_CHECKING:
    from autocompress.task import Task

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of a disk that is full or read-only, wherever they come from."""
UNREADABLE = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.EHOSTDOWN)
"""Of one that fails, or is on another machine and gone."""
INTERRUPTED = "interrupted by Ctrl-C"
ParseError: type[Exception] = typer.BadParameter.__mro__[1]
"""click's UsageError. Typer carries its own copy of click in some versions, so the class has no stable address."""

app = typer.Typer(
    name="autocompress",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find the most accurate compressed model within your latency budget, measured on the file you ship.",
    epilog="Start with: autocompress search --budget 10ms",
)


@app.callback()
def _global_options(debug: options.Debug = False, version: options.Version = False) -> None:
    """`--debug` is read by `main`, before anything is parsed."""


@app.command(epilog="Example: autocompress search --model torchvision:resnet18 --data imagefolder:photos --budget 0.5x")
def search(
    *,
    task_file: options.TaskFile = None,
    budget: options.Budgets = None,
    model: options.Model = None,
    weights: options.Weights = None,
    data: options.Data = None,
    device: options.OwnDevice = None,
    batch: options.OwnBatch = None,
    student: options.Student = None,
    space: options.Space = None,
    learning_rate: options.LearningRate = None,
    batch_size: options.BatchSize = None,
    search_time: options.SearchTime = None,
    trials: options.Trials = None,
    target_accuracy: options.TargetAccuracy = None,
    seed: options.Seed = None,
    out: options.NewRun = None,
    from_run: options.FromRun = None,
    resume: options.Resume = False,
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Search compressed models that meet a budget; without arguments, the embedded demonstration."""
    from autocompress.task import find_task

    overrides: dict[str, object] = {
        "budget": tuple(budget or ()), "model": model, "weights": str(weights) if weights else None, "data": data,
        "device": device, "batch": batch, "student": student, "space": space, "learning_rate": learning_rate,
        "batch_size": batch_size, "search_time": search_time, "trials": trials, "target_accuracy": target_accuracy, "seed": seed,
        "from_run": str(from_run) if from_run else None,
    }  # fmt: skip
    task = find_task(task_file, overrides, out=out, from_run=from_run, resume=resume)
    if dry_run:
        _dry_run(task, quiet=quiet, json=json)
    else:
        _search(task, out or new_run(), resume=resume, quiet=quiet, json=json)


def _dry_run(task: Task, *, quiet: bool, json: bool) -> None:
    from autocompress.commands.dry_run import dry_run
    from autocompress.system.progress import make_progress

    with aside(), make_progress(quiet) as progress:
        content = dry_run(task, progress)
    emit_json(content) if json else emit_record(content)


def _search(task: Task, run: Path, *, resume: bool, quiet: bool, json: bool) -> None:
    from autocompress.session import run_search
    from autocompress.system.progress import make_progress

    folder = run.absolute()  # the user's code may change to another one
    try:
        with aside(), make_progress(quiet) as progress:
            run_search(task, folder, resume=resume, progress=progress)
    except InfeasibleBudget:
        if not json and (folder / FRONT).is_file():
            _show(folder, json=False)
        raise
    except KeyboardInterrupt:
        raise Interrupted(INTERRUPTED, hint=_how_to_resume(run, folder)) from None
    except Terminated as ended:
        raise Terminated(ended.message, hint=_how_to_resume(run, folder)) from None
    _show(folder, json=json)
    if not json:
        emit(f"\nreport  {run / REPORT}\nexport  autocompress export {shlex.quote(str(run))} --out DIR")


def _how_to_resume(run: Path, folder: Path) -> str:
    """folder: where the run is, whatever the current one is by now."""
    from autocompress.task import TASK_FILE

    if not (folder / TASK_FILE).is_file():
        return ""
    return f"what is finished is kept; continue with: autocompress search --resume --out {shlex.quote(str(run))}"


@app.command()
def show(*, run: options.RunFolder, json: options.Json = False) -> None:
    """Show the front as a table, and what is best under the budget."""
    _show(run, json=json)


def _show(run: Path, *, json: bool) -> None:
    from autocompress.report.tables import front_table, legend, summary
    from autocompress.results import Results

    results = Results.load(run)
    if json:
        emit_json(read_front(run))
        return
    emit(front_table(results, terminal_width()))
    if told := legend(results, terminal_width()):
        emit(told)
    emit("\n" + summary(results, run))


@app.command()
def report(*, run: options.RunFolder, open_: options.Open = False, json: options.Json = False) -> None:
    """Write RUN/report.html (one offline file) and RUN/pareto.png."""
    from autocompress.report.page import write_report
    from autocompress.results import Results

    write_report(Results.load(run), run)
    page, picture = run / REPORT, run / PARETO
    emit_json({"report": str(page), "pareto": str(picture)}) if json else emit(f"{page}\n{picture}")
    if open_:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())


@app.command()
def export(
    *,
    run: options.RunFolder,
    out: options.Out,
    pick: options.Pick = "best",
    format_: options.Formats = None,
    model: options.Teacher = None,
    student: options.StudentSource = None,
    device: options.ExportDevice = None,
    json: options.Json = False,
) -> None:
    """Write one policy as the files that ship, checked and measured again."""
    formats = tuple(part.strip() for text in format_ or ["onnx"] for part in text.split(",") if part.strip())
    require_formats(formats)
    from autocompress.commands.deploy import export_run  # torch takes seconds, wrong formats are told at once

    with aside():
        exported = export_run(run, pick=pick, formats=formats, out=out, model=model, student=student, device=device)
    written = sorted(str(path) for path in exported.folder.iterdir() if path.is_file())
    if json:
        emit_json({"folder": str(exported.folder), "files": written, "within_budget": exported.within_budget,
                   "manifest": exported.manifest.model_dump(mode="json", by_alias=True)})  # fmt: skip
        return
    from autocompress.report.view import latency_line

    emit("\n".join(written))
    if exported.manifest.latency_s is not None:
        emit(f"latency {latency_line(exported.manifest.latency_s)}, measured on this file")
    if not exported.within_budget:
        complain(
            f"warning: this time the file was measured over the budget, on {exported.manifest.device}",
            "hint: measure again when the machine is quiet, or pick a faster policy",
        )


@app.command()
def measure(
    *,
    what: options.FileOrReference,
    device: options.Devices = None,
    weights: options.Weights = None,
    data: options.Data = None,
    input: options.Input = None,
    batch: options.OwnBatch = None,
    json: options.Json = False,
) -> None:
    """Measure the latency of an ONNX file or a model: median, interval, p95; on several devices in turns."""
    from autocompress.commands.measure import measure_on

    devices = device or [DEFAULT_DEVICE]
    with aside():
        found = measure_on(what, devices, weights=weights, data=data, input=input, batch=batch)
    measured = [{"device": name, "latency_s": latency.model_dump(mode="json")} for name, latency in zip(devices, found, strict=True)]
    if json:
        emit_json({"what": what} | (measured[0] if len(measured) == 1 else {"devices": measured}))
        return
    from autocompress.report.view import latency_line

    width = max(map(len, devices))
    for name, latency in zip(devices, found, strict=True):
        emit(latency_line(latency) if len(devices) == 1 else f"{name:{width}}  {latency_line(latency)}")


@app.command()
def calibrate(
    *,
    device: options.OwnDevice = None,
    model: options.Model = None,
    weights: options.Weights = None,
    data: options.Data = None,
    space: options.Space = None,
    batch: options.OwnBatch = None,
    time: options.MeasureTime = "60s",
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Build the device's latency table for a model's search space; prints its error on whole networks."""
    from autocompress.task import load_task
    from autocompress.units import parse_duration

    seconds = parse_duration(time)
    overrides: dict[str, object] = {"device": device, "model": model, "data": data, "space": space, "batch": batch}
    task = load_task(None, overrides | {"weights": str(weights) if weights else None})
    from autocompress.commands.calibrate import calibrate as measure_operators
    from autocompress.system.progress import make_progress

    with aside(), make_progress(quiet) as progress:
        content = measure_operators(task, seconds, progress)
    emit_json(content) if json else emit_record(content)


@app.command()
def inspect(
    *,
    model: options.Reference,
    weights: options.Weights = None,
    data: options.Data = None,
    input: options.Input = None,
    device: options.InspectedOn = None,
    html: options.Html = None,
    json: options.Json = False,
) -> None:
    """Show layers, channel groups and blocks of a model, what they cost, what cannot be compressed, and why."""
    page = html.absolute() if html is not None else None  # the user's code may change to another folder
    if page is not None and not page.parent.is_dir():
        raise UsageError(f"the folder of {str(html)!r} does not exist", hint="make it, or give --html another place")
    from autocompress.commands.inspect import inspect_model

    with aside():
        content = inspect_model(model, weights=weights, data=data, input=input, device=device)
    if page is not None:
        from autocompress.report.network import network_page

        write_atomically(page, network_page(content))
    emit_json(content) if json else emit_record({key: value for key, value in content.items() if key != "steps"})
    if html is not None:
        complain(f"picture {html}")


@app.command()
def explain(*, run: options.RunFolder, policy: options.PolicyId = "best", json: options.Json = False) -> None:
    """Show what a policy does to each layer, its predicted time before and after, and why it is not faster."""
    from autocompress.report.tables import layer_table, note
    from autocompress.results import Results

    entry = Results.load(run).pick(policy)
    if json:
        layers = [layer.model_dump(mode="json") | {"note": note(layer)} for layer in entry.layers]
        emit_json({"id": entry.id, "policy": entry.words, "speedup": entry.speedup, "layers": layers})
        return
    emit(f"{entry.id}: {entry.words}\n")
    emit(layer_table(entry))


@app.command()
def apply(
    *,
    model: options.Reference,
    policy: options.PolicyFile,
    out: options.Out,
    weights: options.Weights = None,
    data: options.Data = None,
    input: options.Input = None,
    batch: options.Batch = 1,
    device: options.Device = DEFAULT_DEVICE,
    student: options.StudentSource = None,
    space: options.Space = None,
    json: options.Json = False,
) -> None:
    """Apply one policy without a search: compress, export, check."""
    from autocompress.commands.apply import apply_policy

    with aside():
        content = apply_policy(
            model, policy=policy, weights=weights, data=data, input=input, batch=batch, device=device, out=out, student=student,
            space=space or "default",
        )  # fmt: skip
    emit_json(content) if json else emit_record(content)


@app.command()
def devices(*, names: options.DeviceNames = None, json: options.Json = False) -> None:
    """List the devices that can be measured here, or ask those that are named what they are."""
    from autocompress.devices import describe_device, list_devices

    if names:
        asked = [describe_device(name) for name in names]
        if json:
            emit_json({"devices": asked})
            return
        for device in asked:
            emit_record(device)
        return
    elsewhere = f"agent://HOST:{AGENT_PORT}, with agent.pyz running there, which `autocompress agent --pack agent.pyz` writes"
    content = {"devices": list_devices(), "elsewhere": elsewhere}
    emit_json(content) if json else emit_record(content)


@app.command(epilog="Example: autocompress agent --pack agent.pyz, copy it to the device, and there: python3 agent.pyz")
def agent(
    *,
    pack: options.Pack = None,
    host: options.Host = "127.0.0.1",
    port: options.Port = AGENT_PORT,
    token_file: options.TokenFile = Path("agent.token"),
    most_mb: options.MostMb = AGENT_FILE_MB,
    most_memory_mb: options.MostMemoryMb = AGENT_MEMORY_MB,
) -> None:
    """Let searches elsewhere measure on this device, or write what does that on another one."""
    if pack is not None:
        from autocompress.devices.pack import pack as write_agent

        write_agent(pack)
        there = f"ssh -t -L {AGENT_PORT}:localhost:{AGENT_PORT} HOST python3 {pack.name}"
        here = f"AUTOCOMPRESS_TOKEN_FILE=agent.token autocompress search --device agent://localhost:{AGENT_PORT}"
        emit(f"{pack}\ncopy it to HOST, and there (it makes agent.token): {there}\nhere, with a copy of agent.token: {here}")
        return
    from autocompress.devices.agent import Limits, listen

    listen(host, port, token_file, Limits(body=most_mb << 20, memory=most_memory_mb << 20), say=complain)


@app.command()
def doctor(*, json: options.Json = False) -> None:
    """Check this machine: versions, processor, disk, what disturbs measurements."""
    from autocompress.commands.doctor import examine

    content = examine(Path.cwd())
    emit_json({"ok": content["usable"]} | content) if json else emit_record(content)
    if not content["usable"]:
        raise typer.Exit(4)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    `--debug` and `--json` are looked up in the raw arguments, because an error can come before they are parsed.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug, as_json = "--debug" in given, "--json" in given
    given = [argument for argument in given if argument != "--debug"]
    _never_fail_on_encoding()
    try:
        code = typer.main.get_command(app).main(given or ["--help"], prog_name="autocompress", standalone_mode=False)
        if code == Interrupted.exit_code:  # what typer makes of Ctrl-C
            return _failed(Interrupted(INTERRUPTED), as_json)
        return code if isinstance(code, int) else 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except (KeyboardInterrupt, typer.Abort):
        return _failed(Interrupted(INTERRUPTED), as_json)
    except BaseException as error:
        if debug:
            traceback.print_exc()
        return _failed(error, as_json)


def _failed(error: BaseException, as_json: bool) -> int:
    if isinstance(error, AutocompressError):
        known = error
    elif isinstance(error, ParseError):
        text = str(getattr(error, "format_message", lambda: error)()).rstrip(".")
        known = UsageError(text, hint="autocompress --help, or --help after a command")
    elif isinstance(error, OSError) and error.errno in UNWRITABLE:
        place = repr(str(error.filename)) if error.filename is not None else "a disk"
        known = RunFolderError(f"{place} cannot be written: {error.strerror}", hint="free space, or name another place; then --resume")
    elif isinstance(error, OSError) and error.errno in UNREADABLE:
        place = repr(str(error.filename)) if error.filename is not None else "a file"
        known = RunFolderError(f"{place} can no longer be read: {error.strerror}", hint="see to its disk, or the network; then --resume")
    elif isinstance(error, OSError) and error.filename is not None:
        known = UsageError(f"{str(error.filename)!r} cannot be used: {error.strerror}", hint="check the path, and who may read it")
    else:
        known = AutocompressError(
            f"unexpected {one_line(error)}", hint="this is a bug: please report it with the traceback that --debug shows"
        )
    report_error(known, as_json=as_json)
    return known.exit_code


def _never_fail_on_encoding() -> None:
    """A terminal that cannot show a character shows a question mark."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
