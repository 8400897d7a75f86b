"""What goes wrong with one policy: a failure of that policy, and a traceback in the run's log."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from autocompress.errors import AutocompressError, PolicyFailure, UsageError, one_line
from autocompress.units import format_duration

FAILURES = "failures.log"
"""Of a run folder."""
ALARM_AGAIN_S = 10.0


@contextmanager
def policy_errors(log: Path | None = None) -> Iterator[None]:
    """Raises PolicyFailure for whatever goes wrong with one policy; its traceback is added to the file `log`.

    torch, onnx, the runtime and the user's own loss and score each raise their own kinds. Errors of ours and of the file system pass: they
    are about the task or the machine.
    """
    try:
        yield
    except PolicyFailure as failure:
        if log is not None and failure.__cause__ is not None:
            note_error(log)
        raise
    except (AutocompressError, OSError):
        raise
    except Exception as error:
        if log is not None:
            note_error(log)
        raise PolicyFailure(one_line(error)) from error


@contextmanager
def at_most(seconds: float, what: str) -> Iterator[None]:
    """Raises PolicyFailure where Python code goes on for longer: a loss of the user's own may never return.

    In the main thread, where nobody else has set an alarm. What a library computes is waited for; the alarm is raised until it is heard.
    """
    is_free = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    if not is_free or math.isinf(seconds):
        yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise PolicyFailure(f"{what} must end within {format_duration(seconds)}, but did not")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, ALARM_AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


@contextmanager
def refused(what: str) -> Iterator[None]:
    """What is one failure among many in a search is the answer of a command about one model."""
    try:
        with policy_errors():
            yield
    except PolicyFailure as failure:
        raise UsageError(f"{what}: {failure.message}", hint=failure.hint) from failure


def fix_and_resume(log: Path, stage: str) -> str:
    """What to do where policies fail for one reason, which is not theirs, at one stage of what they go through."""
    where = f" (tracebacks are in {log})" if log.is_file() else ""
    otherwise = {
        "train": "; another --batch-size or --learning-rate may be given",
        "check": ", or begin another search with another --device or --space",
        "measure": ", or begin another search with another --device or --space",
    }
    return f"fix that{where}, then --resume{otherwise.get(stage, '')}"


def note_error(log: Path) -> None:
    """Add the traceback of the error that is being handled: what a search goes on after may be a bug of ours all the same."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW  # a link in a folder of somebody else's leads elsewhere
    with suppress(OSError), os.fdopen(os.open(log, flags, 0o644), "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{traceback.format_exc()}\n")
