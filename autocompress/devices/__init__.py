"""Devices by name: `onnxruntime:cpu?threads=1`, `openvino:cpu`."""

from __future__ import annotations

from autocompress.devices import processor
from autocompress.devices.base import Device, DeviceProfile
from autocompress.devices.runtime import CURES, PLACE, TITLES, Runtime
from autocompress.errors import UsageError


def open_device(name: str) -> Device:
    """The device of a name. Raises UsageError for an unknown name or option, DeviceUnavailable when it is not there."""
    from autocompress.devices.local import LocalCpu
    from autocompress.references import nearest, parse_reference

    base, options = parse_reference(name)
    known = [f"{runtime}{PLACE}" for runtime in TITLES]
    if base not in known:
        raise UsageError(f"unknown device {name!r}", hint=nearest(base, known))
    unknown = sorted(set(options) - {"threads"})
    if unknown:
        raise UsageError(f"unknown option {unknown[0]!r} of the device {name!r}", hint="it takes threads=N")
    threads, most = options.get("threads", "1"), processor.usable()
    if not threads.isdecimal() or not 1 <= int(threads) <= most:
        raise UsageError(f"threads must lie in 1..{most}, but got {threads!r}", hint=f"this process may use {most} processors")
    return LocalCpu(Runtime(base.removesuffix(PLACE), int(threads)))


def list_devices() -> list[dict[str, str | bool]]:
    """What this machine can measure with, and how to get what is missing."""
    return [
        {"name": runtime.device, "available": runtime.is_here, "note": runtime.title if runtime.is_here else CURES[runtime.name]}
        for runtime in map(Runtime, TITLES)
    ]


__all__ = ["Device", "DeviceProfile", "list_devices", "open_device"]
