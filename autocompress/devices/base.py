"""Device: a runtime on a machine that runs exported files and measures them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autocompress.devices.frames import Feed
from autocompress.devices.runtime import EXACT, TITLES, Runtime
from autocompress.devices.timing import summarise
from autocompress.errors import PolicyFailure
from autocompress.record import Record
from autocompress.records import Measurement

MOST_A_FILE_S = 120.0
"""Until then a file is called: calls of up to an eighth of it are warmed up and give six rounds."""
LEAST_BUSY = 0.95
"""Share of the time that a process has a processor while it is measured: with less its latencies are those of a shared machine."""


def identity(environment: dict[str, str]) -> dict[str, str]:
    """What of an environment must be the same for latencies to be compared, and for int8 to be computed alike."""
    usual = {"precision": EXACT} if any(runtime in environment for runtime in TITLES) else {}  # of before it was told
    return usual | {key: value for key, value in environment.items() if key in ("processor", "flags", "precision", *TITLES)}


class DeviceProfile(Record):
    """What a device can do, as far as it shapes the search space.

    is_exact: what is in float32 is computed so. bits: weight bits that have kernels. channel_multiple: channel counts are rounded to it,
    since kernels work in vectors. reduced_range: int8 weights must stay within [-64, 64] because the multiply-add saturates.
    """

    runtime: str
    threads: int = 1
    is_exact: bool = True
    bits: tuple[int, ...] = (8, 32)
    channel_multiple: int = 8
    reduced_range: bool = False
    note: str = ""


def profile_of(runtime: Runtime, *, saturates: bool) -> DeviceProfile:
    """What a runtime can do on a processor whose int8 products saturate, or do not."""
    note = "x86 without VNNI: int8 weights use 7 bits" if saturates else ""
    return DeviceProfile(runtime=runtime.name, threads=runtime.threads, is_exact=runtime.is_exact, reduced_range=saturates, note=note)


def measurements(answer: dict[str, Any], paths: Sequence[Path], runtime: Runtime, environment: dict[str, str]) -> list[Measurement]:
    """What a process that was to measure has answered (`devices/child.py`). Raises PolicyFailure where it could not run a file."""
    if "error" in answer:
        raise PolicyFailure(f"{runtime.title} cannot run {paths[answer['index']].name}: {answer['error']}")
    samples = zip(answer["rounds"], answer["firsts"], strict=True)
    found = [summarise(rounds, first_call=first, environment=environment) for rounds, first in samples]
    if runtime.threads > 1 or answer["busy"] >= LEAST_BUSY:  # several threads wait for each other
        return found
    return [latency.mistrusted(f"other programs took {100 * (1 - answer['busy']):.0f} % of the processor's time") for latency in found]


class Device(ABC):
    """One runtime on one machine. Not thread-safe; measuring is exclusive on the machine."""

    name: str
    profile: DeviceProfile
    say: Callable[[str], None] = staticmethod(lambda text: None)
    """Told what a person who waits for it should know; who opens it may listen."""

    @abstractmethod
    def run(self, path: Path, batches: Iterable[Feed]) -> np.ndarray:
        """First output of a file for each batch, one below the other; batches are of the size that the file takes.

        With the threads that it is measured with, perhaps in several processes; `batches` may be drawn in other threads, one at a time.
        Raises PolicyFailure when the runtime cannot run the file, crashes or hangs.
        """

    @abstractmethod
    def measure(self, paths: Sequence[Path], *, seconds_each: float = 1.0) -> list[Measurement]:
        """Measure files interleaved, so that drift of the machine meets all of them; one Measurement a file, in order.

        Raises PolicyFailure when the runtime cannot run a file, DeviceUnavailable when the runtime itself is gone.
        """

    @abstractmethod
    def measure_many(self, models: Sequence[bytes], *, seconds_each: float = 0.02) -> list[float | None]:
        """Median seconds of many small ONNX models, one after the other and quickly; None for those that do not run, or not in time."""

    @abstractmethod
    def environment(self) -> dict[str, str]:
        """What a reader must know to judge the numbers: processor, threads, governor, load, versions."""
