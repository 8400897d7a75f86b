"""The child processes that run files: how they are started and asked, and what their end means."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from autocompress.errors import PolicyFailure

COMMAND = (sys.executable, "-P", "-m", "autocompress.devices.child")  # -P: a random.py in the current folder is not Python's
TIMEOUT_S = 120.0
"""Beyond what a process allows itself: to start, to load, and to end one very slow call."""


def line(request: dict[str, Any]) -> str:
    """A request as a process reads it; it must end when this one does."""
    return json.dumps(request | {"parent": os.getpid()}) + "\n"


def environment() -> dict[str, str]:
    """Of a process: it finds this package where this one is."""
    search_path = [str(Path(__file__).parents[2]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return os.environ | {"PYTHONPATH": os.pathsep.join(search_path)}


def crashed(code: int) -> PolicyFailure:
    """What a process that a signal ended has made of the policy."""
    return PolicyFailure(f"the runtime crashed with {signal.Signals(-code).name}")


def last_line(complaints: str) -> str:
    """Of what a process wrote to stderr."""
    return (complaints.strip().splitlines() or ["no message"])[-1]
