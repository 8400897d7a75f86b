"""The HTTP side of an agent: who may ask, how much, and how an answer travels.

    GET  /facts?runtime=NAME&threads=N&precision=P      what the device is
    PUT  /blobs/SHA256                      keep these bytes
    POST /measure, /many, /run              JSON; the answer is spaces while it works, then a line of JSON, and of /run an array after it

Each connection is closed after its answer, whose end that is.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import re
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import parse_qsl, urlsplit

import numpy as np

from autocompress.devices.blobs import Blobs
from autocompress.devices.frames import framed
from autocompress.devices.protocol import HEARTBEAT_S, MOST_REQUEST, answered
from autocompress.errors import UsageError, one_line

BLOB = re.compile(r"/blobs/([0-9a-f]{64})")
SILENCE_S = 60.0
"""After so long a connection that says nothing is dropped..."""
STRANGER_S = 10.0
"""... and after so long one that has not told the token, whatever it says."""
MOST_CONNECTIONS = 16
PIECE = 2**16
LINGER_S, MOST_LINGERING = 1.0, 64
"""Seconds and pieces that are waited for after a refusal."""


class Service(Protocol):
    """What answers requests: see `Agent`."""

    blobs: Blobs
    most_bytes: int

    def facts(self, query: dict[str, Any]) -> dict[str, Any]: ...

    def measure(self, request: dict[str, Any]) -> dict[str, Any]: ...

    def many(self, request: dict[str, Any]) -> dict[str, Any]: ...

    def run(self, request: dict[str, Any]) -> np.ndarray: ...


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
                self.answer = answered(work)
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
        self._say(HTTPStatus.OK, answered(lambda: self.server.agent.facts(dict(parse_qsl(address.query))))[0])

    def do_PUT(self) -> None:
        """A blob."""
        named = BLOB.fullmatch(self.path)
        if not self._is_known() or (n := self._length(self.server.agent.most_bytes)) is None:
            return
        if named is None:
            self._refuse(HTTPStatus.NOT_FOUND, "blobs are put under /blobs/SHA256")
            return
        try:
            is_whole = self.server.agent.blobs.keep(named[1], self._pieces(n), n)
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
            line, content = framed(array)
            self.wfile.write(line)
            self._write(content)

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


class Server(ThreadingHTTPServer):
    """Listens; as many connections as are good for it, one request at a time is worked on."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], agent: Service, token: bytes) -> None:
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
