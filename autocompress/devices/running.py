"""Runs a file over many batches: in one child process, and in more where that takes a while and the machine has cores for them."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import psutil

from autocompress.devices import processes
from autocompress.devices.frames import read_array, write_array
from autocompress.errors import PolicyFailure

AT_ONCE_S = 0.05
"""Batches travel to a process and back together as long as these take less: a journey takes longer than a small network."""
ALONE_S = 0.5
"""Until then a process works alone: another one takes about as long to start."""
MOST_PROCESSES = 16
PROCESS_BYTES, PROCESS_FILES = 2**29, 4
"""What a process may take in memory, about: so much, and the size of its file so many times."""


def outputs_of(path: Path, threads: int, batches: Iterable[np.ndarray]) -> np.ndarray:
    """First output of a file for each batch of inputs, one below the other.

    Raises PolicyFailure when the runtime cannot run the file, crashes or hangs.
    """
    work, begun = _Work(batches), time.monotonic()
    helpers: list[Future[None]] = []
    count = _affordable(path, threads) - 1
    with ThreadPoolExecutor(max(1, count)) as pool:
        try:
            for _ in _journeys(path, threads, work):
                if not helpers and time.monotonic() - begun > ALONE_S:
                    helpers = [pool.submit(_help, path, threads, work) for _ in range(count)]
            for helper in helpers:
                helper.result()
        finally:
            work.end()
    return work.outputs()


def _affordable(path: Path, threads: int) -> int:
    """Processes that the machine has cores and memory for."""
    size = path.stat().st_size if path.is_file() else 0
    room = psutil.virtual_memory().available // (PROCESS_BYTES + PROCESS_FILES * size)
    return max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // threads, room))


class _Work:
    """Batches that several threads take in turns, and what became of them."""

    def __init__(self, batches: Iterable[np.ndarray]) -> None:
        self._waiting = enumerate(batches)
        self._done: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def take(self, n: int) -> tuple[int, list[np.ndarray]]:
        """(the number of the first, up to `n` batches): none when all are taken."""
        with self._lock:
            taken = list(itertools.islice(self._waiting, n))
        return (taken[0][0] if taken else 0), [batch for _, batch in taken]

    def put(self, first: int, outputs: np.ndarray) -> None:
        """Outputs of the batches that were taken together, as batches x rows x ..."""
        self._done[first] = outputs.reshape(-1, *outputs.shape[2:])

    def end(self) -> None:
        """Nobody is given anything any more."""
        with self._lock:
            self._waiting = enumerate(())

    def outputs(self) -> np.ndarray:
        """Of all batches, in their order."""
        return np.concatenate([self._done[first] for first in sorted(self._done)])


def _help(path: Path, threads: int, work: _Work) -> None:
    for _ in _journeys(path, threads, work):
        pass


def _journeys(path: Path, threads: int, work: _Work) -> Iterator[None]:
    """Take more and more batches at once to a process of its own, until those of one journey take AT_ONCE_S. Raises PolicyFailure."""
    at_once, line = 1, processes.line({"kind": "run", "path": str(path), "threads": threads}).encode()
    with tempfile.TemporaryFile() as complaints:
        child = subprocess.Popen(
            processes.COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, env=processes.environment()
        )
        assert child.stdin is not None
        with child:
            try:
                while (taken := work.take(at_once))[1]:
                    first, inputs = taken
                    begun = time.monotonic()
                    outputs = _answer(child, line, np.stack(inputs))
                    line = b""
                    if outputs is None:
                        raise _stopped(child, path, time.monotonic() - begun, complaints)
                    work.put(first, outputs)
                    at_once *= 2 if time.monotonic() - begun < AT_ONCE_S else 1
                    yield
            finally:
                child.kill()
                with contextlib.suppress(BrokenPipeError):  # what it has not read
                    child.stdin.close()


def _answer(child: subprocess.Popen[bytes], line: bytes, inputs: np.ndarray) -> np.ndarray | None:
    """What the process makes of the inputs after a line with a request; None when it ends over them, or has to be ended after TIMEOUT_S."""
    assert child.stdin is not None and child.stdout is not None
    guard = threading.Timer(processes.TIMEOUT_S, child.kill)
    guard.start()
    try:
        child.stdin.write(line)
        write_array(child.stdin, inputs)
        return read_array(child.stdout)
    except BrokenPipeError:
        return None
    finally:
        guard.cancel()


def _stopped(child: subprocess.Popen[bytes], path: Path, seconds: float, complaints: IO[bytes]) -> PolicyFailure:
    """Why the process has ended while it ran a file."""
    if seconds >= processes.TIMEOUT_S:
        return PolicyFailure(f"the runtime must answer within {processes.TIMEOUT_S:.0f} s, but does not for {path.name}")
    code = child.wait()
    if code < 0:
        return processes.crashed(code)
    complaints.seek(0)
    return PolicyFailure(f"ONNX Runtime cannot run {path.name}: {processes.last_line(complaints.read().decode(errors='replace'))}")
