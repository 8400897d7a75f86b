"""The folder that ships: policy.json, student.safetensors, model.onnx and manifest.json, each written whole or not at all."""

from __future__ import annotations

import datetime
import hashlib
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, fx

from autocompress.batch import Inputs, names_of, tensors_of
from autocompress.compress.quantize import fake_quantize
from autocompress.compress.student import build_student
from autocompress.errors import AutocompressError, RunFolderError, UsageError, one_line
from autocompress.export.onnx import onnx_bytes
from autocompress.export.weights import weights_bytes
from autocompress.graph import Graph
from autocompress.models import load_tensor_state
from autocompress.policy import Policy
from autocompress.record import Record
from autocompress.records import Measurement, Normalisation, Parity, Prediction, Score
from autocompress.system.run_folder import write_atomically, writing
from autocompress.workload import Shape

MODEL, STUDENT, POLICY, MANIFEST = "model.onnx", "student.safetensors", "policy.json", "manifest.json"
BUNDLE = (MODEL, STUDENT, POLICY, MANIFEST)
LIBRARIES = ("autocompress", "torch", "onnx", "onnxruntime", "numpy", "optuna")


class Input(Record):
    """One input of a model, the batch included; `dtype` as torch calls it."""

    shape: Shape
    dtype: str


class Provenance(Record):
    """What networks are made of: the same for all of one search.

    model: reference of the teacher. classes: how many it tells apart; None for other tasks.
    class_names: what they are called, in the order of the outputs, where that is known.
    seed: of the weights that a network without a weights file had; which channels a student keeps follows from them.
    normalisation: of the images that it was trained and scored on; no part of the files.
    """

    model: str
    classes: int | None = None
    class_names: tuple[str, ...] = ()
    seed: int = 0
    normalisation: Normalisation | None = None


class Manifest(Provenance):
    """What an artifact is, where it comes from, what was measured of it, on what and when.

    sha256: of each file that belongs to it, by name.
    inputs_by_name: whether the file's inputs bear the names of the model's arguments; else they are its first arguments, in their order.
    parity: how the file's outputs differ from those of the student in student.safetensors.
    device: where latencies were measured; scored_on: where the file was run for its scores, by the search.
    """

    schema_version: Literal[1] = Field(1, alias="schema")
    policy_digest: str
    artifact: str = MODEL
    sha256: dict[str, str]
    size_bytes: int
    inputs: dict[str, Input]
    inputs_by_name: bool = False
    outputs: tuple[str, ...] = ("output",)
    batch: int
    created_at: str
    device: str | None = None
    latency_s: Measurement | None = None
    measured_at: str | None = None
    baseline_latency_s: Measurement | None = None
    predicted_latency_s: Prediction | None = None
    scored_on: str | None = None
    val_score: Score | None = None
    test_score: Score | None = None
    parity: Parity | None = None
    environment: dict[str, str] = {}


def now() -> str:
    """UTC in ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that make an artifact."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def write_bundle(folder: Path, student: fx.GraphModule, policy: Policy, example: Inputs, provenance: Provenance) -> Manifest:
    """Export a student; the file is `manifest.artifact`. Raises PolicyFailure when the exporter fails, RunFolderError when the disk does.

    Args:
        student: quantized and calibrated as the policy says, in eval mode; not changed.
        example: inputs at the deployment batch, which the file keeps; where they are named, the file calls its inputs so too.
    """
    tensors = tensors_of(example)
    names = names_of(example) or tuple(node.name for node in student.graph.nodes if node.op == "placeholder")
    files = {POLICY: policy.to_json().encode(), STUDENT: weights_bytes(student), MODEL: onnx_bytes(student, policy.quant, tensors, names)}
    manifest = Manifest(
        **dict(provenance), policy_digest=policy.digest,
        sha256={name: hashlib.sha256(content).hexdigest() for name, content in files.items()}, size_bytes=len(files[MODEL]),
        inputs={name: _input(value) for name, value in zip(names, tensors, strict=False)}, inputs_by_name=bool(names_of(example)),
        batch=len(example), created_at=now(), environment=library_versions(),
    )  # fmt: skip
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content)
    write_atomically(folder / MANIFEST, manifest.to_json())
    return manifest


def _input(value: Tensor) -> Input:
    return Input(shape=tuple(value.shape), dtype=str(value.dtype).removeprefix("torch."))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle. Raises RunFolderError when it is missing or damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        raise RunFolderError(f"{str(folder)!r} holds no {MANIFEST}", hint="the bundle was deleted or never finished")
    try:
        return Manifest.from_json(path.read_bytes())
    except UsageError as error:
        raise RunFolderError(
            f"{str(path)!r} is damaged: {error.message}", hint="export again, resume the search, or pick another policy"
        ) from None


def read_policy(folder: Path) -> Policy:
    """The policy of a bundle. Raises RunFolderError when it is missing, UsageError when it is no policy."""
    path = folder / POLICY
    if not path.is_file():
        raise RunFolderError(f"{str(path)!r} is missing", hint="export the policy again")
    return Policy.from_json(path.read_bytes())


def update_manifest(folder: Path, changes: Mapping[str, Any]) -> Manifest:
    """Write the manifest again with these fields changed; returns it as it is read."""
    manifest = Manifest.model_validate(read_manifest(folder).model_dump(by_alias=True) | dict(changes))
    write_atomically(folder / MANIFEST, manifest.to_json())
    return read_manifest(folder)


def verify_bundle(folder: Path) -> Manifest:
    """The manifest of a bundle whose files are what they were when it was written. Raises RunFolderError otherwise."""
    manifest = read_manifest(folder)
    for name, digest in manifest.sha256.items():
        path = folder / name
        if Path(name).name != name or not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise RunFolderError(
                f"{str(path)!r} is missing or is not the file that was measured", hint="export again, resume the search, or pick another"
            )
    return manifest


def is_intact(folder: Path) -> bool:
    """Whether the files of a bundle are what they were when it was written."""
    try:
        verify_bundle(folder)
    except AutocompressError:
        return False
    return True


def load_student(folder: Path, graph: Graph, policy: Policy) -> fx.GraphModule:
    """The student of a bundle, made again: built and quantized by the bundle's policy, with the bundle's weights.

    Raises UsageError when they are of another shape (the student was built from another teacher), RunFolderError when they are damaged.
    """
    path, student = folder / STUDENT, fake_quantize(build_student(graph, policy), policy.quant)
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunFolderError(f"{str(path)!r} cannot be read: {one_line(error)}", hint="export the policy again") from None
    try:
        load_tensor_state(student, state)
    except RuntimeError as error:
        raise UsageError(
            f"the weights of {str(path)!r} do not fit the student of this teacher: {str(error).splitlines()[-1].strip()}",
            hint="give the teacher that the search had: --model REF",
        ) from None
    return student.eval()
