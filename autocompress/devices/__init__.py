"""Devices by name: `onnxruntime:cpu?threads=1`, `openvino:cpu`, `agent://host:7878?runtime=onnxruntime`."""

from __future__ import annotations

from autocompress.devices import processor
from autocompress.devices.base import Device, DeviceProfile
from autocompress.devices.runtime import CURES, PLACE, TITLES, Runtime
from autocompress.errors import UsageError


def open_device(name: str) -> Device:
    """The device of a name. Raises UsageError for an unknown name or option, DeviceUnavailable when it is not there."""
    from autocompress.devices.local import LocalCpu
    from autocompress.references import AGENT, nearest, parse_reference

    base, options = parse_reference(name)
    is_remote, known = base.startswith(AGENT), [f"{runtime}{PLACE}" for runtime in TITLES]
    if not is_remote and base not in known:
        raise UsageError(f"unknown device {name!r}", hint=nearest(base, known))
    _require_options(name, options, {"threads", "runtime"} if is_remote else {"threads"})
    if is_remote:
        from autocompress.devices.remote import open_agent

        return open_agent(base.removeprefix(AGENT), options)
    threads, most = int(options.get("threads", "1")), processor.usable()
    if threads > most:
        raise UsageError(f"threads must lie in 1..{most}, but got {threads}", hint=f"this process may use {most} processors")
    return LocalCpu(Runtime(base.removesuffix(PLACE), threads))


def _require_options(name: str, options: dict[str, str], known: set[str]) -> None:
    """Raises UsageError for an option that the device does not take, or takes other values of."""
    unknown = sorted(set(options) - known)
    if unknown:
        raise UsageError(f"unknown option {unknown[0]!r} of the device {name!r}", hint=f"it takes {'=, '.join(sorted(known))}=")
    threads, runtime = options.get("threads", "1"), options.get("runtime", "onnxruntime")
    if not threads.isdecimal() or int(threads) < 1:
        raise UsageError(f"threads must be a number from 1 on, but got {threads!r}", hint="for example threads=1")
    if runtime not in TITLES:
        raise UsageError(f"unknown runtime {runtime!r} of the device {name!r}", hint=f"it is one of {', '.join(TITLES)}")


def list_devices() -> list[dict[str, str | bool]]:
    """What this machine can measure with, and how to get what is missing."""
    return [
        {"name": runtime.device, "available": runtime.is_here, "note": runtime.title if runtime.is_here else CURES[runtime.name]}
        for runtime in map(Runtime, TITLES)
    ]


__all__ = ["Device", "DeviceProfile", "list_devices", "open_device"]
