"""The agent: answers on a device for searches that run elsewhere. Needs Python, numpy and a runtime there, nothing else.

A small HTTP service. Files and inputs come as blobs, named by their SHA-256, so that what was sent once is not sent again; requests name
them. Whoever asks must know the token. What it is sent is never run but by the runtime, in a child process with limits of time and memory
that reads it from memory in an empty folder; files that refer to others are refused. The protocol is that of `server`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autocompress.devices import processes, processor
from autocompress.devices.access import VARIABLE, token_of
from autocompress.devices.blobs import Blobs
from autocompress.devices.frames import Feed, read_array
from autocompress.devices.protocol import PROTOCOL
from autocompress.devices.running import outputs_of
from autocompress.devices.runtime import EXACT, PRECISIONS, TITLES, Guard, Runtime
from autocompress.devices.server import Server
from autocompress.errors import DeviceUnavailable, UsageError, one_line
from autocompress.references import AGENT_FILE_MB, AGENT_MEMORY_MB, AGENT_PORT
from autocompress.system import machine

FOLDER = "autocompress-agent-"
"""Begins the name of the folder of an agent; its process follows."""
MOST_WORK_S = 3600.0


@dataclass(frozen=True)
class Limits:
    """Bytes of one file that an agent takes, of all that it keeps, and of the memory that a process of the runtime may have."""

    body: int = AGENT_FILE_MB << 20
    kept: int = 2**31
    memory: int = AGENT_MEMORY_MB << 20

    @property
    def room(self) -> int:
        """Bytes that are kept: always two files of the largest size."""
        return max(self.kept, 2 * self.body)


class Agent:
    """What requests ask for."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.most_bytes = limits.body
        kept, empty = folder / "blobs", folder / "empty"
        kept.mkdir()
        empty.mkdir()
        self.blobs = Blobs(kept, limits.room)
        self._guard = Guard(str(empty), limits.memory)

    def facts(self, query: dict[str, Any]) -> dict[str, Any]:
        """What the device is, and whether it has the runtime."""
        runtime = self._runtime(query)
        return {
            "protocol": PROTOCOL,
            "most_bytes": self.most_bytes,
            "runtime": runtime.name,
            "saturates": processor.int8_saturates(processor.flags()),
            "environment": runtime.environment(),
        }

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        """The rounds of files, measured in turns, and where."""
        runtime, paths = self._runtime(request), self.blobs.paths(request["models"])
        asked = {"kind": "measure", "paths": [str(path) for path in paths], "fewest_rounds": int(request["fewest_rounds"])}
        return processes.ask(runtime, asked | _seconds(request), _most_s(request)) | {"environment": runtime.environment()}

    def many(self, request: dict[str, Any]) -> dict[str, Any]:
        """Medians of small models, which come in the request."""
        asked = {"kind": "many", "models": list(request["models"])}
        return processes.ask(self._runtime(request), asked | _seconds(request), _most_s(request))

    def run(self, request: dict[str, Any]) -> np.ndarray:
        """First output of a file for all inputs, blobs that hold several batches each: an array for each input of the file."""
        model, *parts = self.blobs.paths([request["model"], *request["inputs"]])
        return outputs_of(model, self._runtime(request), (batch for part in parts for batch in _batches(part)))

    def _runtime(self, request: dict[str, Any]) -> Runtime:
        """Raises DeviceUnavailable where it is not installed, UsageError where there is no such runtime or number of threads."""
        name, threads, most = str(request.get("runtime")), int(request.get("threads", 1)), machine.usable()
        precision = str(request.get("precision", EXACT))
        if name not in TITLES:
            raise UsageError(f"the agent knows no runtime {name!r}", hint=f"it knows {', '.join(TITLES)}")
        if not 1 <= threads <= most:
            raise UsageError(f"threads must lie in 1..{most} there, but got {threads}", hint=f"the agent may use {most} processors")
        if precision not in PRECISIONS[name]:
            raise UsageError(f"{name} takes no precision {precision!r}", hint=f"it takes {', '.join(PRECISIONS[name])}")
        runtime = Runtime(name, threads, self._guard, precision)
        if not runtime.is_here:
            raise DeviceUnavailable(f"{runtime.title} is not installed on the device", hint=f"pip install {name}, there")
        if not runtime.can_compute:
            raise DeviceUnavailable(f"the device's processor has no instructions for {precision}", hint=f"leave precision={precision} out")
        return runtime


