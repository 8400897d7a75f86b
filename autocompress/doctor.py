"""What of this machine matters to a search, and what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from autocompress.units import format_size

NEEDED = ("torch", "torchvision", "optuna", "onnx", "onnxruntime", "numpy", "scipy", "pydantic", "safetensors")
OPTIONAL = {"openvino": "pip install openvino", "timm": 'pip install "autocompress[timm]"'}
CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "amx_bf16",
    "avx512_bf16",
    "asimd",
    "asimddp",
    "i8mm",
)
DISK_NEEDED_BYTES = 2 * 10**9


def examine(folder: Path) -> dict[str, Any]:
    """The machine as seen by a search that would run in `folder`; `problems` says what is in its way, with the cure."""
    versions = {name: version(name) for name in NEEDED}
    free = shutil.disk_usage(folder).free
    problems = [f"{name} is not installed: pip install autocompress" for name, found in versions.items() if found is None]
    if free < DISK_NEEDED_BYTES:
        problems.append(f"only {format_size(free)} are free in {folder}: a search needs about {format_size(DISK_NEEDED_BYTES)}")
    problems += [f"{place} cannot be written" for place in (folder, Path(tempfile.gettempdir())) if not os.access(place, os.W_OK)]
    return {
        "usable": not problems,
        "problems": problems,
        "advice": _advice(),
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in _cpu_flags()],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "governor": _governor() or "unknown",
        "load": round(os.getloadavg()[0], 2),
        "free_disk": format_size(free),
        "versions": {name: found or "missing" for name, found in versions.items()},
        "optional": {name: version(name) or f"not installed ({cure})" for name, cure in OPTIONAL.items()},
    }


def version(package: str) -> str | None:
    """The installed version, read without importing the package; None when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "installed" if importlib.util.find_spec(package) else None


def _advice() -> list[str]:
    advice = []
    governor, load = _governor(), os.getloadavg()[0]
    if governor not in (None, "performance"):
        advice.append(f"the CPU governor is {governor!r}: latencies vary less with 'performance'")
    if load > 0.5 * (os.cpu_count() or 1):
        advice.append(f"the load is {load:.1f}: other programs disturb latency measurements")
    flags = _cpu_flags()
    if "avx2" in flags and not flags & {"avx512_vnni", "avx_vnni"}:
        advice.append("this x86 CPU has no VNNI: int8 weights use 7 bits here, or its multiply-add would saturate")
    return advice


def _cpu_info(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    return set((_cpu_info("flags") or _cpu_info("Features")).split())


def _governor() -> str | None:
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text(encoding="ascii").strip()
    except OSError:
        return None
