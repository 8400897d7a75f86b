"""Out of the search and into the world: export a policy of a run, and make a shipped student again.

Nothing here runs code that a run folder names: files of a run are data, and what a user's function makes comes from the command line.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from autocompress.batch import Batch, Inputs, call_network, random_like, tensors_of
from autocompress.compress.quantize import TINY, is_quantized
from autocompress.devices import open_device
from autocompress.devices.base import Device, identity
from autocompress.devices.runtime import CURES
from autocompress.errors import AutocompressError, RunFolderError, UsageError
from autocompress.export import (
    BUNDLE,
    MODEL,
    Manifest,
    check_onnx,
    load_student,
    now,
    read_manifest,
    read_policy,
    update_manifest,
    verify_bundle,
)
from autocompress.graph import Graph
from autocompress.graph.plain import own_copy
from autocompress.models import in_float32, load_model, simplify_call
from autocompress.records import Measurement
from autocompress.references import AGENT, DEFAULT_DEVICE, MODEL_LIBRARIES, OBJECT, names_function, require_formats
from autocompress.results import Entry, Results
from autocompress.setup.loading import TEACHER_WEIGHTS, UNFINISHED_TEACHER
from autocompress.system.failures import refused
from autocompress.system.run_folder import is_own_file, writing
from autocompress.task import TASK_FILE, load_task, same_device
from autocompress.trial.beside_baseline import seconds_for

OTHER_FORMATS = ("model.xml", "model.bin", "model.pt2")
UNFINISHED, ABANDONED_S = ".export-", 3600.0
EXPORT_MEASURE_S = 2.0
SAME_FLOAT, SAME_INT8 = 1e-3, 0.2
"""Difference of outputs, as a share of the largest, that the same student stays below in float32 and in int8."""


@dataclass(frozen=True)
class Exported:
    """A bundle that ships, measured once more where it now lies."""

    folder: Path
    manifest: Manifest
    within_budget: bool


# -- export ---------------------------------------------------------------------------------------------------------------


def export_run(
    run: Path, *, pick: str = "best", formats: str | Sequence[str] = ("onnx",), out: Path, model: nn.Module | str | None = None,
    student: str | None = None, device: str | None = None,
) -> Exported:  # fmt: skip
    """Copy the bundle of one policy to `out`, measure its file again beside the baseline's, and say both in the manifest.

    Args:
        pick: `best`, an id, or the first digits of a digest.
        formats: any of `onnx` (always written), `openvino` (IR; needs openvino) and `torch` (a torch.export program).
        model, student: the teacher and the architecture of students, for `torch` when the run's own is a user's function.
        device: to measure on; that of the search where nothing else is said.

    Raises UsageError for an unknown policy or format, and for a device elsewhere that only a folder of somebody else names; RunFolderError
    when the bundle was damaged or deleted.
    """
    formats = [formats] if isinstance(formats, str) else formats
    require_formats(formats)
    run, out = run.absolute(), out.absolute()  # whatever folder the user's code changes to
    results = Results.load(run)
    entry = results.pick(pick)
    source = _bundle_folder(run, entry)
    verify_bundle(source)
    baseline = _baseline_file(run, results)
    for path in (source / MODEL, baseline):  # somebody else may have written the run folder
        check_onnx(path)
    measured_on = device or _device_of(run, results)
    if out.resolve().is_relative_to((run / "models").resolve()):
        raise UsageError(f"--out {str(out)!r} lies among the models of the run", hint="choose a folder elsewhere")
    require_free(out)
    target = open_device(measured_on)
    with whole_folder(out) as made:
        with writing(out):
            for name in BUNDLE:
                shutil.copyfile(source / name, made / name)
        if "openvino" in formats:
            with writing(out), refused(f"policy {entry.id} cannot be written for openvino"):
                _write_openvino(made)
        if "torch" in formats:
            with writing(out), refused(f"policy {entry.id} cannot be written for torch"):
                _write_torch(made, model, student, _teacher_weights(run, results), target)
        with refused(f"policy {entry.id} cannot be measured on {target.name}"):
            seconds = seconds_for(results.limits, results.baseline.latency_s.median, EXPORT_MEASURE_S)
            before, after = target.measure([baseline, made / MODEL], seconds_each=seconds)
        after = after.beside(before)
        manifest = update_manifest(made, _facts(results, entry, target.name, before, after))
    return Exported(out, manifest, results.limits.allows(after, manifest.size_bytes))


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder whose files replace those of an earlier export in `out` once all of them are there, and not before."""
    fresh = not out.exists()
    try:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            for left in out.glob(f"{UNFINISHED}*"):  # by an export that was killed, not by one that runs
                if time.time() - left.stat().st_mtime > ABANDONED_S:
                    shutil.rmtree(left, ignore_errors=True)
            folder = tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=out)
        with folder as name:
            yield Path(name)
            with writing(out):
                made = {file.name: file for file in Path(name).iterdir()}
                for file_name in (*OTHER_FORMATS, *BUNDLE):  # the manifest last: it tells whether the others belong to it
                    if file_name in made:
                        made[file_name].replace(out / file_name)
                    else:
                        (out / file_name).unlink(missing_ok=True)
    except BaseException:
        if fresh:
            shutil.rmtree(out, ignore_errors=True)
        raise


