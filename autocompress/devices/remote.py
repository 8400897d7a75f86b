"""A device elsewhere, through the agent that runs on it: `agent://host:port?runtime=onnxruntime&threads=1`."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

import numpy as np

from autocompress.devices.access import token_of
from autocompress.devices.base import MOST_A_FILE_S, Device, measurements, profile_of
from autocompress.devices.frames import Feed, read_array, stacked, write_array
from autocompress.devices.protocol import HEARTBEAT_S, MOST_REQUEST, PROTOCOL, raise_failure
from autocompress.devices.runtime import EXACT, Runtime
from autocompress.devices.timing import FEWEST_ROUNDS
from autocompress.devices.wire import refers_elsewhere
from autocompress.errors import DeviceUnavailable, PolicyFailure, UsageError, one_line
from autocompress.records import Measurement
from autocompress.references import AGENT, AGENT_PORT

SILENCE_S = 6 * HEARTBEAT_S
"""Without a sign of life for so long a connection is taken to be broken."""
PAUSES_S = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 60.0, 60.0, 60.0, 60.0)
"""Before a request is sent again: an agent may be restarted, a network may come back."""
LONG_PAUSE_S = 20.0
"""From which on a person is told what is waited for."""
PART_BYTES, GROUP_BYTES = 2**23, 2**28
"""Of the inputs that are sent together, and of those that one request names."""
Answer = tuple[dict[str, Any], np.ndarray | None]
"""The line of JSON that answers a request, and the array that follows that of `/run`."""
T = TypeVar("T")


class RemoteCpu(Device):
    """Runs and measures files through an agent; what it has been sent once it is not sent again, as long as it keeps it.

    Args:
        runtime: there.

    Raises DeviceUnavailable where nobody answers, or not as this version does; UsageError where the token is refused.
    """

    def __init__(self, host: str, port: int, runtime: Runtime, token: bytes) -> None:
        self._how = {"runtime": runtime.name, "threads": runtime.threads, "precision": runtime.precision}
        told = {key: value for key, value in self._how.items() if value != EXACT}
        self.name = f"{AGENT}{host}:{port}?{urlencode(told)}"
        self._host, self._port, self._runtime, self._token = host, port, runtime, token
        self._sent: set[str] = set()
        facts, _ = self._patiently(lambda: self._exchange("GET", f"/facts?{urlencode(self._how)}"), pauses_s=())
        raise_failure(facts)
        if facts.get("protocol") != PROTOCOL:
            raise DeviceUnavailable(
                f"{self._place} speaks version {facts.get('protocol')}, not {PROTOCOL}",
                hint="pack it again: autocompress agent --pack agent.pyz",
            )
        self._environment: dict[str, str] = facts["environment"]
        self._most_bytes = int(facts["most_bytes"])
        self.profile = profile_of(runtime, saturates=bool(facts["saturates"]))

    def run(self, path: Path, batches: Iterable[Feed]) -> np.ndarray:
        model, outputs = path.read_bytes(), list[np.ndarray]()
        digest = _digest(model)
        for group in _grouped(_framed(batches)):
            inputs = {_digest(part): part for part in group}
            request = {"model": digest, "inputs": [_digest(part) for part in group]}
            _, array = self._ask("/run", request, {digest: model}, inputs, {digest: path.name})
            assert array is not None
            outputs.append(array)
        return np.concatenate(outputs)

    def measure(self, paths: Sequence[Path], *, seconds_each: float = 1.0) -> list[Measurement]:
        files = [path.read_bytes() for path in paths]
        digests = [_digest(file) for file in files]
        request = {
            "models": digests, "seconds_each": seconds_each, "fewest_rounds": FEWEST_ROUNDS,
            "most_s": (MOST_A_FILE_S + seconds_each) * len(paths),
        }  # fmt: skip
        names = dict(zip(digests, (path.name for path in paths), strict=True))
        answer, _ = self._ask("/measure", request, dict(zip(digests, files, strict=True)), {}, names)
        self._environment = answer.get("environment", self._environment)
        return measurements(answer, paths, self._runtime, self._environment)

    def measure_many(self, models: Sequence[bytes], *, seconds_each: float = 0.02) -> list[float | None]:
        encoded = [base64.b64encode(model).decode() for model in models]
        request = {"models": encoded, "seconds_each": seconds_each, "most_s": MOST_A_FILE_S + len(models)}
        medians: list[float | None] = self._ask("/many", request, {}, {}, {})[0]["medians"]
        return medians

    def environment(self) -> dict[str, str]:
        """As it was when it answered last: a search that ends because the device is gone still writes what it found."""
        return self._environment

    @property
    def _place(self) -> str:
        return f"the agent at {self._host}:{self._port}"

    def _ask(self, kind: str, request: dict[str, Any], models: dict[str, bytes], inputs: dict[str, bytes], names: dict[str, str]) -> Answer:
        """The answer to a request that names these blobs; `names` are those of the files that it may speak of."""
        body = json.dumps(request | self._how).encode()
        blobs = models | inputs
        for content, most in ((body, MOST_REQUEST), *((blob, self._most_bytes) for blob in blobs.values())):
            if len(content) > most:
                raise PolicyFailure(f"{self._place} takes {most} bytes at most, not {len(content)} (python agent.pyz --most-mb)")
        for digest, model in models.items():
            if digest not in self._sent:
                _require_sound(model, names[digest])

        def attempt() -> Answer:
            for _ in range(3):  # an agent that was restarted has nothing any more
                for digest in [digest for digest in blobs if digest not in self._sent]:
                    self._exchange("PUT", f"/blobs/{digest}", blobs[digest])
                    self._sent.add(digest)
                answer, rest = self._exchange("POST", kind, body)
                if answer.get("failed") != "missing":
                    return answer, _array(rest) if kind == "/run" and "failed" not in answer else None
                self._sent -= set(answer["digests"])
            raise DeviceUnavailable(f"{self._place} does not keep what it is sent", hint="give it more room, or start it again")

        answer, array = self._patiently(attempt, PAUSES_S)
        raise_failure(answer, names)
        return answer, array

    def _patiently(self, attempt: Callable[[], T], pauses_s: Sequence[float]) -> T:
        """Again after pauses, where the connection breaks. Raises DeviceUnavailable in the end."""
        for pause in (*pauses_s, None):
            try:
                return attempt()
            except (OSError, http.client.HTTPException, UnicodeError) as error:  # the last for names that no host can have
                if pause is None:
                    raise DeviceUnavailable(
                        f"{self._place} does not answer: {one_line(error)}",
                        hint="start it there (python agent.pyz), and check that it can be reached from here (ssh -L, --host)",
                    ) from None
                if pause >= LONG_PAUSE_S:
                    self.say(f"{self._place} does not answer ({one_line(error)}): trying again in {pause:.0f} s")
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _exchange(self, method: str, path: str, body: bytes = b"") -> tuple[dict[str, Any], io.BytesIO]:
        """One request: the line of JSON that answers it, and what follows that. Sent in pieces, each of which may take SILENCE_S."""
        headers = {"Authorization": f"Bearer {self._token.decode()}", "Content-Length": str(len(body))}
        connection = http.client.HTTPConnection(self._host, self._port, timeout=SILENCE_S)
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have refused before it had read all
                connection.request(method, path, io.BytesIO(body), headers)
            response = connection.getresponse()
            content = io.BytesIO(response.read())
        finally:
            connection.close()
        answer = _parsed(content.readline())
        if response.status == HTTPStatus.UNAUTHORIZED:
            raise UsageError(f"{self._place} refuses the token", hint="copy its token file again, and name it in AUTOCOMPRESS_TOKEN_FILE")
        if response.status >= HTTPStatus.BAD_REQUEST:
            raise http.client.HTTPException(str(answer.get("error", response.reason)))
        return answer, content


def _require_sound(model: bytes, name: str) -> None:
    """Raises PolicyFailure for what is no ONNX model, or does not hold its weights itself."""
    import onnx

    try:
        onnx.checker.check_model(model)
    except Exception as error:  # the checker's own, and those of protocol buffers
        raise PolicyFailure(f"{name} is no sound ONNX model: {one_line(error)}") from None
    if refers_elsewhere(model):
        raise PolicyFailure(f"{name} must hold its weights itself to be sent to another device, but refers to other files")


def _array(rest: io.BytesIO) -> np.ndarray:
    """What follows an answer. Raises HTTPException where it was cut off."""
    array = read_array(rest)
    if array is None:
        raise http.client.HTTPException("the answer was cut off")
    return array


def _framed(batches: Iterable[Feed]) -> Iterator[bytes]:
    """Batches, which are of one size, stacked: for each input an array, of about PART_BYTES together."""
    left = iter(batches)
    for first in left:
        more = max(1, PART_BYTES // max(1, sum(array.nbytes for array in first))) - 1
        framed = io.BytesIO()
        for array in stacked([first, *itertools.islice(left, more)]):
            write_array(framed, array)
        yield framed.getvalue()


def _grouped(parts: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Parts of GROUP_BYTES together, or one that is larger."""
    group: list[bytes] = []
    for part in parts:
        if group and sum(map(len, group)) + len(part) > GROUP_BYTES:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _parsed(line: bytes) -> dict[str, Any]:
    """Raises HTTPException for what no agent says, as where a connection breaks in the middle."""
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise http.client.HTTPException("it is no agent, or its answer was cut short")
    return answer


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def open_agent(address: str, options: dict[str, str]) -> RemoteCpu:
    """The device of `agent://ADDRESS`, HOST[:PORT]. Raises UsageError where that is none, and what `RemoteCpu` raises."""
    host, _, port = address.partition(":")
    if not host or (port and not (port.isdecimal() and 0 < int(port) < 2**16)):
        raise UsageError(f"an agent must be named by host and port, but got {address!r}", hint="write agent://raspberrypi:7878")
    file = os.environ.get("AUTOCOMPRESS_TOKEN_FILE")
    precision = options.get("precision", EXACT)
    runtime = Runtime(options.get("runtime", "onnxruntime"), int(options.get("threads", "1")), precision=precision)
    return RemoteCpu(host, int(port or AGENT_PORT), runtime, token_of(Path(file) if file else None))
