"""A runtime on this machine's CPU."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from autocompress.devices import processes, processor
from autocompress.devices.base import MOST_A_FILE_S, Device, measurements, profile_of
from autocompress.devices.frames import Feed
from autocompress.devices.running import outputs_of
from autocompress.devices.runtime import CURES, Runtime
from autocompress.devices.timing import FEWEST_ROUNDS
from autocompress.errors import UsageError
from autocompress.records import Measurement


class LocalCpu(Device):
    """Runs ONNX files in child processes, and measures them in one with a fixed number of threads."""

    def __init__(self, runtime: Runtime) -> None:
        if not runtime.is_here:
            raise UsageError(f"{runtime.title} is not installed", hint=CURES[runtime.name])
        if not runtime.can_compute:
            asked = f"precision={runtime.precision}"
            raise UsageError(f"this processor has no instructions for {runtime.precision}", hint=f"leave {asked} out")
        self.name = runtime.device
        self._runtime = runtime
        self.profile = profile_of(runtime, saturates=processor.int8_saturates(processor.flags()))

    def run(self, path: Path, batches: Iterable[Feed]) -> np.ndarray:
        return outputs_of(path, self._runtime, batches)

    def measure(self, paths: Sequence[Path], *, seconds_each: float = 1.0) -> list[Measurement]:
        request = {
            "kind": "measure", "paths": [str(path) for path in paths], "seconds_each": seconds_each, "fewest_rounds": FEWEST_ROUNDS,
        }  # fmt: skip
        answer = processes.ask(self._runtime, request, (MOST_A_FILE_S + seconds_each) * len(paths))
        return measurements(answer, paths, self._runtime, self.environment())

    def measure_many(self, models: Sequence[bytes], *, seconds_each: float = 0.02) -> list[float | None]:
        encoded = [base64.b64encode(model).decode() for model in models]
        request = {"kind": "many", "models": encoded, "seconds_each": seconds_each}
        medians: list[float | None] = processes.ask(self._runtime, request, MOST_A_FILE_S + len(models))["medians"]
        return medians

    def environment(self) -> dict[str, str]:
        return self._runtime.environment()
