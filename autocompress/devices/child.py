"""The process that runs a model: reads a line of JSON from stdin, a request, and answers on stdout.

A request to measure is answered by one JSON object; a request to run by an array of outputs for every array of inputs that follows it.
Nothing of torch is imported, and a crash, a leak or a hang of the runtime stays here. Ends when its parent does.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import random
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

import numpy as np

from autocompress.devices.frames import read_array, write_array
from autocompress.devices.sessions import Input, Session, open_session
from autocompress.devices.wire import refers_elsewhere
from autocompress.errors import one_line
from autocompress.system import machine

WARM_UP_CAP_S = 2.0
STABLE = 0.02
SAMPLES_A_ROUND = 5
LEAST_ROUNDS = 12
LEAST_SAMPLE_S = 50e-6
SLOW_CALL_S = 0.02
"""A call that takes longer is timed once a round: what the caches hold at its start does not matter."""
ROUNDS_CAP_S = 20.0
"""Seconds a file after which the fewest rounds are enough that a median is measured with."""
PR_SET_PDEATHSIG, PARENT_POLL_S = 1, 1.0
MOST_WRITTEN = 2**20
"""Bytes of complaints of a process that runs somebody else's files; it has nothing else to write."""


class Runner:
    """One session with random inputs of its declared types and shapes."""

    def __init__(self, session: Session) -> None:
        self.session = session
        generator = np.random.default_rng(0)
        self.feeds = {value.name: _random(value, generator) for value in session.inputs}
        self.calls = 1
        self.is_slow = False

    def sample(self) -> float:
        """Seconds of one call, averaged over `calls` where one is too short for the clock."""
        start = time.perf_counter()
        for _ in range(self.calls):
            self.session.run(self.feeds)
        return (time.perf_counter() - start) / self.calls

    def warm_up(self, cap: float) -> float:
        """Run until the median of five samples changes by less than 2 %, slow calls until `cap`; seconds of the first call."""
        first = now = self.sample()
        end, before = time.perf_counter() + cap, 0.0
        while time.perf_counter() < end:
            now = float(np.median(self._five(end)))
            if abs(now - before) < STABLE * now:
                break
            before = now
        self.is_slow = now > SLOW_CALL_S
        if not self.is_slow:
            self.calls = max(1, int(np.ceil(LEAST_SAMPLE_S / max(now, 1e-9))))
        return first

    def _five(self, end: float) -> list[float]:
        """Five samples, or those that slow calls give until `end`."""
        samples = [self.sample()]
        while len(samples) < 5 and not (samples[-1] > SLOW_CALL_S and time.perf_counter() >= end):
            samples.append(self.sample())
        return samples

    def round(self) -> list[float]:
        """The samples of one round."""
        if self.is_slow:
            return [self.sample()]
        self.sample()  # the previous file has filled the caches
        return [self.sample() for _ in range(SAMPLES_A_ROUND)]


