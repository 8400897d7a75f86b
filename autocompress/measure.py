"""The latency of one model or file, as a search would measure it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from autocompress.batch import tensors_of
from autocompress.compress.student import build_student
from autocompress.devices import Device, open_device
from autocompress.devices.timing import MOST_DRIFT
from autocompress.export import check_onnx, write_bundle
from autocompress.failures import refused
from autocompress.loading import open_model
from autocompress.policy import Policy
from autocompress.records import Measurement
from autocompress.references import DEFAULT_DEVICE

MEASURE_S = 2.0
TURNS = 3
"""Of each device, where several are compared: one after the other, again and again, so that drift of the machine meets all of them."""


def measure_reference(
    reference: str,
    *,
    devices: Sequence[str],
    weights: Path | None = None,
    data: str | None = None,
    input: str | None = None,
    batch: int = 1,
) -> list[Measurement]:
    """Latency of a model as it is on each device: exported in float32, and measured in turns; `input` as in `inspect_model`."""
    targets = [open_device(device) for device in devices]
    opened = open_model(reference, weights=weights, data=data, input=input, batch=batch)
    with tempfile.TemporaryDirectory(prefix="autocompress-") as folder, refused(f"{reference} cannot be measured"):
        student = build_student(opened.graph, Policy())
        manifest = write_bundle(Path(folder), student, Policy(), tensors_of(opened.example), model=reference)
        return _in_turns(Path(folder) / manifest.artifact, targets)


def measure_file(path: Path | str, *, device: str = DEFAULT_DEVICE) -> Measurement:
    """Latency of an ONNX file. Raises UsageError when it is damaged, or the device cannot run it."""
    return measure_file_on(path, [device])[0]


def measure_file_on(path: Path | str, devices: Sequence[str]) -> list[Measurement]:
    """Latency of an ONNX file on each of several devices, measured in turns. Raises UsageError as `measure_file` does."""
    path, targets = Path(path), [open_device(device) for device in devices]
    check_onnx(path)
    with refused(f"{str(path)!r} cannot be measured"):
        return _in_turns(path, targets)


def _in_turns(path: Path, targets: Sequence[Device]) -> list[Measurement]:
    """What each device says in several turns."""
    turns = [[target.measure([path], seconds_each=MEASURE_S)[0] for target in targets] for _ in range(TURNS if len(targets) > 1 else 1)]
    return [_together(own) for own in zip(*turns, strict=True)]


def _together(turns: Sequence[Measurement]) -> Measurement:
    """The turn whose median is the middle one, with an interval that holds the medians of all: processes differ by more than calls do."""
    ranked = sorted(turns, key=lambda measurement: measurement.median)
    middle, least, most = ranked[len(ranked) // 2], ranked[0].median, ranked[-1].median
    wider = middle.model_copy(update={"low": min(middle.low, least), "high": max(middle.high, most)})
    apart = most / least - 1
    if apart <= MOST_DRIFT:
        return wider
    return wider.mistrusted(f"its turns differ by {100 * apart:.0f} %")
