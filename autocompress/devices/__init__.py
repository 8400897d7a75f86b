"""Devices by name: `onnxruntime:cpu?threads=1`."""

from __future__ import annotations

import importlib.util
import os

from autocompress.devices.base import Device, DeviceProfile
from autocompress.errors import UsageError


def open_device(name: str) -> Device:
    """The device of a name. Raises UsageError for an unknown name or option, DeviceUnavailable when it is not there."""
    from autocompress.devices.onnxruntime import OnnxRuntimeCpu
    from autocompress.references import parse_reference

    base, options = parse_reference(name)
    if base != "onnxruntime:cpu":
        raise UsageError(f"unknown device {name!r}", hint="this machine has onnxruntime:cpu?threads=N")
    unknown = sorted(set(options) - {"threads"})
    if unknown:
        raise UsageError(f"unknown option {unknown[0]!r} of the device {name!r}", hint="it takes threads=N")
    threads, most = options.get("threads", "1"), os.cpu_count() or 1
    if not threads.isdecimal() or not 1 <= int(threads) <= most:
        raise UsageError(f"threads must lie in 1..{most}, but got {threads!r}", hint=f"this machine has {most} processors")
    return OnnxRuntimeCpu(int(threads))


def list_devices() -> list[dict[str, str | bool]]:
    """What this machine can measure with, and how to get what is missing."""
    here = importlib.util.find_spec("onnxruntime") is not None
    return [{"name": "onnxruntime:cpu?threads=1", "available": here, "note": "" if here else "pip install onnxruntime"}]


__all__ = ["Device", "DeviceProfile", "list_devices", "open_device"]