def _random(value: Input, generator: np.random.Generator) -> Any:
    if np.issubdtype(value.dtype, np.floating):
        return generator.standard_normal(value.shape).astype(value.dtype)
    return generator.integers(0, 2, value.shape).astype(value.dtype)


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Interleaved rounds over all files, in a new random order each round; an error for a file that does not run or is too slow.

    `busy` is the share of the time in which this process had a processor: what others take of it makes every call longer alike.
    """
    runners: list[Runner] = []
    firsts: list[float] = []
    hard_end = time.perf_counter() + request["most_s"]
    for index, path in enumerate(request["paths"]):
        try:
            runners.append(Runner(_opened(request, path)))
            firsts.append(runners[-1].warm_up(WARM_UP_CAP_S))
        except Exception as error:
            return {"error": one_line(error), "index": index}
    wall, own = time.perf_counter(), time.process_time()
    rounds = _interleaved(runners, request["seconds_each"], request["fewest_rounds"], hard_end)
    busy = (time.process_time() - own) / max(time.perf_counter() - wall, 1e-9)
    if not all(rounds):
        slowest = int(np.argmax(firsts))
        return {"error": f"no round fits into {request['most_s']:.0f} s: its first call took {firsts[slowest]:.0f} s", "index": slowest}
    return {"rounds": rounds, "firsts": firsts, "busy": busy}


def _interleaved(runners: list[Runner], seconds_each: float, fewest: int, hard_end: float) -> list[list[list[float]]]:
    """Rounds of each runner: for `seconds_each`, then up to LEAST_ROUNDS; after a cap the `fewest`, after `hard_end` what there is."""
    order, shuffle = list(range(len(runners))), random.Random(0)
    rounds: list[list[list[float]]] = [[] for _ in runners]
    start, done = time.perf_counter(), 0
    end, cap = start + seconds_each * len(runners), start + ROUNDS_CAP_S * len(runners)
    while time.perf_counter() < end or done < (LEAST_ROUNDS if time.perf_counter() < cap else fewest):
        shuffle.shuffle(order)
        for index in order:
            if time.perf_counter() > hard_end:
                return rounds
            rounds[index].append(runners[index].round())
        done += 1
    return rounds


def measure_many(request: dict[str, Any]) -> dict[str, Any]:
    """Median seconds of each small model; null for those that the runtime refuses, or that there is no time for."""
    medians: list[float | None] = []
    hard_end = time.perf_counter() + request["most_s"]
    for encoded in request["models"]:
        if time.perf_counter() > hard_end:
            medians.append(None)
            continue
        try:
            runner = Runner(_opened(request, base64.b64decode(encoded)))
            runner.warm_up(request["seconds_each"])
            end, samples = time.perf_counter() + request["seconds_each"], [runner.sample()]
            while time.perf_counter() < end:
                samples.append(runner.sample())
            medians.append(float(np.median(samples)))
        except Exception:
            medians.append(None)
    return {"medians": medians}


def run(request: dict[str, Any], answers: IO[bytes]) -> None:
    """Read from stdin, until it ends, an array (batches x rows x ...) for each input of the file; answer each time with the outputs."""
    session = _opened(request, request["path"])
    names = [value.name for value in session.inputs]
    if len(names) != request["inputs"]:
        raise ValueError(f"the file has {len(names)} inputs, but is given {request['inputs']}")
    while (first := read_array(sys.stdin.buffer)) is not None:
        others = (read_array(sys.stdin.buffer) for _ in names[1:])
        columns = [first, *(array for array in others if array is not None)]
        write_array(answers, np.stack([session.run(dict(zip(names, arrays, strict=True))) for arrays in zip(*columns, strict=True)]))


def _opened(request: dict[str, Any], model: str | bytes) -> Session:
    """A file or its content; of somebody else's the content, which must hold all that belongs to it. Raises what the runtime does."""
    if "folder" in request:
        model = Path(model).read_bytes() if isinstance(model, str) else model
        if refers_elsewhere(model):
            raise ValueError("the file must be an ONNX model that holds its weights itself")
    return open_session(request["runtime"], model, request["threads"], request["precision"])


def confine(request: dict[str, Any]) -> None:
    """Where a file is somebody else's, work in an empty folder and take no more memory than was allowed."""
    if "folder" not in request:
        return
    os.chdir(request["folder"])
    for limit, allowed in ((resource.RLIMIT_DATA, request["most_bytes"]), (resource.RLIMIT_FSIZE, MOST_WRITTEN), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(limit)[1]
        most = allowed if hard == resource.RLIM_INFINITY else min(allowed, hard)
        resource.setrlimit(limit, (most, most))


def pin(threads: int) -> None:
    """Stay on the processors that are measured. Not every system can pin."""
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setaffinity(0, machine.fastest_cpus(threads))


def end_with(parent: int) -> None:
    """End this process when its parent is gone, which its death must not leave to disturb other measurements."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):  # systems other than Linux
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    os._exit(1)


def main() -> None:
    """Answer one request."""
    request = json.loads(sys.stdin.buffer.readline())
    end_with(request["parent"])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a runtime prints is no answer
    if os.getppid() != request["parent"]:  # the parent died before it could be tied to this process
        return
    confine(request)
    if request["kind"] == "run":
        run(request, answers)
        return
    pin(request["threads"])
    answer = measure(request) if request["kind"] == "measure" else measure_many(request)
    answers.write(json.dumps(answer).encode())
    answers.flush()


if __name__ == "__main__":
    main()