def _device_of(run: Path, results: Results) -> str:
    """The device of a search. Raises UsageError for one elsewhere unless this user has searched there: it is sent the files and a token."""
    task = run / TASK_FILE
    is_ours = task.is_file() and is_own_file(task) and same_device(load_task(task, {}).device, results.device)
    if results.device.startswith(AGENT) and not is_ours:
        raise UsageError(
            f"the device {results.device!r} is named by {str(run)!r}, which no search of yours on this machine has written",
            hint=f"where you trust it, name it yourself: --device {results.device!r}; or measure here: --device {DEFAULT_DEVICE!r}",
        )
    return results.device


def _bundle_folder(run: Path, entry: Entry) -> Path:
    """The folder that holds an entry's artifact; only ever one inside the run."""
    artifact = (run / (entry.artifact or "")).resolve()
    if entry.artifact is None or not artifact.is_relative_to(run.resolve()):
        raise RunFolderError(
            f"front.json must name a file inside {str(run)!r}, but policy {entry.id} has {entry.artifact!r}",
            hint="the folder was changed by hand: search again, or take the front.json of the search",
        )
    if not artifact.is_file():
        raise RunFolderError(
            f"{str(artifact)!r} was deleted", hint="pick another policy, or resume the search with more time: it may be made again"
        )
    return artifact.parent


def _baseline_file(run: Path, results: Results) -> Path:
    path = (run / (results.baseline.artifact or "")).resolve()
    if not path.is_file() or not path.is_relative_to(run.resolve()):
        raise RunFolderError(f"the baseline's file {str(path)!r} is not in the run folder", hint="search again")
    return path


def require_free(out: Path) -> None:
    """An export replaces an earlier export, and nothing else.

    Raises UsageError or RunFolderError for a folder that cannot be written, before any work is done.
    """
    with writing(out):
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out must be a folder, but {str(out)!r} is a file", hint="name another folder")
        place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise UsageError(f"--out {str(out)!r} cannot be written: {str(place)!r} takes no files", hint="choose another --out")
        if out.is_dir() and not _is_export(out):
            raise UsageError(f"{str(out)!r} holds other files", hint="choose an empty folder, or one that an earlier export wrote")


def _is_export(folder: Path) -> bool:
    """Whether an export wrote everything in the folder, as its manifest says; or there is nothing but what a killed one left."""
    found = {entry.name for entry in folder.iterdir() if not entry.name.startswith(UNFINISHED)}
    if not found:
        return True
    if found - {*BUNDLE, *OTHER_FORMATS}:
        return False
    try:
        read_manifest(folder)
    except AutocompressError:
        return False
    return True


def _facts(results: Results, entry: Entry, device: str, before: Measurement, after: Measurement) -> dict[str, Any]:
    """device: where it was measured; scores, parity and what was predicted are of the search's."""
    return {
        "device": device, "latency_s": after, "baseline_latency_s": before, "measured_at": now(),
        "predicted_latency_s": entry.predicted_latency_s if _is_of_the_search(results, device, after) else None,
        "scored_on": results.device, "val_score": entry.val_score, "test_score": entry.test_score, "parity": entry.parity,
    }  # fmt: skip


def _is_of_the_search(results: Results, device: str, measured: Measurement) -> bool:
    """Whether a device is the one that the search has predicted, on the same machine."""
    is_same = all(results.environment.get(what, value) == value for what, value in identity(measured.environment).items())
    return bool(results.device) and same_device(device, results.device) and is_same


