"""What goes wrong with one policy: a failure of that policy, and a traceback in the run's log."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from autocompress.errors import AutocompressError, PolicyFailure, UsageError, one_line

FAILURES = "failures.log"
"""Of a run folder."""


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
