"""Runs a file over many batches: in one child process, and in more where that takes a while and the machine has cores for them."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO

import numpy as np

from autocompress.devices import processes, processor
from autocompress.devices.frames import Feed, read_array, stacked, write_array
from autocompress.devices.runtime import Runtime
from autocompress.errors import PolicyFailure
from autocompress.system import machine

AT_ONCE_S = 0.05
"""Batches travel to a process and back together as long as these take less: a journey takes longer than a small network."""
ALONE_S = 0.5
"""Until then a process works alone: another one takes about as long to start."""
MOST_PROCESSES, ENDING_S = 16, 10.0
Batches = list[tuple[int, Feed]]
"""Each with its number."""


def outputs_of(path: Path, runtime: Runtime, batches: Iterable[Feed]) -> np.ndarray:
    """First output of a file for each batch, one below the other.

    A helper that fails costs nothing but time: the first process does its batches too.
    Raises PolicyFailure when the runtime cannot run the file, crashes or hangs.
    """
    work, begun = _Work(batches), time.monotonic()
    helpers: list[Future[None]] = []
    with ThreadPoolExecutor(MOST_PROCESSES) as pool:
        try:
            while True:
                for child in _journeys(path, runtime, work):
                    if not helpers and time.monotonic() - begun > ALONE_S:
                        helpers = [pool.submit(_help, path, runtime, work) for _ in range(_helpers(child.pid, runtime.threads))]
                if not work.is_broken:
                    wait(helpers)
                if not work.is_left:
                    return work.outputs()
        finally:
            work.end()


def _helpers(pid: int, threads: int) -> int:
    """Processes like this one that the machine has cores and memory for, beside it; none where that is not known."""
    free = machine.free_bytes()
    try:
        import psutil

        free = psutil.virtual_memory().available if free is None else free
        taken = psutil.Process(pid).memory_info().rss
    except ImportError:  # on a device that has an agent only
        taken = processor.resident_bytes(pid)
    except psutil.Error:
        return 0
    room = (free or 0) // max(1, taken)
    return max(0, min(MOST_PROCESSES, machine.usable() // threads - 1, room // 2))


class _Work:
    """Batches that several threads take in turns, the processes that they give them to, and what became of them."""

    def __init__(self, batches: Iterable[Feed]) -> None:
        self._waiting = enumerate(batches)
        self._back: Batches = []
        self._done: dict[int, np.ndarray] = {}
        self._children: list[subprocess.Popen[bytes]] = []
        self._error: BaseException | None = None
        self._lock = threading.Lock()

    def take(self, n: int) -> Batches:
        """Up to `n` batches; none when all are taken, or the next one could not be made."""
        with self._lock:
            taken, self._back = self._back[:n], self._back[n:]
            try:
                taken += itertools.islice(self._waiting, n - len(taken))
            except BaseException as error:  # whatever makes the inputs; `outputs` raises it
                self._error = error
                self._waiting, taken = enumerate(()), []
        return taken

    def give_back(self, taken: Batches) -> None:
        """Batches that a process failed over."""
        with self._lock:
            self._back += taken

    @property
    def is_left(self) -> bool:
        """Whether batches were given back, and nobody has done them since."""
        return bool(self._back) and not self.is_broken

    @property
    def is_broken(self) -> bool:
        """Whether what makes the inputs has raised something."""
        return self._error is not None

    def put(self, taken: Batches, outputs: np.ndarray) -> None:
        """Outputs of the batches, as batches x rows x ..."""
        self._done.update(zip((number for number, _ in taken), outputs, strict=True))

    def employ(self, child: subprocess.Popen[bytes]) -> None:
        """A process that is given batches, to be ended with the work."""
        self._children.append(child)

    def end(self) -> None:
        """Nobody is given anything any more, and no process goes on with what it was given."""
        with self._lock:
            self._waiting, self._back = enumerate(()), []
        for child in self._children:
            child.kill()

    def outputs(self) -> np.ndarray:
        """Of all batches, in their order. Raises what the inputs raised."""
        if self._error is not None:
            raise self._error
        return np.concatenate([self._done[number] for number in sorted(self._done)])


def _help(path: Path, runtime: Runtime, work: _Work) -> None:
    with contextlib.suppress(PolicyFailure, OSError, MemoryError):  # no memory, no more processes: the first one is there
        for _ in _journeys(path, runtime, work):
            pass


def _journeys(path: Path, runtime: Runtime, work: _Work) -> Iterator[subprocess.Popen[bytes]]:
    """Take more and more batches at once to a process of its own, until those of one journey take AT_ONCE_S. Raises PolicyFailure."""
    at_once, is_asked = 1, False
    with tempfile.TemporaryFile() as complaints:
        child = subprocess.Popen(
            processes.COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, env=processes.environment()
        )
        assert child.stdin is not None
        work.employ(child)
        taken: Batches = []
        with child:
            try:
                while taken := work.take(at_once):
                    begun = time.monotonic()
                    line = b"" if is_asked else _request(path, runtime, inputs=len(taken[0][1]))
                    outputs = _answer(child, line, stacked([batch for _, batch in taken]))
                    is_asked = True
                    if outputs is None:
                        raise _stopped(child, runtime, path, time.monotonic() - begun, complaints)
                    work.put(taken, outputs)
                    taken = []
                    at_once *= 2 if time.monotonic() - begun < AT_ONCE_S else 1
                    yield child
            finally:
                work.give_back(taken)  # what it has failed over, in whatever way
                child.kill()
                with contextlib.suppress(BrokenPipeError):  # what it has not read
                    child.stdin.close()


def _request(path: Path, runtime: Runtime, *, inputs: int) -> bytes:
    """inputs: how many arrays each batch consists of."""
    return processes.line({"kind": "run", "path": str(path), "inputs": inputs} | runtime.asked).encode()


def _answer(child: subprocess.Popen[bytes], line: bytes, inputs: Feed) -> np.ndarray | None:
    """What the process makes of the inputs after a line with a request; None when it ends over them, or has to be ended after TIMEOUT_S."""
    assert child.stdin is not None and child.stdout is not None
    guard = threading.Timer(processes.TIMEOUT_S, child.kill)
    guard.start()
    try:
        child.stdin.write(line)
        for array in inputs:
            write_array(child.stdin, array)
        return read_array(child.stdout)
    except BrokenPipeError:
        return None
    finally:
        guard.cancel()


def _stopped(child: subprocess.Popen[bytes], runtime: Runtime, path: Path, seconds: float, complaints: IO[bytes]) -> PolicyFailure:
    """Why the process has ended while it ran a file."""
    if seconds >= processes.TIMEOUT_S:
        return PolicyFailure(f"the runtime must answer within {processes.TIMEOUT_S:.0f} s, but does not for {path.name}")
    try:
        code = child.wait(ENDING_S)
    except subprocess.TimeoutExpired:  # it is there, and has said something else
        return PolicyFailure(f"{runtime.title} must answer with an array, but for {path.name} its process did not")
    if code < 0:
        return processes.crashed(code)
    complaints.seek(0)
    return PolicyFailure(f"{runtime.title} cannot run {path.name}: {processes.last_line(complaints.read().decode(errors='replace'))}")
