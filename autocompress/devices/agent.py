"""The agent: answers on a device for searches that run elsewhere. Needs Python, numpy and a runtime there, nothing else.

A small HTTP service. Files and inputs come as blobs, named by their SHA-256, so that what was sent once is not sent again; requests name
them. Whoever asks must know the token. What it is sent is never run but by the runtime, in a child process with limits of time and memory
that reads it from memory in an empty folder; files that refer to others are refused.

    GET  /facts?runtime=NAME&threads=N      what the device is
    PUT  /blobs/SHA256                      keep these bytes
    POST /measure, /many, /run              JSON; the answer is spaces while it works, then a line of JSON, and of /run an array after it

Each connection is closed after its answer, whose end that is.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import hmac
import io
import json
import os
import re
import secrets
import shutil
import signal
import socket
import socketserver
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np

from autocompress.devices import processes, processor
from autocompress.devices.frames import read_array, write_array
from autocompress.devices.running import outputs_of
from autocompress.devices.runtime import TITLES, Guard, Runtime
from autocompress.errors import DeviceUnavailable, PolicyFailure, UsageError, one_line
from autocompress.references import AGENT_FILE_MB, AGENT_MEMORY_MB, AGENT_PORT

PROTOCOL = 1
LEAST_TOKEN = 16
TOKEN = re.compile(rf"[\x20-\x7e]{{{LEAST_TOKEN},}}")
BLOB = re.compile(r"/blobs/([0-9a-f]{64})")
DIGEST = re.compile(r"[0-9a-f]{64}")
HEARTBEAT_S = 5.0
"""Between signs of life while a request is worked on: who hears nothing for much longer knows that the device is gone."""
SILENCE_S = 60.0
"""After so long a connection that says nothing is dropped..."""
STRANGER_S = 10.0
"""... and after so long one that has not told the token, whatever it says."""
FOLDER = "autocompress-agent-"
"""Begins the name of the folder of an agent; its process follows."""
MOST_CONNECTIONS = 16
MOST_REQUEST = 2**26
"""Bytes of a request that is not a file."""
MOST_WORK_S = 3600.0
PIECE = 2**16
LINGER_S, MOST_LINGERING = 1.0, 64
"""Seconds and pieces that are waited for after a refusal."""


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


class Missing(Exception):
    """Blobs that a request names, and nobody has sent."""


class Blobs:
    """What was sent, as files named by their SHA-256; the least recently used are dropped where they are too many."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder, self._most = folder, most_bytes
        self._lock = threading.Lock()

    def path(self, digest: str) -> Path:
        """Where a blob lies, used just now."""
        if not DIGEST.fullmatch(digest):
            raise UsageError(f"a blob is named by a SHA-256, not {digest!r}", hint="use autocompress")
        path = self._folder / digest
        try:
            os.utime(path)
        except FileNotFoundError:
            raise Missing(digest) from None
        return path

    def paths(self, digests: Sequence[str]) -> list[Path]:
        """Of all of them. Raises Missing with those that are not here."""
        found, missing = [], []
        for digest in digests:
            try:
                found.append(self.path(digest))
            except Missing:
                missing.append(digest)
        if missing:
            raise Missing(*missing)
        return found

    def keep(self, digest: str, pieces: Iterator[bytes]) -> bool:
        """Whether the pieces are what the digest says; only then they are kept."""
        made = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix="part-", delete=False) as file:
            try:
                for piece in pieces:
                    made.update(piece)
                    file.write(piece)
                file.close()
                if made.hexdigest() != digest:
                    return False
                with self._lock:
                    self._make_room(Path(file.name).stat().st_size)
                    Path(file.name).replace(self._folder / digest)
                return True
            finally:
                Path(file.name).unlink(missing_ok=True)

    def _make_room(self, n: int) -> None:
        kept = sorted((p for p in self._folder.iterdir() if DIGEST.fullmatch(p.name)), key=lambda p: p.stat().st_mtime)
        total = sum(path.stat().st_size for path in kept)
        for path in kept:
            if total + n <= self._most:
                break
            total -= path.stat().st_size
            path.unlink(missing_ok=True)


