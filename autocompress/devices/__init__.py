"""Devices by name: `onnxruntime:cpu?threads=1`, `openvino:cpu`, `agent://host:7878?runtime=onnxruntime`."""

from __future__ import annotations

from dataclasses import replace

from autocompress.devices.base import Device, DeviceProfile
from autocompress.devices.runtime import CURES, EXACT, PLACE, PRECISIONS, TITLES, Runtime
from autocompress.errors import UsageError
from autocompress.system import machine

MOST_THREADS = 1024
"""That a device elsewhere is asked for: it knows itself how many it has."""


def open_device(name: str) -> Device:
    """The device of a name. Raises UsageError for what this machine does not have, DeviceUnavailable where another one does not answer."""
    from autocompress.devices.local import LocalCpu
    from autocompress.references import AGENT, nearest, parse_reference

    base, options = parse_reference(name)
    is_remote, known = base.startswith(AGENT), [f"{runtime}{PLACE}" for runtime in TITLES]
    if not is_remote and base not in known:
        raise UsageError(f"unknown device {name!r}", hint=nearest(base, known))
    if is_remote:
        from autocompress.devices.remote import open_agent

        _require_options(name, options, {"threads", "runtime", "precision"}, most=None)
        return open_agent(base.removeprefix(AGENT), options)
    runtime = base.removesuffix(PLACE)
    _require_options(name, options, {"threads", "precision"}, most=machine.usable(), runtime=runtime)
    return LocalCpu(Runtime(runtime, int(options.get("threads", "1")), precision=options.get("precision", EXACT)))


def _require_options(name: str, options: dict[str, str], known: set[str], most: int | None, runtime: str | None = None) -> None:
    """Raises UsageError for an option that the device does not take, or takes other values of.

    most: threads, where that is known here. runtime: where no option names it.
    """
    unknown = sorted(set(options) - known)
    if unknown:
        raise UsageError(f"unknown option {unknown[0]!r} of the device {name!r}", hint=f"it takes {'=, '.join(sorted(known))}=")
    threads, runtime = options.get("threads", "1"), runtime or options.get("runtime", "onnxruntime")
    if not threads.isdecimal() or not 1 <= int(threads) <= (most or MOST_THREADS):
        hint = f"this process may use {most} processors" if most is not None else "for example threads=1"
        raise UsageError(f"threads must lie in 1..{most or MOST_THREADS}, but got {threads!r}", hint=hint)
    if runtime not in TITLES:
        raise UsageError(f"unknown runtime {runtime!r} of the device {name!r}", hint=f"it is one of {', '.join(TITLES)}")
    precision = options.get("precision", EXACT)
    if precision not in PRECISIONS[runtime]:
        hint = f"that is what {' or '.join(known for known in TITLES if precision in PRECISIONS[known]) or 'no runtime here'} takes"
        raise UsageError(f"precision must be {' or '.join(PRECISIONS[runtime])} with {TITLES[runtime]}, but got {precision!r}", hint=hint)


def list_devices() -> list[dict[str, str | bool]]:
    """What this machine can measure with, and how to get what is missing."""
    return [{"name": runtime.device, "available": runtime.is_here, "note": _note(runtime)} for runtime in map(Runtime, TITLES)]


def describe_device(name: str) -> dict[str, str | bool]:
    """What a device of this name is, another machine's included, which is asked. Raises what `open_device` raises."""
    device = open_device(name)
    return {"name": device.name, "available": True, "note": device.profile.note, **device.environment()}


def _note(runtime: Runtime) -> str:
    """What it is, and in which precisions it computes beside float32; or how to get it."""
    if not runtime.is_here:
        return CURES[runtime.name]
    others = [p for p in PRECISIONS[runtime.name] if p != EXACT and replace(runtime, precision=p).can_compute]
    return "; ".join([runtime.title, *(f"with &precision={precision} faster than in float32" for precision in others)])


__all__ = ["Device", "DeviceProfile", "describe_device", "list_devices", "open_device"]
