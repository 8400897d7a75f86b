"""The child processes that run files: how they are started and asked, and what their end means."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from autocompress.devices.runtime import Runtime
from autocompress.errors import DeviceUnavailable, PolicyFailure

COMMAND = (sys.executable, "-P", "-m", "autocompress.devices.child")  # -P: a random.py in the current folder is not Python's
TIMEOUT_S = 120.0
"""Beyond what a process allows itself: to start, to load, and to end one very slow call."""
LOCK_PATIENCE_S = 600.0
LOCK_POLL_S = 0.05


def line(request: dict[str, Any]) -> str:
    """A request as a process reads it; it must end when this one does."""
    return json.dumps(request | {"parent": os.getpid()}) + "\n"


def environment() -> dict[str, str]:
    """Of a process: it finds this package where this one is."""
    search_path = [str(Path(__file__).parents[2]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    inherited = {name: value for name, value in os.environ.items() if name != "AUTOCOMPRESS_TOKEN"}
    return inherited | {"PYTHONPATH": os.pathsep.join(search_path)}


def crashed(code: int) -> PolicyFailure:
    """What a process that a signal ended has made of the policy."""
    name = signal.Signals(-code).name
    return PolicyFailure(f"the runtime crashed with {name}" + (": perhaps memory ran out" if name == "SIGKILL" else ""))


def last_line(complaints: str) -> str:
    """Of what a process wrote to stderr."""
    return (complaints.strip().splitlines() or ["no message"])[-1]


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """One measuring at a time of this user, whichever process asks. Raises DeviceUnavailable when another one does not end."""
    path = Path(tempfile.gettempdir()) / f"autocompress-device-{os.getuid()}.lock"
    patience = time.monotonic() + LOCK_PATIENCE_S
    try:
        file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600), "w")  # whoever else writes there sets no link
    except OSError as error:
        raise DeviceUnavailable(f"the lock {str(path)!r} cannot be opened: {error.strerror}", hint=f"remove {path}") from None
    with file:
        while not _lock(file):
            if time.monotonic() > patience:
                raise DeviceUnavailable(
                    f"another program has measured on this machine for {LOCK_PATIENCE_S:.0f} s",
                    hint=f"end it (`fuser {path}` names it), then try again",
                )
            time.sleep(LOCK_POLL_S)
        yield


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def ask(runtime: Runtime, request: dict[str, Any], most_s: float) -> dict[str, Any]:
    """What a process says to a request that it may work on for so many seconds, alone on this machine.

    Raises PolicyFailure where it crashes or hangs, DeviceUnavailable where it fails otherwise.
    """
    own = environment() | {"OMP_NUM_THREADS": str(runtime.threads)}
    with exclusive():
        try:
            done = subprocess.run(
                COMMAND,
                input=line(request | {"most_s": most_s} | runtime.asked),
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S + most_s,
                env=own,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise PolicyFailure(f"measurement timeout: the runtime must answer within {TIMEOUT_S + most_s:.0f} s") from None
    if done.returncode < 0:
        raise crashed(done.returncode)
    if done.returncode != 0:
        reason = last_line(done.stderr)
        raise DeviceUnavailable(f"{runtime.title} failed in its process: {reason}", hint="run `autocompress doctor`")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
