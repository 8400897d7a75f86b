"""The libraries that run ONNX files on the CPU of the machine that they are on."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from importlib import metadata

from autocompress.devices import processor
from autocompress.system import machine

TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
"""By the name of the package, of Python and of PyPI."""
CURES = {"onnxruntime": "pip install onnxruntime", "openvino": 'pip install "autocompress[openvino]"'}
PLACE = ":cpu"
"""Ends the name of a device, but for its options."""
EXACT = "f32"
PRECISIONS = {"onnxruntime": (EXACT,), "openvino": (EXACT, "bf16")}
"""In which a runtime may compute what is not int8 in a file: by rounding it, the second takes half of the time on processors that can."""


@dataclass(frozen=True)
class Guard:
    """What limits a process that runs somebody else's files: it reads them into memory first, and then works in an empty folder.

    Args:
        folder: which is empty.
        most_bytes: of the memory that it may take.
    """

    folder: str
    most_bytes: int


@dataclass(frozen=True)
class Runtime:
    """One of TITLES, and the number of threads that it may use."""

    name: str
    threads: int = 1
    guard: Guard | None = None
    precision: str = EXACT

    @property
    def title(self) -> str:
        return TITLES[self.name]

    @property
    def device(self) -> str:
        """Name of the device that it makes of this machine's processor."""
        return f"{self.name}{PLACE}?threads={self.threads}" + ("" if self.is_exact else f"&precision={self.precision}")

    @property
    def is_exact(self) -> bool:
        """Whether it computes in float32 what is in float32."""
        return self.precision == EXACT

    @property
    def is_here(self) -> bool:
        return importlib.util.find_spec(self.name) is not None

    @property
    def can_compute(self) -> bool:
        """Whether this processor has instructions for the precision: without, the runtime silently computes in float32."""
        if self.is_exact:
            return True
        import openvino

        return self.precision.upper() in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")

    @property
    def asked(self) -> dict[str, str | int]:
        """How a request to a child process names it."""
        asked: dict[str, str | int] = {"runtime": self.name, "threads": self.threads, "precision": self.precision}
        return asked if self.guard is None else asked | {"folder": self.guard.folder, "most_bytes": self.guard.most_bytes}

    def environment(self) -> dict[str, str]:
        """What a reader must know to judge what it measures here."""
        return {
            "processor": processor.name(),
            "flags": " ".join(processor.listed_flags()),
            "cpus": str(os.cpu_count()),
            "governor": processor.governor() or processor.UNKNOWN,
            "turbo": processor.turbo(),
            "temperature": processor.temperature(),
            "load": f"{os.getloadavg()[0]:.2f}",
            "threads": str(self.threads),
            "measured_on": _measured_on(self.threads),
            "precision": self.precision,
            self.name: _version(self.name),
            "python": platform.python_version(),
            "system": platform.platform(),
        }


def _measured_on(threads: int) -> str:
    """The processors that files are measured on, by number."""
    try:
        return ",".join(map(str, machine.fastest_cpus(threads)))
    except (AttributeError, OSError):
        return "any"


def _version(module: str) -> str:
    """Of the distribution that has brought a module: wheels of vendors are called otherwise than what they hold."""
    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:
        brought = metadata.packages_distributions().get(module, [])
        return f"{brought[0]} {metadata.version(brought[0])}" if brought else "of unknown version"
