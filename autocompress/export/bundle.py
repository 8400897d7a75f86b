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
from safetensors.torch import load_file
from torch import Tensor, fx

from autocompress.errors import AutocompressError, RunFolderError, UsageError
from autocompress.export.onnx import onnx_bytes
from autocompress.export.weights import weights_bytes
from autocompress.policy import Policy, Record
from autocompress.records import Artifact, Measurement, Prediction, Score, Shape
from autocompress.run_folder import write_atomically, writing

MODEL, STUDENT, POLICY, MANIFEST = "model.onnx", "student.safetensors", "policy.json", "manifest.json"
LIBRARIES = ("autocompress", "torch", "onnx", "onnxruntime", "numpy", "optuna")


class Manifest(Record):
    """What an artifact is, where it comes from, what was measured of it, on what and when."""

    schema_version: Literal[1] = Field(1, alias="schema")
    model: str
    classes: int | None = None
    seed: int = 0
    policy_digest: str
    artifact: str = MODEL
    artifact_sha256: str
    size_bytes: int
    inputs: dict[str, Shape]
    outputs: tuple[str, ...] = ("output",)
    batch: int
    created_at: str
    device: str | None = None
    latency_s: Measurement | None = None
    measured_at: str | None = None
    baseline_latency_s: Measurement | None = None
    predicted_latency_s: Prediction | None = None
    val_score: Score | None = None
    test_score: Score | None = None
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


def write_bundle(
    folder: Path,
    student: fx.GraphModule,
    policy: Policy,
    example: tuple[Tensor, ...],
    *,
    model: str,
    classes: int | None = None,
    seed: int = 0,
) -> Artifact:
    """Export a student. Raises PolicyFailure when the exporter fails, RunFolderError when the disk does.

    Args:
        student: quantized and calibrated as the policy says, in eval mode; not changed.
        example: inputs at the deployment batch, which the file keeps.
        model: reference of the teacher. classes: how many it tells apart; None for other tasks.
        seed: of the weights that a network without a weights file had; which channels a student keeps follows from them.
    """
    payload = onnx_bytes(student, policy.quant, example)
    names = [node.name for node in student.graph.nodes if node.op == "placeholder"]
    artifact = Artifact(
        path=MODEL, size_bytes=len(payload), policy_digest=policy.digest, sha256=hashlib.sha256(payload).hexdigest(),
        inputs={name: tuple(value.shape) for name, value in zip(names, example, strict=False)},
    )  # fmt: skip
    manifest = Manifest(
        model=model, classes=classes, seed=seed, policy_digest=policy.digest, artifact_sha256=artifact.sha256,
        size_bytes=artifact.size_bytes, inputs=artifact.inputs, batch=len(example[0]), created_at=now(), environment=library_versions(),
    )  # fmt: skip
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / POLICY, policy.to_json())
    write_atomically(folder / STUDENT, weights_bytes(student))
    write_atomically(folder / MODEL, payload)
    write_atomically(folder / MANIFEST, manifest.to_json())
    return artifact


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle. Raises RunFolderError when it is missing."""
    path = folder / MANIFEST
    if not path.is_file():
        raise RunFolderError(f"{str(folder)!r} holds no {MANIFEST}", hint="the bundle was deleted or never finished")
    return Manifest.from_json(path.read_bytes())


def update_manifest(folder: Path, changes: Mapping[str, Any]) -> Manifest:
    """Write the manifest again with these fields changed."""
    manifest = Manifest.model_validate(read_manifest(folder).model_dump(by_alias=True) | dict(changes))
    write_atomically(folder / MANIFEST, manifest.to_json())
    return manifest


def verify_bundle(folder: Path) -> Manifest:
    """The manifest of a bundle whose files are what they were when it was written. Raises RunFolderError otherwise."""
    manifest = read_manifest(folder)
    path = folder / manifest.artifact
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != manifest.artifact_sha256:
        raise RunFolderError(
            f"{str(path)!r} is missing or is not the file that was measured", hint="resume the search, or pick another policy"
        )
    return manifest


def is_intact(folder: Path) -> bool:
    """Whether the files of a bundle are what they were when it was written."""
    try:
        verify_bundle(folder)
    except AutocompressError:
        return False
    return True


def load_student(folder: Path, student: fx.GraphModule) -> fx.GraphModule:
    """Load a bundle's weights into a student that was built and quantized by the bundle's policy.

    Raises UsageError when they are of another shape: the student was built from another teacher.
    """
    try:
        student.load_state_dict(load_file(folder / STUDENT))
    except RuntimeError as error:
        raise UsageError(
            f"the weights of {str(folder / STUDENT)!r} do not fit the student of this teacher: {str(error).splitlines()[-1].strip()}",
            hint="give the teacher that the search had: --model REF",
        ) from None
    return student.eval()
