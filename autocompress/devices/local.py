"""A runtime on this machine's CPU."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np

from autocompress.devices import processes, processor
from autocompress.devices.base import Device, DeviceProfile
from autocompress.devices.running import outputs_of
from autocompress.devices.runtime import CURES, Runtime
from autocompress.devices.timing import FEWEST_ROUNDS, summarise
from autocompress.errors import DeviceUnavailable, PolicyFailure
from autocompress.records import Measurement

MOST_A_FILE_S = 120.0
"""Until then a file is called: calls of up to an eighth of it are warmed up and give six rounds."""
LOCK_PATIENCE_S = 600.0
LOCK_POLL_S = 0.05


class LocalCpu(Device):
    """Runs ONNX files in child processes, and measures them in one with a fixed number of threads."""

    def __init__(self, runtime: Runtime) -> None:
        if not runtime.is_here:
            raise DeviceUnavailable(f"{runtime.title} is not installed", hint=CURES[runtime.name])
        self.name = runtime.device
        self._runtime = runtime
        saturates = processor.int8_saturates(processor.flags())
        note = "x86 without VNNI: int8 weights use 7 bits" if saturates else ""
        self.profile = DeviceProfile(runtime=runtime.name, threads=runtime.threads, reduced_range=saturates, note=note)

    def run(self, path: Path, batches: Iterable[np.ndarray]) -> np.ndarray:
        return outputs_of(path, self._runtime, batches)

    def measure(self, paths: Sequence[Path], *, seconds_each: float = 1.0) -> list[Measurement]:
        request = {
            "kind": "measure", "paths": [str(path) for path in paths], "seconds_each": seconds_each, "fewest_rounds": FEWEST_ROUNDS,
        }  # fmt: skip
        answer = self._ask(request, (MOST_A_FILE_S + seconds_each) * len(paths))
        if "error" in answer:
            raise PolicyFailure(f"{self._runtime.title} cannot run {paths[answer['index']].name}: {answer['error']}")
        environment = self.environment()
        return [
            summarise(rounds, first_call=first, environment=environment)
            for rounds, first in zip(answer["rounds"], answer["firsts"], strict=True)
        ]

    def measure_many(self, models: Sequence[bytes], *, seconds_each: float = 0.02) -> list[float | None]:
        encoded = [base64.b64encode(model).decode() for model in models]
        request = {"kind": "many", "models": encoded, "seconds_each": seconds_each}
        medians: list[float | None] = self._ask(request, MOST_A_FILE_S + len(models))["medians"]
        return medians

    def _ask(self, request: dict[str, Any], most_s: float) -> dict[str, Any]:
        return _ask(self._runtime, request | {"most_s": most_s}, processes.TIMEOUT_S + most_s)

    def environment(self) -> dict[str, str]:
        return {
            "processor": processor.name(),
            "flags": " ".join(processor.listed_flags()),
            "cpus": str(os.cpu_count()),
            "governor": processor.governor() or "unknown",
            "load": f"{os.getloadavg()[0]:.2f}",
            "threads": str(self.profile.threads),
            self._runtime.name: metadata.version(self._runtime.name),
            "python": platform.python_version(),
            "system": platform.platform(),
        }


@contextlib.contextmanager
def _exclusive() -> Iterator[None]:
    """One measuring at a time of this user, whichever process asks. Raises DeviceUnavailable when another one does not end."""
    path = Path(tempfile.gettempdir()) / f"autocompress-device-{os.getuid()}.lock"
    patience = time.monotonic() + LOCK_PATIENCE_S
    with path.open("w") as file:
        while not _lock(file):
            if time.monotonic() > patience:
                raise DeviceUnavailable(
                    f"another program has measured on this machine for {LOCK_PATIENCE_S:.0f} s",
                    hint=f"end it (`fuser {path}` names it), then try again",
                )
            time.sleep(LOCK_POLL_S)
        yield


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _ask(runtime: Runtime, request: dict[str, Any], timeout: float) -> dict[str, Any]:
    environment = processes.environment() | {"OMP_NUM_THREADS": str(runtime.threads)}
    with _exclusive():
        try:
            done = subprocess.run(
                processes.COMMAND,
                input=processes.line(request | runtime.asked),
                capture_output=True,
                text=True,
                timeout=timeout,
                env=environment,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise PolicyFailure(f"measurement timeout: the runtime must answer within {timeout:.0f} s") from None
    if done.returncode < 0:
        raise processes.crashed(done.returncode)
    if done.returncode != 0:
        reason = processes.last_line(done.stderr)
        raise DeviceUnavailable(f"{runtime.title} failed in its process: {reason}", hint="run `autocompress doctor`")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