def _write_openvino(out: Path) -> None:
    try:
        import openvino
    except ImportError:
        raise UsageError("the format openvino needs OpenVINO, which is not installed", hint=CURES["openvino"]) from None
    openvino.save_model(openvino.convert_model(out / MODEL), out / "model.xml", compress_to_fp16=False)


def _teacher_weights(run: Path, results: Results) -> Path | None:
    """The weights that the search's teacher had, where they are in a file that is still there."""
    named = results.task.get("weights")
    known = [run / TEACHER_WEIGHTS, run / UNFINISHED_TEACHER, *([Path(str(named))] if named else [])]
    return next((path for path in known if path.is_file()), None)


def _write_torch(out: Path, model: nn.Module | str | None, reference: str | None, weights: Path | None, device: Device) -> None:
    student = recreate(out, model, student=reference, weights=weights, device=device)
    torch.export.save(torch.export.export(student, tensors_of(_example(read_manifest(out)))), out / "model.pt2")


def _example(manifest: Manifest) -> Inputs:
    """Random inputs of the kind that a model takes."""
    zeros = tuple(torch.zeros(wanted.shape, dtype=getattr(torch, wanted.dtype)) for wanted in manifest.inputs.values())
    return random_like(Batch(zeros, tuple(manifest.inputs) if manifest.inputs_by_name else ()))


@torch.inference_mode()
def _require_same(student: fx.GraphModule, path: Path, example: Inputs, device: Device) -> None:
    """Which channels a student keeps may depend on its teacher's weights: another teacher of the same shape gives another student."""
    arrays = tuple(tensor.numpy() for tensor in tensors_of(example))
    own, expected = call_network(student, example), torch.from_numpy(device.run(path, [arrays]))
    difference = float((own - expected).abs().max() / expected.abs().max().clamp_min(TINY))
    if not difference <= (SAME_INT8 if is_quantized(student) or not device.profile.is_exact else SAME_FLOAT):
        raise UsageError(
            f"the student that was re-created must answer as the file does, but differs by {100 * difference:.2g} %",
            hint="give the teacher with the weights that it had in the search: --model REF, and its weights file where the search found it",
        )


def recreate(
    bundle: Path | str,
    model: nn.Module | str | None = None,
    *,
    student: str | None = None,
    weights: Path | str | None = None,
    device: Device | None = None,
) -> fx.GraphModule:
    """The student of a bundle, from its policy, its weights and the network that it was derived from, compared with its file.

    Args:
        bundle: the folder that `export` wrote.
        model: the teacher or its reference; None takes the manifest's, unless that is a user's function or was an object.
        student: reference of the architecture that students are derived from, where the policy names a user's function.
        weights: the teacher's weights, where `model` is a reference.
        device: that runs the file which the student is compared with, by default ONNX Runtime here. Int8 of another processor may saturate
            on this one.

    Raises UsageError where the student answers otherwise than the file, as one of another teacher does, RunFolderError for a damaged
    bundle.
    """
    bundle = Path(bundle).absolute()
    manifest, policy = read_manifest(bundle), read_policy(bundle)
    other = policy.student.reference
    reference = other or model or manifest.model
    if isinstance(reference, str):
        if reference not in (model, student):
            require_harmless(reference, "--model" if other is None else "--student")
        own = Path(weights) if other is None and weights is not None else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(manifest.seed)
            reference = load_model(reference, weights=own, classes=manifest.classes)
    example, reference = _example(manifest), in_float32(own_copy(reference))
    simplify_call(reference, example)
    made = load_student(bundle, Graph.trace(reference, tensors_of(example)), policy)
    _require_same(made, bundle / MODEL, example, device or open_device(DEFAULT_DEVICE))
    return made


def require_harmless(reference: str, option: str) -> None:
    """Raises UsageError for a reference that runs a user's code and comes from a file, not from the command line."""
    if reference.startswith(OBJECT):
        cure = "give it: autocompress.recreate(folder, model), or result.export(out, formats=['torch'], model=model)"
        raise UsageError(f"the model was an object of Python ({reference.removeprefix(OBJECT)}), which no file names", hint=cure)
    if names_function(reference, MODEL_LIBRARIES):
        raise UsageError(f"the model {reference!r} is code that this command does not run by itself", hint=f"name it: {option} {reference}")
