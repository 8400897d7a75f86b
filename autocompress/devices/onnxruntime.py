"""ONNX Runtime on this machine's CPU."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import importlib.util
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np

from autocompress.devices import processor
from autocompress.devices.base import Device, DeviceProfile
from autocompress.devices.frames import read_array, write_array
from autocompress.devices.timing import FEWEST_ROUNDS, summarise
from autocompress.errors import DeviceUnavailable, PolicyFailure
from autocompress.records import Measurement

COMMAND = (sys.executable, "-P", "-m", "autocompress.devices.child")  # -P: a random.py in the current folder is not Python's
TIMEOUT_S = 120.0
"""Beyond what the process allows itself: to start, to load, and to end one very slow call."""
MOST_A_FILE_S = 120.0
"""Until then a file is called: calls of up to a seventh of it are warmed up and give five rounds."""
AT_ONCE_S = 0.05
"""Batches travel to the process and back together as long as these take less: a journey takes longer than a small network."""
LOCK_PATIENCE_S = 600.0
LOCK_POLL_S = 0.05


class OnnxRuntimeCpu(Device):
    """Runs ONNX files in a child process, and measures them there with a fixed number of threads."""

    def __init__(self, threads: int = 1) -> None:
        if importlib.util.find_spec("onnxruntime") is None:
            raise DeviceUnavailable("ONNX Runtime is not installed", hint="pip install onnxruntime")
        self.name = f"onnxruntime:cpu?threads={threads}"
        saturates = processor.int8_saturates(processor.flags())
        note = "x86 without VNNI: int8 weights use 7 bits" if saturates else ""
        self.profile = DeviceProfile(runtime="onnxruntime", threads=threads, reduced_range=saturates, note=note)

    def run(self, path: Path, batches: Iterable[np.ndarray]) -> np.ndarray:
        request = {"kind": "run", "path": str(path), "threads": self.profile.threads}
        return np.concatenate(list(_outputs(path, request, batches)))

    def measure(self, paths: Sequence[Path], *, seconds_each: float = 1.0) -> list[Measurement]:
        request = {
            "kind": "measure", "paths": [str(path) for path in paths], "seconds_each": seconds_each, "fewest_rounds": FEWEST_ROUNDS,
        }  # fmt: skip
        answer = self._ask(request, (MOST_A_FILE_S + seconds_each) * len(paths))
        if "error" in answer:
            raise PolicyFailure(f"ONNX Runtime cannot run {paths[answer['index']].name}: {answer['error']}")
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
        return _ask(request | {"threads": self.profile.threads, "most_s": most_s}, TIMEOUT_S + most_s)

    def environment(self) -> dict[str, str]:
        return {
            "processor": processor.name(),
            "flags": " ".join(processor.listed_flags()),
            "cpus": str(os.cpu_count()),
            "governor": processor.governor() or "unknown",
            "load": f"{os.getloadavg()[0]:.2f}",
            "threads": str(self.profile.threads),
            "onnxruntime": metadata.version("onnxruntime"),
            "python": platform.python_version(),
            "system": platform.platform(),
        }


@contextlib.contextmanager
def _exclusive() -> Iterator[None]:
    """One measuring at a time on this machine, whoever asks. Raises DeviceUnavailable when another one does not end."""
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


def _ask(request: dict[str, Any], timeout: float) -> dict[str, Any]:
    environment = _environment() | {"OMP_NUM_THREADS": str(request["threads"])}
    with _exclusive():
        try:
            done = subprocess.run(
                COMMAND, input=_line(request), capture_output=True, text=True, timeout=timeout, env=environment, check=False
            )
        except subprocess.TimeoutExpired:
            raise PolicyFailure(f"measurement timeout: the runtime must answer within {timeout:.0f} s") from None
    if done.returncode < 0:
        raise _crashed(done.returncode)
    if done.returncode != 0:
        raise DeviceUnavailable(f"ONNX Runtime failed in its process: {_last_line(done.stderr)}", hint="run `autocompress doctor`")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _outputs(path: Path, request: dict[str, Any], batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Outputs of more and more batches at once, until those of one journey take AT_ONCE_S. Raises PolicyFailure."""
    waiting, at_once, line = iter(batches), 1, _line(request).encode()
    with tempfile.TemporaryFile() as complaints:
        child = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, env=_environment())
        assert child.stdin is not None
        with child:
            try:
                while inputs := list(itertools.islice(waiting, at_once)):
                    begun = time.monotonic()
                    outputs = _answer(child, line, np.stack(inputs))
                    line = b""
                    if outputs is None:
                        complaints.seek(0)
                        raise _stopped(child, path, time.monotonic() - begun, complaints.read().decode(errors="replace"))
                    yield outputs.reshape(-1, *outputs.shape[2:])
                    at_once *= 2 if time.monotonic() - begun < AT_ONCE_S else 1
            finally:
                child.kill()
                with contextlib.suppress(BrokenPipeError):  # what it has not read
                    child.stdin.close()


def _answer(child: subprocess.Popen[bytes], line: bytes, inputs: np.ndarray) -> np.ndarray | None:
    """What the process makes of the inputs after a line with a request; None when it ends over them, or has to be ended after TIMEOUT_S."""
    assert child.stdin is not None and child.stdout is not None
    guard = threading.Timer(TIMEOUT_S, child.kill)
    guard.start()
    try:
        child.stdin.write(line)
        write_array(child.stdin, inputs)
        return read_array(child.stdout)
    except BrokenPipeError:
        return None
    finally:
        guard.cancel()


def _stopped(child: subprocess.Popen[bytes], path: Path, seconds: float, complaints: str) -> PolicyFailure:
    """Why the process has ended while it ran a file."""
    if seconds >= TIMEOUT_S:
        return PolicyFailure(f"the runtime must answer within {TIMEOUT_S:.0f} s, but does not for {path.name}")
    code = child.wait()
    return _crashed(code) if code < 0 else PolicyFailure(f"ONNX Runtime cannot run {path.name}: {_last_line(complaints)}")


def _crashed(code: int) -> PolicyFailure:
    return PolicyFailure(f"the runtime crashed with {signal.Signals(-code).name}")


def _last_line(complaints: str) -> str:
    return (complaints.strip().splitlines() or ["no message"])[-1]


def _line(request: dict[str, Any]) -> str:
    """A request as the process reads it; it must end when this process does."""
    return json.dumps(request | {"parent": os.getpid()}) + "\n"


def _environment() -> dict[str, str]:
    """Of the process: it finds this package where this one is."""
    search_path = [str(Path(__file__).parents[2]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return os.environ | {"PYTHONPATH": os.pathsep.join(search_path)}