class Agent:
    """What requests ask for."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.limits = limits
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
            "most_bytes": self.limits.body,
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
        """First output of a file for all inputs, blobs with an array of several batches each."""
        model, *parts = self.blobs.paths([request["model"], *request["inputs"]])
        return outputs_of(model, self._runtime(request), (batch for part in parts for batch in _batches(part)))

    def _runtime(self, request: dict[str, Any]) -> Runtime:
        """Raises DeviceUnavailable where it is not installed, UsageError where there is no such runtime or number of threads."""
        name, threads, most = str(request.get("runtime")), int(request.get("threads", 1)), processor.usable()
        if name not in TITLES:
            raise UsageError(f"the agent knows no runtime {name!r}", hint=f"it knows {', '.join(TITLES)}")
        if not 1 <= threads <= most:
            raise UsageError(f"threads must lie in 1..{most} there, but got {threads}", hint=f"the agent may use {most} processors")
        runtime = Runtime(name, threads, self._guard)
        if not runtime.is_here:
            raise DeviceUnavailable(f"{runtime.title} is not installed on the device", hint=f"pip install {name}, there")
        return runtime


def _seconds(request: dict[str, Any]) -> dict[str, float]:
    return {"seconds_each": min(float(request["seconds_each"]), MOST_WORK_S)}


def _most_s(request: dict[str, Any]) -> float:
    return min(float(request["most_s"]), MOST_WORK_S)


def _batches(path: Path) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        array = read_array(file)
    if array is None or not array.size:
        raise UsageError("inputs must be an array, as autocompress sends it", hint="use autocompress")
    yield from array


class Job:
    """One request that is worked on, after those before it."""

    def __init__(self, turn: threading.Lock, work: Callable[[], Any]) -> None:
        self.answer: tuple[dict[str, Any], np.ndarray | None] = ({}, None)
        self.done = threading.Event()
        self.is_given_up = False
        threading.Thread(target=self._work, args=(turn, work), daemon=True).start()

    def _work(self, turn: threading.Lock, work: Callable[[], Any]) -> None:
        with turn:
            if not self.is_given_up:
                self.answer = _answered(work)
        self.done.set()


class Handler(BaseHTTPRequestHandler):
    """One connection, for one request."""

    timeout = SILENCE_S
    server: Server

    def setup(self) -> None:
        """Strangers have little time."""
        super().setup()
        self._patience = threading.Timer(STRANGER_S, self._cut)
        self._patience.daemon = True
        self._patience.start()

    def finish(self) -> None:
        """Nobody is waited for any more."""
        self._patience.cancel()
        super().finish()

    def _cut(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self) -> None:
        """Facts."""
        if not self._is_known():
            return
        address = urlsplit(self.path)
        if address.path != "/facts":
            self._refuse(HTTPStatus.NOT_FOUND, "an agent tells /facts")
            return
        self._say(HTTPStatus.OK, _answered(lambda: self.server.agent.facts(dict(parse_qsl(address.query))))[0])

    def do_PUT(self) -> None:
        """A blob."""
        named = BLOB.fullmatch(self.path)
        if not self._is_known() or (n := self._length(self.server.agent.limits.body)) is None:
            return
        if named is None:
            self._refuse(HTTPStatus.NOT_FOUND, "blobs are put under /blobs/SHA256")
            return
        try:
            is_whole = self.server.agent.blobs.keep(named[1], self._pieces(n))
        except OSError as error:
            self._refuse(HTTPStatus.INSUFFICIENT_STORAGE, one_line(error))
            return
        if is_whole:
            self._say(HTTPStatus.CREATED, {})
        else:
            self._refuse(HTTPStatus.BAD_REQUEST, "the blob is not what its name says")

    def do_POST(self) -> None:
        """Work, with signs of life until it is done."""
        agent = self.server.agent
        kinds: dict[str, Callable[[dict[str, Any]], Any]] = {"/measure": agent.measure, "/many": agent.many, "/run": agent.run}
        if not self._is_known() or (n := self._length(MOST_REQUEST)) is None:
            return
        if self.path not in kinds:
            self._refuse(HTTPStatus.NOT_FOUND, f"an agent does {', '.join(kinds)}")
            return
        body = b"".join(self._pieces(n))
        self.send_response(HTTPStatus.OK)
        self.end_headers()
        job = Job(self.server.turn, lambda: kinds[self.path](_asked(body)))
        try:
            while not job.done.wait(HEARTBEAT_S):
                self.wfile.write(b" ")
        except OSError:  # nobody listens any more
            job.is_given_up = True
            raise
        answer, array = job.answer
        self.wfile.write(json.dumps(answer).encode() + b"\n")
        if array is not None:
            framed = io.BytesIO()
            write_array(framed, array)
            self._write(framed.getbuffer())

    def _write(self, content: memoryview) -> None:
        """In pieces, each of which may take SILENCE_S."""
        for start in range(0, len(content), PIECE):
            self.wfile.write(content[start : start + PIECE])

    def _is_known(self) -> bool:
        """Whether the other side knows the token; if not, it is told so."""
        given = self.headers.get("Authorization", "").encode("latin-1", "replace")
        if hmac.compare_digest(given, b"Bearer " + self.server.token):
            self._patience.cancel()
            return True
        self._refuse(HTTPStatus.UNAUTHORIZED, "the token is wrong")
        return False

    def _length(self, most: int) -> int | None:
        """Of the body; None where it is not told, or too much."""
        told = self.headers.get("Content-Length", "")
        if not told.isdecimal():
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "the length must be told")
        elif int(told) > most:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the agent takes {most} bytes at most, not {told}")
        else:
            return int(told)
        return None

    def _pieces(self, n: int) -> Iterator[bytes]:
        while n > 0 and (piece := self.rfile.read(min(n, PIECE))):
            n -= len(piece)
            yield piece

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        """Without use for what may follow, of which a little is read: else the answer may be lost with the connection."""
        self._say(status, {"error": reason})
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(LINGER_S)
            for _ in range(MOST_LINGERING):
                if not self.connection.recv(PIECE):
                    break

    def _say(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode() + b"\n")

    def version_string(self) -> str:
        """Strangers need not know more."""
        return "autocompress"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal that the agent was started from may be gone."""