def _seconds(request: dict[str, Any]) -> dict[str, float]:
    return {"seconds_each": min(float(request["seconds_each"]), MOST_WORK_S)}


def _most_s(request: dict[str, Any]) -> float:
    return min(float(request["most_s"]), MOST_WORK_S)


def _batches(path: Path) -> Iterator[Feed]:
    arrays: list[np.ndarray] = []
    with path.open("rb") as file:
        while (array := read_array(file)) is not None:
            arrays.append(array)
    if not arrays or not all(array.ndim and array.size for array in arrays) or len({len(array) for array in arrays}) > 1:
        raise UsageError("inputs must be arrays, as autocompress sends them", hint="use autocompress")
    yield from zip(*arrays, strict=True)


def serve(host: str, port: int, token: bytes, limits: Limits, *, ready: Callable[[Server], None] | None = None) -> None:
    """Answer until interrupted."""
    _sweep(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=f"{FOLDER}{os.getpid()}-", ignore_cleanup_errors=True) as folder:
        try:
            server = Server((host, port), Agent(Path(folder), limits), token)
        except (OSError, OverflowError) as error:
            raise UsageError(f"{host}:{port} cannot be listened on: {one_line(error)}", hint="choose another --port or --host") from None
        with server:
            if ready is not None:
                ready(server)
            with contextlib.suppress(KeyboardInterrupt):
                server.serve_forever()


def _sweep(temporary: Path) -> None:
    """Remove the folders of this user's agents that were killed: they may hold gigabytes."""
    for left in temporary.glob(f"{FOLDER}*"):
        process = left.name.removeprefix(FOLDER).partition("-")[0]
        with contextlib.suppress(OSError):
            if process.isdecimal() and left.stat().st_uid == os.getuid() and not machine.is_running(int(process)):
                shutil.rmtree(left, ignore_errors=True)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def listen(host: str, port: int, token_file: Path, limits: Limits, say: Callable[[str], None]) -> None:
    """Answer whoever knows the token until interrupted or told to end. Raises UsageError without a token or a free port."""
    signal.signal(signal.SIGTERM, _stop)
    where = VARIABLE if VARIABLE in os.environ else str(token_file)

    def told(server: Server) -> None:
        say(f"listening on {host}:{server.server_port}; the token is in {where}")

    serve(host, port, token_of(token_file, make=True), limits, ready=told)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python agent.pyz`."""
    parser = argparse.ArgumentParser(
        prog="agent", description="Let searches elsewhere measure on this device: --device agent://HOST:PORT", allow_abbrev=False
    )
    parser.add_argument("--host", default="127.0.0.1", help="to listen on; 0.0.0.0 for all networks (this one is reached by ssh -L only)")
    parser.add_argument("--port", type=int, default=AGENT_PORT)
    parser.add_argument("--token-file", type=Path, default=Path("agent.token"), help="made where it is not there")
    parser.add_argument("--most-mb", type=int, default=AGENT_FILE_MB, help="of one file")
    parser.add_argument("--most-memory-mb", type=int, default=AGENT_MEMORY_MB, help="of a process of the runtime")
    options = parser.parse_args(arguments)
    limits = Limits(body=options.most_mb << 20, memory=options.most_memory_mb << 20)
    try:
        listen(options.host, options.port, options.token_file, limits, say=lambda line: print(line, file=sys.stderr, flush=True))
    except UsageError as error:
        parser.error(f"{error.message}. {error.hint}")
    return 0
