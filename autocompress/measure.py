"""The latency of one model or file, as a search would measure it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import Tensor

from autocompress.compress.student import build_student
from autocompress.data.sources import load_data
from autocompress.devices import open_device
from autocompress.errors import refused
from autocompress.export import check_onnx, write_bundle
from autocompress.graph import Graph
from autocompress.models import answer_with_one_tensor, example_for, load_model
from autocompress.policy import Policy
from autocompress.records import Measurement
from autocompress.references import DEFAULT_DEVICE

MEASURE_S = 2.0


def measure_reference(
    reference: str, *, device: str, weights: Path | None = None, data: str | None = None, input: str | None = None, batch: int = 1
) -> Measurement:
    """Latency of a model as it is: exported in float32 and measured on the device; `input` as in `inspect_model`."""
    target = open_device(device)
    loaded = load_data(data) if data is not None else None
    model = load_model(reference, weights=weights, classes=loaded.classes if loaded is not None else None)
    example: Tensor = loaded.example(batch) if loaded is not None else example_for(model, reference, batch, input)
    answer_with_one_tensor(model, example)
    graph = Graph.trace(model, (example,))
    with tempfile.TemporaryDirectory(prefix="autocompress-") as folder, refused(f"{reference} cannot be measured"):
        manifest = write_bundle(Path(folder), build_student(graph, Policy()), Policy(), (example,), model=reference)
        return target.measure([Path(folder) / manifest.artifact], seconds_each=MEASURE_S)[0]


def measure_file(path: Path | str, *, device: str = DEFAULT_DEVICE) -> Measurement:
    """Latency of an ONNX file. Raises UsageError when it is damaged, or the device cannot run it."""
    path = Path(path)
    check_onnx(path)
    with refused(f"{str(path)!r} cannot be measured"):
        return open_device(device).measure([path])[0]
