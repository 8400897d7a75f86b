"""Every error a user can meet, each with the exit code of the command line.

AutocompressError                 1   a bug in autocompress, or a base for the others
├── UsageError                    2   a flag, file, key, unit, model or data set is not what the rule asks for
├── InfeasibleBudget              3   the search ended and nothing meets the budget
├── DeviceUnavailable             4   the device cannot be reached or cannot measure
├── TooManyFailures               5   policies kept failing for one reason, or none became a file that works
├── RunFolderError                6   the run folder is locked, damaged or cannot be written, or a disk is full
├── Interrupted                 130   Ctrl-C ended a command
├── Terminated                  143   SIGTERM or SIGHUP ended the search
└── PolicyFailure                 -   one policy failed; an Outcome, never the end of a search

The message of each is one sentence that names the rule and the value, `hint` is the cure.
"""

from __future__ import annotations

import re
from pathlib import Path

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
"""What torch colours its messages with, for terminals."""


def one_line(error: BaseException) -> str:
    """`"ValueError: the first line of its message"`; of our own errors the message alone."""
    if isinstance(error, AutocompressError):
        return error.message
    lines = COLOUR.sub("", str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def root_cause(error: BaseException) -> BaseException:
    """The error that others were raised from: libraries wrap what went wrong in advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


class AutocompressError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(AutocompressError):
    """Input that breaks a stated rule; there is always a cure."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message, hint=hint)


class InfeasibleBudget(AutocompressError):
    """No policy of the search space meets the budget; carries the best that can be had.

    Args:
        smallest_latency_s: predicted (or measured) latency of the fastest policy, in seconds.
        binds: what the fastest policy spends its time on, most expensive first, in words.
        run: folder of the search, which holds what was measured all the same.
    """

    exit_code = 3

    def __init__(self, message: str, *, hint: str = "", smallest_latency_s: float, binds: str = "") -> None:
        super().__init__(message, hint=hint)
        self.smallest_latency_s = smallest_latency_s
        self.binds = binds
        self.run: Path | None = None


class DeviceUnavailable(AutocompressError):
    """The device that the task names is not there, or its runtime died."""

    exit_code = 4


class TooManyFailures(AutocompressError):
    """Policies kept failing for one reason, which is not theirs then; or no policy became a file that works."""

    exit_code = 5


class RunFolderError(AutocompressError):
    """The run folder is in use, damaged, full or not writable; or the disk of the cache is full."""

    exit_code = 6


class Interrupted(AutocompressError):
    """Ctrl-C, as the command line tells it; from Python it stays a KeyboardInterrupt."""

    exit_code = 130


class Terminated(AutocompressError):
    """A signal other than Ctrl-C asked the search to end; what is finished is kept."""

    exit_code = 143


class PolicyFailure(AutocompressError):
    """This policy cannot become an artifact (diverged, export mismatch, runtime error)."""


class ScoreFailure(PolicyFailure):
    """The data's own score has none for these outputs."""
