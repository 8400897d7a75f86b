"""Device: a runtime on a machine that runs exported files and measures them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from autocompress.policy import Record
from autocompress.records import Measurement


class DeviceProfile(Record):
    """What a device can do, as far as it shapes the search space.

    bits: weight bits that have kernels. channel_multiple: channel counts are rounded to it, since kernels work in vectors.
    reduced_range: int8 weights must stay within [-64, 64] because the multiply-add saturates.
    """

    runtime: str
    threads: int = 1
    bits: tuple[int, ...] = (8, 32)
    channel_multiple: int = 8
    reduced_range: bool = False
    note: str = ""


class Device(ABC):
    """One runtime on one machine. Not thread-safe; measuring is exclusive on the machine."""

    name: str
    profile: DeviceProfile

    @abstractmethod
    def run(self, path: Path, batches: Iterable[np.ndarray]) -> np.ndarray:
        """First output of a file for each batch of inputs, one below the other; batches are of the size that the file takes.

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
