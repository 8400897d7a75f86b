"""The latency of one model or file, as a search would measure it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from autocompress.compress.student import build_student
from autocompress.data import Data
from autocompress.data.sources import Splits
from autocompress.devices import Device, open_device
from autocompress.devices.timing import MOST_DRIFT
from autocompress.errors import UsageError
from autocompress.export import Provenance, check_onnx, write_bundle
from autocompress.policy import Policy
from autocompress.records import Measurement
from autocompress.references import DEFAULT_DEVICE, name_of
from autocompress.setup.loading import open_model
from autocompress.system.failures import refused

MEASURE_S = 2.0
TURNS = 3
"""Of each device, where several are compared: one after the other, again and again, so that drift of the machine meets all of them."""


def measure_model(
    what: nn.Module | Path | str,
    *,
    device: str = DEFAULT_DEVICE,
    weights: Path | str | None = None,
    data: Data | Splits | str | None = None,
    input: str | None = None,
    batch: int | None = None,
) -> Measurement:
    """Latency of a model as it is, exported in float32, or of an ONNX file, as `autocompress measure` does.

    Args:
        what: a module (never changed), a reference such as `"torchvision:resnet18"`, or the path of a file that ends in `.onnx`.
        weights, data: see `search`. input: without data, the shapes of the inputs, as in `inspect_model`.
        batch: inputs a call, 1 where nothing else is said; a file has its own.

    Raises UsageError when a file is damaged, or the device cannot run it.
    """
    return measure_on(what, [device], weights=weights, data=data, input=input, batch=batch)[0]


def measure_on(
    what: nn.Module | Path | str,
    devices: Sequence[str],
    *,
    weights: Path | str | None = None,
    data: Data | Splits | str | None = None,
    input: str | None = None,
    batch: int | None = None,
) -> list[Measurement]:
    """The same on each of several devices, measured in turns."""
    targets = [open_device(device) for device in devices]
    if not isinstance(what, nn.Module) and str(what).endswith(".onnx"):
        _require_none(str(what), {"weights": weights, "data": data, "input": input, "batch": batch})
        check_onnx(Path(what))
        with refused(f"{str(what)!r} cannot be measured"):
            return _in_turns(Path(what), targets)
    given = what if isinstance(what, nn.Module) else str(what)
    opened = open_model(given, weights=Path(weights) if weights is not None else None, data=data, input=input, batch=batch or 1)
    with tempfile.TemporaryDirectory(prefix="autocompress-") as folder, refused(f"{name_of(given)} cannot be measured"):
        student = build_student(opened.graph, Policy())
        manifest = write_bundle(Path(folder), student, Policy(), opened.example, Provenance(model=name_of(given)))
        return _in_turns(Path(folder) / manifest.artifact, targets)


def _require_none(path: str, options: Mapping[str, object]) -> None:
    """A file has its own of all that a model must be told."""
    given = next((name for name, value in options.items() if value is not None), None)
    if given is not None:
        raise UsageError(f"{given} (--{given}) is for models, but {path!r} is a file that has its own", hint=f"leave {given} out")


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
