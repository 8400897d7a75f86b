"""What of this machine matters to a search, and what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from autocompress.devices import processor
from autocompress.devices.runtime import CURES
from autocompress.system import machine
from autocompress.units import format_size

PACKAGE = "autocompress"
OPTIONAL = {"openvino": CURES["openvino"]} | {name: f'pip install "{PACKAGE}[{name}]"' for name in ("timm", "transformers")}
UNNUMBERED = "installed"
"""What is known of a package without metadata."""
DISK_NEEDED_BYTES = 2 * 10**9


def examine(folder: Path) -> dict[str, Any]:
    """The machine as seen by a search that would run in `folder`; `problems` says what is in its way, with the cure."""
    needed = requirements()
    free = shutil.disk_usage(folder).free
    problems = [problem for requirement in needed if (problem := _problem(requirement))]
    if free < DISK_NEEDED_BYTES:
        problems.append(f"only {format_size(free)} are free in {folder}: a search needs about {format_size(DISK_NEEDED_BYTES)}")
    problems += [f"{place} cannot be written" for place in (folder, Path(tempfile.gettempdir())) if not os.access(place, os.W_OK)]
    return {
        "usable": not problems,
        "problems": problems,
        "advice": _advice(),
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "cpu": processor.name(),
        "cpu_flags": processor.listed_flags(),
        "cores": machine.usable(),
        "governor": processor.governor() or processor.UNKNOWN,
        "turbo": processor.turbo(),
        "load": round(os.getloadavg()[0], 2),
        "free_disk": format_size(free),
        "versions": {name: version(name) or "missing" for name in (PACKAGE, *(requirement.name for requirement in needed))},
        "optional": {name: version(name) or f"not installed ({cure})" for name, cure in OPTIONAL.items()},
    }


def requirements() -> list[Requirement]:
    """What this package was installed with, extras left out; nothing where it was not installed."""
    try:
        texts = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    known = map(Requirement, texts)
    return [requirement for requirement in known if requirement.marker is None or requirement.marker.evaluate({"extra": ""})]


def _problem(requirement: Requirement) -> str:
    """What is wrong with a package that is needed; nothing where it is as it must be."""
    found, cure = version(requirement.name), f"pip install {shlex.quote(str(requirement))}"
    if found is None:
        return f"{requirement.name} is not installed: {cure}"
    is_known = found != UNNUMBERED and not requirement.specifier.contains(found, prereleases=True)
    return f"{requirement.name} must be {requirement.specifier}, but is {found}: {cure}" if is_known else ""


def version(package: str) -> str | None:
    """The installed version, read without importing the package; None when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return UNNUMBERED if importlib.util.find_spec(package) else None


def _advice() -> list[str]:
    advice = [warning] if (warning := processor.clock_warning(processor.governor())) else []
    load = os.getloadavg()[0]
    if load > 0.5 * (os.cpu_count() or 1):
        advice.append(f"the load is {load:.1f}: other programs disturb latency measurements")
    flags = processor.flags()
    if flags and processor.int8_saturates(flags):
        advice.append("this x86 CPU has no VNNI: int8 weights use 7 bits here, or its multiply-add would saturate")
    return advice
