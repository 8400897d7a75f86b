"""The libraries that run ONNX files on the CPU of the machine that they are on."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
"""By the name of the package, of Python and of PyPI."""
CURES = {"onnxruntime": "pip install onnxruntime", "openvino": 'pip install "autocompress[openvino]"'}
PLACE = ":cpu"
"""Ends the name of a device, but for its options."""


@dataclass(frozen=True)
class Runtime:
    """One of TITLES, and the number of threads that it may use."""

    name: str
    threads: int = 1

    @property
    def title(self) -> str:
        return TITLES[self.name]

    @property
    def device(self) -> str:
        """Name of the device that it makes of this machine's processor."""
        return f"{self.name}{PLACE}?threads={self.threads}"

    @property
    def is_here(self) -> bool:
        return importlib.util.find_spec(self.name) is not None

    @property
    def asked(self) -> dict[str, str | int]:
        """How a request to a child process names it."""
        return {"runtime": self.name, "threads": self.threads}