def _asked(body: bytes) -> dict[str, Any]:
    request = json.loads(body)
    if not isinstance(request, dict):
        raise UsageError("a request must be a JSON object", hint="use autocompress")
    return request


def _answered(work: Callable[[], Any]) -> tuple[dict[str, Any], np.ndarray | None]:
    """What the work gives, or what went wrong in words that `RemoteCpu` understands."""
    try:
        answer = work()
    except Missing as missing:
        return {"failed": "missing", "digests": list(missing.args)}, None
    except PolicyFailure as failure:
        return {"failed": "policy", "message": failure.message}, None
    except DeviceUnavailable as gone:
        return {"failed": "device", "message": gone.message, "hint": gone.hint}, None
    except UsageError as error:
        return {"failed": "usage", "message": error.message, "hint": error.hint}, None
    except Exception as error:  # a request of another version, a bug: the agent lives on
        hint = "pack it again: autocompress agent --pack"
        return {"failed": "device", "message": f"the agent failed: {one_line(error)}", "hint": hint}, None
    return ({}, answer) if isinstance(answer, np.ndarray) else (answer, None)


class Server(ThreadingHTTPServer):
    """Listens; as many connections as are good for it, one request at a time is worked on."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], agent: Agent, token: bytes) -> None:
        super().__init__(address, Handler)
        self.agent, self.token, self.turn = agent, token, threading.Lock()
        self._room = threading.BoundedSemaphore(MOST_CONNECTIONS)

    def server_bind(self) -> None:
        """Without asking a name server what this device is called."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """Drop connections that are too many."""
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Make room when a connection ends."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks is no event, and anything else is not one for a terminal that may be gone."""


def token_of(file: Path | None, *, make: bool = False) -> bytes:
    """From AUTOCOMPRESS_TOKEN, or from a file, which an agent makes where it is not there: never from arguments, which everybody can list.

    Raises UsageError where there is none, it is no token, or an agent's file is not this user's alone.
    """
    given = os.environ.get("AUTOCOMPRESS_TOKEN")
    if given is None and file is not None:
        try:
            given = _made(file) if make else file.read_text(encoding="ascii")
        except (OSError, ValueError) as error:
            raise UsageError(f"the token in {str(file)!r} cannot be read: {one_line(error)}", hint="copy the agent's token file") from None
    if given is None:
        raise UsageError("an agent demands a token", hint="set AUTOCOMPRESS_TOKEN_FILE to a copy of its token file, or AUTOCOMPRESS_TOKEN")
    token = given.strip()
    if not TOKEN.fullmatch(token):
        raise UsageError(f"a token must be one line of {LEAST_TOKEN} or more printable ASCII characters", hint="let the agent make one")
    return token.encode()


def _made(file: Path) -> str:
    """The token in a file that nobody else may read; a new one where there is no file."""
    with contextlib.suppress(FileExistsError), os.fdopen(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as new:
        new.write(secrets.token_urlsafe(32) + "\n")
    known = file.stat()
    if known.st_uid != os.getuid() or known.st_mode & 0o077:
        raise UsageError(f"the token file {str(file)!r} must be yours alone", hint=f"chmod 600 {file}, or name another one")
    return file.read_text(encoding="ascii")


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
            if process.isdecimal() and left.stat().st_uid == os.getuid() and not _is_running(int(process)):
                shutil.rmtree(left, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:  # somebody else's is running all the same
        return isinstance(error, PermissionError)
    return True


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def listen(host: str, port: int, token_file: Path, limits: Limits, say: Callable[[str], None]) -> None:
    """Answer whoever knows the token until interrupted or told to end. Raises UsageError without a token or a free port."""
    signal.signal(signal.SIGTERM, _stop)
    where = "AUTOCOMPRESS_TOKEN" if "AUTOCOMPRESS_TOKEN" in os.environ else str(token_file)

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
